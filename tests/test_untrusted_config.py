"""Config files, stored configs and templates of a stranger: nothing is executed, nothing is written where nobody said.

The marker is a file that each attempt would leave, were it executed.
"""

import copy
import sys
from pathlib import Path

import pytest

from loramoe_train import cli
from loramoe_train.data.definitions import load_definitions
from loramoe_train.data.templates import Predicate, Renderer
from loramoe_train.errors import ConfigError, DataError, LoramoeError
from loramoe_train.evaluation import tasks as benchmarks
from loramoe_train.experts.adapters import FORMAT, MANIFEST, VERSION
from loramoe_train.files import write_json
from loramoe_train.parts import check_part
from loramoe_train.reuse import config_of
from loramoe_train.rundir import read_resolved
from loramoe_train.validation import validate
from tests.cli import command_in_this_process
from tests.composing import composed
from tests.conftest import make_tokenizer
from tests.data.helpers import task_config


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    return tmp_path / "executed"


def refused(monkeypatch, capsys, folder: Path, *arguments: str) -> str:
    """The one line of `loramoe-train --config-dir FOLDER ARGUMENTS`, in this process: composing needs no torch."""
    monkeypatch.setattr(sys, "argv", ["loramoe-train", "--config-dir", str(folder), *arguments])
    with command_in_this_process(), pytest.raises(SystemExit) as caught:
        cli.train()
    printed = capsys.readouterr()
    assert caught.value.code == 2 and "Traceback" not in printed.err, printed.err
    (line,) = printed.err.strip().splitlines()
    return line


HANDLER = "{_target_: logging.FileHandler, filename: MARKER}"
LOGGING = "{version: 1, handlers: {x: {class: logging.FileHandler, filename: MARKER}}, root: {handlers: [x]}}"
GLOBAL = "# @package _global_\n"
# file below the stranger's folder -> its content, and what the victim types; MARKER stands for the marker
HYDRA_FILES = {
    "callbacks": ({"recipe/mine.yaml": GLOBAL + f"hydra: {{callbacks: {{x: {HANDLER}}}}}"}, ["+recipe=mine"]),
    "logging": ({"recipe/mine.yaml": GLOBAL + f"hydra: {{job_logging: {LOGGING}}}"}, ["+recipe=mine"]),
    "escaped key": ({"recipe/mine.yaml": GLOBAL + f'"\\x68ydra": {{callbacks: {{x: {HANDLER}}}}}'}, ["+recipe=mine"]),
    "package in the header": ({"recipe/mine.yaml": f"# @package hydra.callbacks\nx: {HANDLER}"}, ["+recipe=mine"]),
    "package in the defaults": (
        {"recipe/mine.yaml": GLOBAL + "defaults: [/other@hydra.callbacks: it]", "other/it.yaml": f"x: {HANDLER}"},
        ["+recipe=mine"],
    ),
    "option of a hydra group": (
        {
            "recipe/mine.yaml": GLOBAL + "defaults: [override /hydra/job_logging: mine]",
            "hydra/job_logging/mine.yaml": LOGGING,
        },
        ["+recipe=mine"],
    ),
    "overrides that nobody typed": (
        {"recipe/mine.yaml": GLOBAL + "hydra: {sweeper: {params: {trusted_modules: '[os]'}}}"},
        ["--multirun", "+recipe=mine"],
    ),
    "in a sweep": (
        {"recipe/mine.yaml": GLOBAL + f"hydra: {{job_logging: {LOGGING}}}"},
        ["--multirun", "+recipe=mine,lora"],
    ),
    "further folders": ({"train.yaml": "hydra: {searchpath: [file:///tmp]}"}, ["--config-name", "train"]),
}


