"""Bad input on the command line: one clear line, the right exit code, before anything heavy is loaded."""

import os
import signal
import subprocess
import sys
import time

import pytest

from loramoe_train.composition import chosen_losses, define_tasks, normalised, ordered, own_keys
from loramoe_train.errors import ConfigError
from loramoe_train.guard import guard
from loramoe_train.paths import CONFIGS
from loramoe_train.reproduce.runs import compose_run
from tests.cli import command_in_this_process, run_cli, start_cli
from tests.conftest import ROOT

RECIPE = "+recipe=lora_mixer"


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["+recipe=lora_mixr"], 2, ["recipe=lora_mixr", "did you mean 'lora_mixer'"]),
        ([RECIPE, "seeed=3"], 2, ["'seeed'", "did you mean 'seed'"]),
        ([RECIPE, "experts.rnk=4"], 2, ["experts.rnk", "experts.rank"]),
        ([RECIPE, "+experts.rnk=4"], 2, ["experts.rnk=4", "did you mean 'rank'"]),
        ([RECIPE, "+foo=1"], 2, ["foo=1"]),
        (["roter=soft"], 2, ["'roter'", "did you mean 'router'"]),
        (["router=sft"], 2, ["router=sft", "did you mean 'soft'"]),
        ([RECIPE, "trainer.lr=abc"], 2, ["trainer.lr=abc", "number"]),
        ([RECIPE, "trainer.lr=-1"], 2, ["trainer.lr=-1", "greater than 0"]),
        ([RECIPE, "trainer.optimizer=adm"], 2, ["trainer.optimizer=adm", "did you mean 'adamw'"]),
        ([RECIPE, "router.top_k=9"], 2, ["router.top_k=9", "5 experts"]),
        ([RECIPE, "router.top_k=null"], 2, ["router.top_k is missing"]),
        ([RECIPE, "experts.layout=[1,2]"], 2, ["experts.layout", "2 entries for 4 layers"]),
        ([RECIPE, "experts.layout=many"], 2, ["experts.layout", "'many' is no layout"]),
        ([RECIPE, "experts.rank=[8]"], 2, ["experts.rank", "1 entries for 4 layers"]),
        ([RECIPE, "experts.rank=0"], 2, ["experts.rank=0", "at least 1"]),
        ([RECIPE, "router=none"], 2, ["aux_loss.routing_specialization needs a learned router"]),
        ([RECIPE, "router.scope=blok"], 2, ["router.scope=blok", "none, site", "'block'"]),
        ([RECIPE, "router.scope=none"], 2, ["router.scope=none", "contradict"]),
        (["+recipe=lora", "experts.layout=4"], 2, ["experts.layout=4", "router.scope=none"]),
        ([RECIPE, "data.tasks=[gsm8k,colaa]"], 2, ["'colaa'", "did you mean 'cola'"]),
        ([RECIPE, "data.sampling.strategy=weights", "data.sampling.weights.tiny_mth=1"], 2, ["tiny_mth", "tiny_math"]),
        ([RECIPE, "data.tasks=[]"], 2, ["data", "empty"]),
        ([RECIPE, "data.max_length=100000"], 2, ["data.max_length=100000", "512"]),
        ([RECIPE, "model.path=/does/not/exist"], 3, ["model.path=/does/not/exist"]),
        ([RECIPE, "model=llama3_8b"], 3, ["Meta-Llama-3-8B", "hf download"]),
        ([RECIPE, "eval.tasks=[gsm9k]"], 2, ["'gsm9k'", "gsm8k"]),
        ([RECIPE, "eval.tasks=[]"], 2, ["eval.tasks=[] names nothing", "eval.tasks=null"]),
        ([RECIPE, "eval.tasks=[tiny_math@2,tiny_math@2]"], 2, ["tiny_math@2 is named twice"]),
        ([RECIPE, "eval.tasks=[tiny_math@9999]"], 2, ["tiny_math@9999 is more than tiny_math can draw", "rows"]),
        ([RECIPE, "eval.tasks=[tiny_code@2]"], 2, ["tiny_code takes no examples"]),
        ([RECIPE, "experts.make._target_=os.system"], 2, ["lies outside loramoe_train"]),
        ([RECIPE, "router.make.temprature=2"], 2, ["temprature"]),
        ([RECIPE, "+router.make.temprature=2"], 2, ["router.make.temprature", "did you mean 'temperature'"]),
        ([RECIPE, "trainer.max_steps=1"], 2, ["trainer.max_steps", "2 stages"]),
        (["+recipe=lora_mixer_plug_and_play"], 2, ["experts.adapters"]),
        ([RECIPE, "data.tasks=tiny_math"], 2, ["data.tasks=[tiny_math]"]),
        ([RECIPE, "trainer.lr=inf"], 2, ["trainer.lr=inf", "finite"]),
        ([RECIPE, "trainer.stages={a: {train: [router]}}"], 2, ["trainer.stages.a.train.0=router", "'routers'"]),
        ([RECIPE, "no_equal_sign"], 2, ["no_equal_sign"]),
        ([RECIPE, "eval=null"], 2, ["eval=null", "choose one of default, quick", "eval.enabled=false"]),
        (["--nope"], 2, ["unrecognized arguments: --nope"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_one_line_and_an_exit_code(arguments, code, words, tmp_path):
    started = time.monotonic()
    done = run_cli("train", *arguments, cwd=tmp_path)
    assert done.returncode == code, done.stderr
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("loramoe: "), done.stderr
    assert all(word in lines[0] for word in words), lines[0]
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir()), "a refused run leaves nothing behind"
    assert time.monotonic() - started < 30  # five seconds on an idle machine; this is only a hang's guard


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("run_dir='open", "run_dir='open: cannot be read; close quotes and brackets"),
        ("run_dir=é", "run_dir=é: cannot be read"),
        ("router=null", "router=null: router is a group and takes a name"),
        ("no_equal_sign", "no_equal_sign: is neither an option nor KEY=VALUE"),
        ("seed=1,2", "seed=1,2: several values are a sweep (loramoe-train --multirun); a list is seed=[1,2]"),
        ("+eval=quick", "eval is chosen already; give eval=OPTION without +"),
        ("hydra.mode=nope", "hydra.mode=nope: Invalid value 'nope', expected one of [RUN, MULTIRUN]"),
        ("run_dir=", "run_dir=: should have at least 1 character"),
        ("seed=99999999999999999999", "seed=99999999999999999999: should be less than 9223372036854775808"),
        ("trusted_modules=null", "trusted_modules=null: must be a list; write trusted_modules=[]"),
        ("data.tasks=[{a: 1}]", "data.tasks.0={'a': 1}: should be a valid string"),
        ("data.definitions=3", "data.definitions=3: should be a valid dictionary"),
    ],
)
def test_a_composition_that_fails_says_why_in_one_line(override, words):
    with pytest.raises(ConfigError) as refused:
        compose_run([override], ())
    assert str(refused.value).startswith(words) and "\n" not in str(refused.value)


