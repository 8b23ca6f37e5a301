"""The whole program through its commands, on the embedded model: a run, what it leaves, and what comes of it later."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from loramoe_train.validation import validate
from tests.cli import (
    ADAPTER,
    MIXER,
    NO_EVAL,
    SMALL,
    TWO_TASKS,
    check_refused,
    half_written,
    lines,
    losses,
    run_cli,
    same_bytes,
    start_cli,
)
from tests.conftest import make_falcon_mamba, write_base
from tests.forks import run_forked
from tests.recipe_runs import write_adapters

TASKS = ["tiny_math", "tiny_code", "tiny_facts", "tiny_grammar", "tiny_sentiment"]


def train(cwd: Path, run_dir: Path, *arguments: str, **environment: str) -> str:
    """A training run that must succeed; its standard error."""
    done = run_forked("train", *arguments, f"run_dir={run_dir}", cwd=cwd, **environment)
    assert done.returncode == 0, done.stderr[-4000:]
    assert not half_written(run_dir)
    return done.stderr


def results(run_dir: Path) -> dict[str, Any]:
    return json.loads((run_dir / "results.json").read_text())


def check_close(one: Path, two: Path, *, loss: float, weight: float) -> None:
    """Losses step by step and every stored tensor agree within the absolute tolerances."""
    assert losses(two) == pytest.approx(losses(one), abs=loss) and len(losses(one)) > 1
    ours, theirs = load_file(one / ADAPTER), load_file(two / ADAPTER)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(theirs[name], tensor, rtol=0, atol=weight, msg=lambda text, n=name: f"{n}: {text}")


@pytest.fixture(scope="session")
def mixer_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished LoRA-Mixer run in both stages, with scores. Read it only."""
    run_dir = tmp_path_factory.mktemp("mixer") / "run"
    arguments = ("trainer.max_steps=6", "trainer.checkpoint_every=2", "eval.limit=4", "trainer.lr=0.02")
    train(run_dir.parent, run_dir, *MIXER, *arguments)
    return run_dir


@pytest.fixture
def copy_of(tmp_path: Path) -> Callable[[Path], Path]:
    def copy(run_dir: Path) -> Path:
        return Path(shutil.copytree(run_dir, tmp_path / "copy"))

    return copy


# -- one finished run --------------------------------------------------------------------------------------------------


def test_a_run_leaves_one_whole_folder(mixer_run):
    names = {path.name for path in mixer_run.iterdir()}
    wanted = {"config.resolved.yaml", "metrics.jsonl", "results.json", ADAPTER, "adapter.json", "checkpoints"}
    assert names == wanted | {"samples"}
    assert [path.name for path in mixer_run.parent.iterdir()] == ["run"]
    assert sorted(p.name for p in (mixer_run / "checkpoints").iterdir())[-1] == "step_000006"
    config = validate(yaml.safe_load((mixer_run / "config.resolved.yaml").read_text()))
    assert config.trainer.max_steps == 6 and list(config.trainer.stages) == ["experts", "routers"]


def test_results_say_what_was_run(mixer_run):
    found = results(mixer_run)
    assert list(found["scores"]) == TASKS
    for score in found["scores"].values():
        assert 0 <= score["base"] <= 1 and 0 <= score["tuned"] <= 1 and score["n"] == 4
        assert score["base_stderr"] >= 0 and score["tuned_stderr"] >= 0
    assert found["seed"] == 0 and found["recipe"] == "lora_mixer" and found["model"] == "tiny"
    assert len(found["config_hash"]) == 64 and {"torch", "transformers", "lm_eval"} <= found["versions"].keys()


def test_metrics_tell_both_stages(mixer_run):
    assert [entry["stage"] for entry in lines(mixer_run, "train")] == ["experts"] * 3 + ["routers"] * 3
    routing = lines(mixer_run, "routing")[-1]["sites"]
    assert len(routing) == 16
    for site in routing.values():
        assert sum(site["load"]) == pytest.approx(1, abs=1e-3) and len(site["load"]) == len(TASKS)