@pytest.mark.parametrize("case", HYDRA_FILES)
def test_a_config_file_sets_nothing_of_hydra(case, tmp_path, marker, monkeypatch, capsys):
    """Hydra makes what its own settings name before it calls any program."""
    files, arguments = HYDRA_FILES[case]
    for name, content in files.items():
        path = tmp_path / "mine" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content.replace("MARKER", str(marker)))
    if "train.yaml" in files:
        monkeypatch.setattr(cli, "CONFIGS", tmp_path / "mine")  # as with --config-path
    monkeypatch.chdir(tmp_path)
    # the last one is refused as well, but later: whoever lets the file pass shall not train
    line = refused(monkeypatch, capsys, tmp_path / "mine", *arguments, "trainer.lr=-1")
    assert "hydra" in line and not marker.exists()
    assert "give hydra.KEY=VALUE on the command line" in line
    assert {path.name for path in tmp_path.iterdir()} <= {"mine", "multirun"}


TYPED = {
    "trusted_modules": "trusted_modules: [os]",
    "model.trust_remote_code": "model: {trust_remote_code: true}",
    "eval.allow_code_execution": "eval: {allow_code_execution: true}",
    "eval.sandbox": "eval: {sandbox: user}",
}
BROKEN = {
    "python tag": ("x: !!python/object/apply:os.system [touch MARKER]", "could not determine a constructor"),
    "python name": ("x: !!python/name:os.system", "could not determine a constructor"),
    "nested": ("x: " + "[" * 500, "nested too deeply"),
    "not UTF-8": ("x: \udcff", "not a config file"),
    "no mapping": ("- 1\n", "mine"),
    "another target": ("experts: {make: {_target_: logging.FileHandler, filename: MARKER}}", "lies outside"),
}


@pytest.mark.parametrize("key", TYPED)
def test_a_config_file_lets_no_further_code_run(key, tmp_path, monkeypatch, capsys):
    (tmp_path / "recipe").mkdir()
    (tmp_path / "recipe" / "mine.yaml").write_text(GLOBAL + TYPED[key])
    line = refused(monkeypatch, capsys, tmp_path, "+recipe=mine")
    assert f"{key} may only be set on the command line" in line and f"add {key}=" in line


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_config_file(case, tmp_path, marker, monkeypatch, capsys):
    content, words = BROKEN[case]
    (tmp_path / "recipe").mkdir()
    text = (GLOBAL + content).replace("MARKER", str(marker))
    (tmp_path / "recipe" / "mine.yaml").write_bytes(text.encode("utf-8", "surrogateescape"))
    assert words in refused(monkeypatch, capsys, tmp_path, "+recipe=mine") and not marker.exists()


@pytest.mark.parametrize("case", ["python tag", "python name", "nested"])
def test_other_yaml_files(case, tmp_path, marker):
    text = BROKEN[case][0].replace("MARKER", str(marker))
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match="mine.yaml"):
        load_definitions(["mine"], [tmp_path])
    with pytest.raises(DataError, match="mine.yaml cannot be read"):
        read_resolved(path)
    assert not marker.exists()


def test_a_benchmark_file_names_no_function(tmp_path, monkeypatch):
    """`!function` is how a file of lm-eval names Python code beside it."""
    (tmp_path / "mine.yaml").write_text("headline: acc,none\ntask: {process_docs: !function evil.run}\n")
    (tmp_path / "evil.py").write_text("raise SystemExit('executed')")
    monkeypatch.setattr(benchmarks, "FOLDER", tmp_path)
    with pytest.raises(ConfigError, match="mine.yaml is no valid benchmark definition.*!function"):
        benchmarks.load_benchmark.__wrapped__("mine")
    for name in ("../mine", f"{tmp_path}/mine", "mine.yaml"):
        with pytest.raises(ConfigError, match="is no known benchmark"):
            benchmarks.load_benchmark.__wrapped__(name)
    with pytest.raises(ConfigError, match="no task is called '../mine'"):
        load_definitions(["../mine"], [tmp_path / "tasks"])


# -- parts -------------------------------------------------------------------------------------------------------------