def test_a_file_cannot_widen_what_it_may_run(tmp_path):
    folder = tmp_path / "mine" / "recipe"
    folder.mkdir(parents=True)
    (folder / "evil.yaml").write_text("# @package _global_\ntrusted_modules: [os]\n")
    done = run_cli("train", "--config-dir", str(tmp_path / "mine"), "+recipe=evil", cwd=tmp_path)
    assert done.returncode == 2 and "only be set on the command line" in done.stderr


def test_plus_is_optional_before_recipe(tmp_path):
    one = run_cli("train", "--cfg", "job", "recipe=lora_mixer", cwd=tmp_path)
    two = run_cli("train", "--cfg", "job", "+recipe=lora_mixer", cwd=tmp_path)
    assert one.returncode == 0 and one.stdout == two.stdout


def test_help_lists_recipes_and_groups(tmp_path):
    done = run_cli("train", "--help", cwd=tmp_path)
    assert done.returncode == 0
    assert "recipe: " in done.stdout and "lora_mixer" in done.stdout and "router: " in done.stdout


def test_overrides_in_the_form_that_hydra_wants():
    whole = "trainer.stages={only: {train: [routers]}}"
    assert normalised([whole]) == ["~trainer.stages", f"++{whole}"]  # replaces the recipe's stages
    assert normalised(["recipe=lora", "trainer.stages.a.steps=5"]) == ["+recipe=lora", "++trainer.stages.a.steps=5"]
    assert normalised(["plan.batch=8", "+show.n=2", "plan=3"]) == ["+plan.batch=8", "+show.n=2", "plan=3"]
    given = ["+recipe=lora", "--multirun", "seed=0,1", "--config-dir", "mine"]
    assert ordered(given) == ["--multirun", "--config-dir", "mine", "+recipe=lora", "seed=0,1"]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (3, "plan=3: give +plan.KEY=VALUE; known: batch, ids, speed"),
        ({"batchh": 1}, "unknown key plan.batchh; did you mean 'batch'?"),
        ({"batch": "many"}, "plan.batch=many must be a whole number above 0"),
        ({"batch": 1.5}, "must be a whole number above 0"),
        ({"batch": True}, "must be a whole number above 0"),
        ({"batch": -1}, "must be a whole number above 0"),
        ({"speed": float("inf")}, "plan.speed=inf must be a number above 0"),
        ({"speed": "fast"}, "must be a number above 0"),
        ({"ids": "maybe"}, "plan.ids=maybe must be true or false"),
    ],
)
def test_keys_of_a_command_alone(given, words):
    kinds = {"batch": int, "speed": float, "ids": bool}
    with pytest.raises(ConfigError) as refused:
        own_keys("plan", kinds, given)
    assert words in str(refused.value)
    assert own_keys("plan", kinds, {"batch": 2, "speed": 5, "ids": False}) == {"batch": 2, "speed": 5, "ids": False}
    assert own_keys("plan", kinds, {"batch": None}) == {}