def test_the_last_checkpoint_is_the_adapter_and_stages_train_what_they_say(mixer_run):
    first, last = (mixer_run / "checkpoints" / f"step_{step:06d}" for step in (3, 6))
    assert same_bytes(mixer_run, last)
    before, after = load_file(first / ADAPTER), load_file(last / ADAPTER)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all(".router." in name for name in changed)
    assert any(tensor.any() for name, tensor in before.items() if name.endswith("bank.up"))
    assert not any(tensor.any() for name, tensor in before.items() if ".router." in name)


def test_eval_reproduces_the_scores(mixer_run, tmp_path):
    out = tmp_path / "out"
    done = run_forked("eval", str(mixer_run), "eval.limit=4", f"run_dir={out}", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    again, before = results(out)["scores"], results(mixer_run)["scores"]
    for name, score in before.items():
        for side in ("base_metrics", "tuned_metrics", "base", "tuned"):
            assert again[name][side] == score[side], (name, side)


def test_eval_of_a_checkpoint_and_of_one_task(mixer_run, copy_of, tmp_path):
    checkpoint = copy_of(mixer_run) / "checkpoints" / "step_000006"
    done = run_forked("eval", str(checkpoint), "eval.limit=4", "eval.tasks=[tiny_grammar]", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    scores = results(checkpoint)["scores"]
    assert list(scores) == ["tiny_grammar"]
    assert scores["tiny_grammar"]["tuned_metrics"] == results(mixer_run)["scores"]["tiny_grammar"]["tuned_metrics"]


# -- stop, resume, reuse -----------------------------------------------------------------------------------------------


def test_resume_refuses_another_config(mixer_run, copy_of, tmp_path):
    run_dir = copy_of(mixer_run)
    before = {path: path.stat().st_mtime_ns for path in run_dir.rglob("*")}
    same = (*MIXER, "trainer.max_steps=6", "trainer.checkpoint_every=2", "eval.limit=4", f"run_dir={run_dir}")
    done = run_forked("train", *same, "resume=auto", cwd=tmp_path)  # without trainer.lr=0.02
    check_refused(done, 2, "trainer.lr=0.003", "0.02", "init_from=")
    check_refused(run_forked("train", *same, cwd=tmp_path), 2, "holds another run", "resume=auto")
    assert before == {path: path.stat().st_mtime_ns for path in run_dir.rglob("*")}


def test_init_from_starts_from_the_weights(mixer_run, tmp_path):
    """Routers alone may be trained over the experts of another run, which stay as they are."""
    stage = "trainer.stages={only: {train: [routers]}}"
    train(tmp_path, tmp_path / "run", *MIXER, stage, NO_EVAL, "trainer.max_steps=2", f"init_from={mixer_run}", "seed=5")
    before, after = load_file(mixer_run / ADAPTER), load_file(tmp_path / "run" / ADAPTER)
    for name, tensor in before.items():
        moved = (after[name] - tensor).abs().max().item()
        # two AdamW steps of at most the router's learning rate each
        assert 0 < moved < 0.03 if ".router." in name else moved == 0, (name, moved)


@pytest.mark.slow
def test_another_layout_is_refused(mixer_run, tmp_path):
    done = run_forked("train", *MIXER, "experts.rank=4", f"init_from={mixer_run}", "run_dir=run", cwd=tmp_path)
    check_refused(done, 2, "init_from=", "the layouts differ")
    done = run_forked("train", *MIXER, *TWO_TASKS, f"init_from={mixer_run}", "run_dir=other", cwd=tmp_path)
    check_refused(done, 2, "init_from=", "the layouts differ")


# -- several processes -------------------------------------------------------------------------------------------------


# as `accelerate launch --num_processes 2` with `--cpu`, which alone would start one process
ACCELERATE = ("accelerate.commands.launch", "--multi_gpu", "--num_machines", "1", "--num_processes")


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path):
    """By torchrun, each with the whole base; and by accelerate's launcher, with the base shared out."""
    arguments = (*MIXER, "trainer.max_steps=6", "eval.limit=3", "eval.tasks=[tiny_grammar,tiny_math]")
    arguments = (*arguments, "experts.dropout=0")
    train(tmp_path, tmp_path / "one", *arguments)
    for options in ({}, {"launcher": ACCELERATE}):
        shared = ("trainer.parallel=fsdp2",) if options else ()
        # no run_dir: both must agree on a name
        parallel = start_cli("train", *arguments, *shared, cwd=tmp_path, processes=2, **options)
        _, stderr = parallel.communicate(timeout=300)
        assert parallel.returncode == 0, stderr[-4000:]
        (two,) = (tmp_path / "outputs").iterdir()
        # float32 sums in another order; AdamW divides by the size of the gradient
        check_close(tmp_path / "one", two, loss=1e-4, weight=1e-4)
        ours, theirs = results(tmp_path / "one")["scores"], results(two)["scores"]
        assert theirs.keys() == ours.keys() == {"tiny_grammar", "tiny_math"}
        for name, score in theirs.items():
            assert score["n"] == 3 and score["base_metrics"] == ours[name]["base_metrics"]
        two.rename(tmp_path / f"by {options}")


def test_a_multirun_makes_two_folders(tmp_path):
    done = run_forked("train", *MIXER, NO_EVAL, "trainer.max_steps=2", "--multirun", "seed=0,1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (sweep,) = (tmp_path / "multirun").iterdir()
    runs = [sweep / "0", sweep / "1"]
    assert [results(run)["seed"] for run in runs] == [0, 1] and not same_bytes(*runs)
    assert [results(run)["recipe"] for run in runs] == ["lora_mixer"] * 2
    alone = results(runs[1])["command"]  # which would train this run by itself
    assert alone[:2] == ["loramoe-train", "+recipe=lora_mixer"] and alone[-1] == "resume=auto" and "seed=1" in alone
    assert [text for text in alone if text.startswith("run_dir=")] == [f"run_dir={runs[1]}"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["multirun"]
    assert sorted(path.name for path in sweep.iterdir()) == [".sweep", "0", "1", "sweep.json"]


# -- methods, models, options ------------------------------------------------------------------------------------------


def test_plain_lora_with_trackers(tmp_path):
    for package in ("wandb", "tensorboard"):
        pytest.importorskip(package)
    options = ("trainer.trackers=[wandb,tensorboard]", "trainer.max_steps=3", "eval.limit=2", "eval.tasks=[tiny_facts]")
    train(tmp_path, tmp_path / "run", "+recipe=lora", *SMALL, *options, WANDB_MODE="offline")
    assert not any(".router." in name for name in load_file(tmp_path / "run" / ADAPTER))
    assert list(results(tmp_path / "run")["scores"]) == ["tiny_facts"]
    assert list((tmp_path / "run").rglob("*.wandb")) and list((tmp_path / "run").rglob("events.out.tfevents.*"))
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.slow
def test_plug_and_play_trains_routers_over_imported_adapters(tmp_path):
    one, two = write_adapters(tmp_path / "adapters", 2)
    arguments = (f"experts.adapters=[{one},{two}]", "router.top_k=1", "trainer.max_steps=3", NO_EVAL)
    train(tmp_path, tmp_path / "run", "+recipe=lora_mixer_plug_and_play", *SMALL, *arguments)
    stored = load_file(tmp_path / "run" / ADAPTER)
    site = "model.layers.0.self_attn.q_proj"
    imported = [load_file(path / "adapter_model.safetensors") for path in (one, two)]
    down = torch.cat([tensors[f"base_model.model.{site}.lora_A.weight"] for tensors in imported])
    assert torch.equal(stored[f"{site}.bank.down"], down)
    assert any(tensor.any() for name, tensor in stored.items() if ".router." in name)
    # the run folder is complete in itself: the adapters may go
    shutil.rmtree(tmp_path / "adapters")
    done = run_forked("eval", str(tmp_path / "run"), "eval.limit=2", "eval.tasks=[tiny_facts]", cwd=tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_checkpointed_activations_change_no_loss(tmp_path):
    arguments = (*MIXER, NO_EVAL, "trainer.max_steps=4", "experts.dropout=0.1")
    train(tmp_path, tmp_path / "off", *arguments)
    train(tmp_path, tmp_path / "on", *arguments, "model.gradient_checkpointing=true")
    assert lines(tmp_path / "on", "train") == lines(tmp_path / "off", "train")
    assert same_bytes(tmp_path / "off", tmp_path / "on")


@pytest.mark.slow
def test_compiled_layers_train_to_about_the_same(tmp_path):
    stage = "trainer.stages={all: {train: [experts,routers]}}"  # compiling takes a minute a stage
    arguments = (*MIXER, *TWO_TASKS, stage, "trainer.max_steps=4", "experts.dropout=0.1", "trainer.warmup_fraction=0")
    arguments = (*arguments, "eval.limit=2", "eval.tasks=[tiny_grammar]")
    train(tmp_path, tmp_path / "off", *arguments)
    train(tmp_path, tmp_path / "on", *arguments, "trainer.compile=true")
    # float32 sums in another order; AdamW divides by the size of the gradient
    check_close(tmp_path / "off", tmp_path / "on", loss=1e-4, weight=1e-3)
    assert results(tmp_path / "on")["scores"].keys() == {"tiny_grammar"}
    done = run_cli("eval", str(tmp_path / "on"), "eval.limit=2", cwd=tmp_path, CXX="no-such-compiler")
    assert done.returncode == 0, done.stderr  # evaluation compiles nothing


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        ("data.packing=true",),
        ("model.dtype=bfloat16", "data.sampling.strategy=temperature"),
        ("trainer.mixed_precision=bf16", "data.sampling.strategy=capped", "data.sampling.cap=8"),
        ("data.sampling.strategy=weights", "data.sampling.weights={tiny_math: 3, tiny_code: 1, tiny_facts: 1,"
         " tiny_grammar: 1, tiny_sentiment: 1}", "trainer.num_workers=1"),
        ("model.quantization=nf4", "data.sampling.strategy=equal"),
    ],
    ids=lambda options: options[0],
)  # fmt: skip
def test_options_run_through(options, tmp_path):
    if options[0].startswith("model.quantization"):
        pytest.importorskip("bitsandbytes")
    train(tmp_path, tmp_path / "run", *MIXER, *options, "trainer.max_steps=4", NO_EVAL)
    assert len(losses(tmp_path / "run")) == 4 and all(0 < loss < 20 for loss in losses(tmp_path / "run"))


@pytest.mark.slow
def test_a_state_space_model_trains_and_is_evaluated(tmp_path):
    """Recipe and data know nothing of the model: a random Falcon-Mamba beside the embedded tokenizer."""
    folder = write_base(tmp_path / "mamba", make_falcon_mamba)
    options = ("model=falcon_mamba_7b", f"model.path={folder}", "model.dtype=float32", "experts.rank=2")
    train(
        tmp_path, tmp_path / "run", *MIXER, *options, "trainer.max_steps=4", "eval.limit=2", "eval.tasks=[tiny_facts]"
    )
    stored = load_file(tmp_path / "run" / ADAPTER)
    moved = [name for name, tensor in stored.items() if name.endswith("up") and tensor.any()]
    assert {name.split(".")[-3] for name in moved} == {"in_proj", "x_proj", "dt_proj", "out_proj"}


def test_data_shows_examples_and_ids(tmp_path):
    # without its loss, what the recipe sets of the loss is gone, too
    done = run_forked("data", "+recipe=mola", "aux_loss=none", "+show.n=1", "+show.ids=true", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert all(task in done.stdout for task in TASKS) and "<|" in done.stdout
    assert not list(tmp_path.iterdir())


def test_plan_reads_no_weight(tmp_path):
    done = run_forked("plan", "+recipe=lora_mixer", "+plan.batch=2", "+plan.sequence=32", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "16 sites" in done.stdout and "trainable" in done.stdout and "MISSING" not in done.stdout