TOPK = "loramoe_train.routers.select.TopK"
TARGETS = [
    "os.system",
    "builtins.exec",
    "logging.FileHandler",
    "loramoe_train",
    "loramoe_train.cli",
    "loramoe_train.training.metrics.Metrics",  # ours, but it opens files
    "loramoe_train.data.lines.JsonLines",
    "loramoe_train.routers.select.os.system",
    "loramoe_train.routers../../../evil.Part",
    "loramoe_train./tmp/evil.Part",
    "loramoe_train.experts.bank.math",
    "loramoe_train.experts.shared._arrangement",
    ["os", "system"],
]
PLACES = {
    "experts.make": ("experts", "make"),
    "router.make": ("router", "make"),
    "router.make.score": ("router", "make", "score"),
    "router.make.train.select": ("router", "make", "train", "select"),
    "aux_loss.routing_specialization.make": ("aux_loss", "routing_specialization", "make"),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_a_target_outside_the_parts(place, target):
    values = composed("+recipe=lora_mixer").plain()
    part = values
    for key in PLACES[place]:
        part = part[key]
    part["_target_"] = target
    with pytest.raises(ConfigError, match=f"^{place}._target_: "):
        validate(values)


@pytest.mark.parametrize(
    "hidden", [[{"_target_": "os.system"}], {"x": {"_target_": "os.system"}}, {"x": [[{"_target_": 1}]]}]
)
def test_a_target_where_nothing_is_made_of_it(hidden):
    with pytest.raises(ConfigError, match="x.top_k holds a _target_ where nothing is made of it"):
        check_part({"_target_": TOPK, "top_k": hidden}, "x", facts=("num_experts",))


# -- stored configs ----------------------------------------------------------------------------------------------------


def stored(folder: Path, change) -> Path:
    """An adapter folder whose manifest holds a config that `change` has been at."""
    values = copy.deepcopy(composed("+recipe=lora_mixer").plain())
    change(values)
    write_json(
        folder / MANIFEST, {"format": FORMAT, "version": VERSION, "config": values, "sites": [], "weights_sha256": ""}
    )
    return folder


def test_a_stored_config_says_not_where_to_write(tmp_path):
    folder = stored(tmp_path, lambda v: v.update(run_dir="/elsewhere", resume="auto", init_from="/elsewhere"))
    config, adapter, _ = config_of(folder, [])
    assert (config.run_dir, config.resume, config.init_from, adapter) == (None, None, None, folder)
    assert config_of(folder, ["run_dir=mine"])[0].run_dir == "mine"


def test_what_is_stored_is_text_and_not_filled_in(tmp_path, monkeypatch):
    monkeypatch.setenv("SECRET", "password")
    text = "${oc.env:SECRET} ${seed} ${nonsense"
    folder = stored(tmp_path, lambda v: v["data"]["definitions"]["tiny_math"].update(prompt=text, answer="{{x}}"))
    config, _, _ = config_of(folder, ["eval.limit=2", "data.sampling.cap=7"])
    assert config.data.definitions["tiny_math"].prompt == text
    assert config.eval.limit == 2 and config.data.sampling.cap == 7
    assert config_of(folder, ["data.root='${oc.env:SECRET}'"])[0].data.root == "password"  # typed by the user


def test_a_stored_config_lets_no_further_code_run(tmp_path):
    folder = stored(tmp_path, lambda v: v.update(trusted_modules=["os"]))
    with pytest.raises(ConfigError, match=r"trusted_modules may only be .* add trusted_modules=\[os\]"):
        config_of(folder, [])
    assert config_of(folder, ["trusted_modules=[fractions]"])[0].trusted_modules == ["fractions"]
    folder = stored(tmp_path, lambda v: v["model"].update(trust_remote_code=True))
    with pytest.raises(ConfigError, match="model.trust_remote_code may only be set on the command line"):
        config_of(folder, ["eval.limit=1"])
    folder = stored(tmp_path, lambda v: v["eval"].update(allow_code_execution=True))
    assert config_of(folder, [])[0].eval.allow_code_execution is False
    assert config_of(folder, ["eval.allow_code_execution=true"])[0].eval.allow_code_execution is True
    folder = stored(tmp_path, lambda v: v["eval"].update(sandbox="user"))
    assert config_of(folder, ["eval.allow_code_execution=true"])[0].eval.sandbox == "auto"
    assert config_of(folder, ["eval.sandbox=seccomp"])[0].eval.sandbox == "seccomp"


@pytest.mark.parametrize(
    "change",
    [
        lambda v: v["router"].update(make={"_target_": "os.system", "command": "x"}),
        lambda v: v["router"]["make"].update(score=[{"_target_": "os.system"}]),
        lambda v: v.pop("data"),
        lambda v: v.update(data=[1]),
        lambda v: v["data"].update(tasks=["../../etc/passwd"]),
        lambda v: v["data"].update(tasks=[{"a": 1}]),
        lambda v: v["data"].update(definitions=None),
        lambda v: v.update(eval=3),
        lambda v: v.update(model="${oc.env:HOME}"),
        lambda v: v.update(hydra={"callbacks": {"x": {"_target_": "os.system"}}}),
        lambda v: v["experts"].update(layout=[[[1]]]),
    ],
)
def test_a_stored_config_that_is_none(change, tmp_path):
    with pytest.raises(LoramoeError) as caught:
        config_of(stored(tmp_path, change), [])
    assert str(caught.value).isprintable()


# -- templates ---------------------------------------------------------------------------------------------------------

ESCAPES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}{{q}}",
    "{{ q.__class__.__base__.__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.system('touch MARKER') }}{{q}}",
    "{{ lipsum.__globals__['os'].popen('touch MARKER').read() }}{{q}}",
    "{{ namespace.__init__.__globals__ }}{{q}}",
    "{{ self._TemplateReference__context }}{{q}}",
    "{{ (q|attr('__class__'))|attr('__mro__') }}",
    "{{ '{0.__class__.__mro__}'.format(q) }}",
    "{{ '{0.__class__}'|format(q) if false else ('%s' % q).format.__globals__ }}",
    "{% include '/etc/passwd' %}{{q}}",
    "{% import 'os' as os %}{{ os.system('touch MARKER') }}{{q}}",
    "{% extends q %}",
    "{{ b.append(1) }}{{q}}",
    "{{ b.clear() }}{{q}}",
]