def test_tasks_that_are_no_names_are_left_for_validation():
    for data in ({"tasks": [{"a": 1}]}, {"tasks": ["gsm8k"], "definitions": 3}, {"tasks": None}):
        before = dict(data)
        define_tasks(data, [])
        assert data == before
    known = {"tasks": ["mine", "cola"], "definitions": {"mine": {}}}
    define_tasks(known, [CONFIGS / "data" / "task"])
    assert list(known["definitions"]) == ["cola", "mine"] and known["definitions"]["mine"] == {}


def test_what_a_recipe_sets_of_a_loss_goes_with_the_loss():
    terms = {"left": {"weight": 1.0, "make": {"pool": "site"}}, "chosen": {"make": {"_target_": "a.B"}}}
    assert set(chosen_losses(terms, ["aux_loss=none", "trainer.lr=1"])) == {"chosen"}
    meant = ["aux_loss.left.weight=2"]  # by the user, who is told that no such loss is chosen
    assert set(chosen_losses(terms, meant)) == {"left", "chosen"}
    assert chosen_losses(None, []) == {}


def test_a_folder_that_is_no_run_is_not_overwritten(tmp_path):
    (tmp_path / "adapter.safetensors").write_text("precious")
    done = run_cli("train", RECIPE, f"run_dir={tmp_path}", cwd=tmp_path)
    assert done.returncode == 2 and "holds adapter.safetensors" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["adapter.safetensors"]


WARNS = """
import logging, sys
early = logging.getLogger("loramoe_train.early")  # Hydra sets up logging after this, and once more for each job
from loramoe_train import cli
cli._main(lambda config, extra: early.warning(f"seed {config.seed}"))
"""


@pytest.mark.parametrize("seeds", [["3"], ["3", "4"]])
def test_warnings_reach_the_screen(seeds, tmp_path):
    options = [f"seed={','.join(seeds)}", *(["--multirun"] if len(seeds) > 1 else [])]
    command = [sys.executable, "-c", WARNS, *options]
    done = subprocess.run(
        command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert done.stderr.splitlines() == [f"WARNING loramoe_train.early: seed {seed}" for seed in seeds]


@pytest.mark.parametrize("arguments", [("train", "--help"), ("train", "--cfg", "job"), ("eval", "--help")])
def test_a_reader_that_has_seen_enough(arguments, tmp_path):
    """As behind `| head -1`: no traceback."""
    running = start_cli(*arguments, cwd=tmp_path)
    running.stdout.close()
    with running.stderr:
        assert running.stderr.read() == "" and running.wait(60) == 128 + signal.SIGPIPE


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_signal_outside_the_training_loop(number, code, capsys):
    with command_in_this_process(), pytest.raises(SystemExit) as stopped:
        guard(lambda: signal.raise_signal(number))
    assert stopped.value.code == code
    assert capsys.readouterr().err.startswith("loramoe: ")