@pytest.mark.parametrize("source", ESCAPES)
def test_a_template_stays_in_its_sandbox(source, marker, tmp_path):
    source, row = source.replace("MARKER", str(marker)), {"q": "/etc/passwd", "a": "x", "b": [1]}
    with pytest.raises(LoramoeError):
        Renderer("toy", task_config(prompt=source, answer="{{a}}"), None)(row, "toy.jsonl:1")
    assert not marker.exists() and row["b"] == [1]


@pytest.mark.parametrize("source", ESCAPES[:9])
def test_a_chat_template_stays_in_its_sandbox(source, marker):
    tokenizer = make_tokenizer(
        chat_template="{% set q = messages[0]['content'] %}" + source.replace("MARKER", str(marker))
    )
    row = {"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "x"}]}
    with pytest.raises(LoramoeError, match="^toy.jsonl:1: "):
        Renderer("toy", task_config(format="messages"), tokenizer)(row, "toy.jsonl:1")
    assert not marker.exists()


@pytest.mark.parametrize("source", ["cycler.__init__.__globals__.os", "q.__class__.__mro__", "lipsum.__globals__"])
def test_an_expression_stays_in_its_sandbox(source):
    with pytest.raises(LoramoeError):
        Predicate(source, key="keep")({"q": "x"}, "toy.jsonl:1")
