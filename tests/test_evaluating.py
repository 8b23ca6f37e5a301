"""Plain models and adapters of PEFT: scored as PEFT and the plain model answer, refused in one line before loading."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from loramoe_train import evaluating
from loramoe_train.errors import ConfigError, DataError, LoramoeError, MissingFileError
from loramoe_train.evaluating import evaluate_path
from loramoe_train.evaluation.compare_runs import compare_runs
from loramoe_train.evaluation.harness import evaluate
from loramoe_train.experts.peft_folder import read_peft_config
from loramoe_train.models import load_model, load_tokenizer
from loramoe_train.paths import ASSETS
from loramoe_train.schema.evaluation import EvalConfig
from loramoe_train.schema.model import ModelConfig

TINY = ASSETS / "tiny" / "model"
ASKED = ("eval.limit=3", "eval.tasks=[tiny_grammar,tiny_math]", "eval.max_new_tokens=8")
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {"r": 4, "lora_alpha": 12, "target_modules": ["q_proj", "v_proj"]},
    "patterns": {"r": 4, "rank_pattern": {r"layers\.1\..*": 3, "v_proj": 2}, "alpha_pattern": {"q_proj": 7},
                 "use_rslora": True, "target_modules": "all-linear"},
    "dora": {"r": 2, "lora_alpha": 6, "use_dora": True, "target_modules": ["q_proj", "down_proj"]},
}  # fmt: skip


@pytest.fixture(scope="module")
def make_adapter(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A folder that PEFT's own save_pretrained writes, with random factors. Read it only."""
    made: dict[str, Path] = {}

    def make(variant: str) -> Path:
        from peft import LoraConfig, get_peft_model

        if variant not in made:
            torch.manual_seed(1)
            config = LoraConfig(task_type="CAUSAL_LM", base_model_name_or_path=str(TINY), **VARIANTS[variant])
            model = get_peft_model(load_model(ModelConfig(name="tiny")), config)
            for name, parameter in model.named_parameters():
                if "lora_A" in name or "lora_B" in name:
                    torch.nn.init.normal_(parameter, std=0.15)
            made[variant] = tmp_path_factory.mktemp(variant) / "adapter"
            model.save_pretrained(made[variant])
            edit(made[variant], base_model_name_or_path=str(TINY))
        return made[variant]

    return make


@pytest.fixture
def adapter(make_adapter: Callable[[str], Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(make_adapter("plain"), tmp_path / "adapter"))


def edit(folder: Path, **changes: Any) -> Path:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


def answers(folder: Path, side: str) -> dict[str, list]:
    """benchmark -> log-likelihoods or responses, document by document."""
    found = {}
    for path in sorted((folder / "samples").glob(f"*.{side}.jsonl")):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        found[path.name.split(".")[0]] = [row.get("log_likelihoods") or row["responses"] for row in rows]
    return found


def asked_directly(model: Any) -> dict[str, list]:
    config = EvalConfig(limit=3, max_new_tokens=8)
    tokenizer = load_tokenizer(ModelConfig(name="tiny"))
    found = evaluate(model, tokenizer, ["tiny_grammar", "tiny_math"], config=config, data_root=None, seed=0)
    return {
        name: [sample.get("log_likelihoods") or sample["responses"] for sample in result.samples]
        for name, result in found.items()
    }


@pytest.fixture(scope="module")
def of_the_base() -> dict[str, list]:
    return asked_directly(load_model(ModelConfig(name="tiny")))


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_peft_adapter_answers_as_peft_does(variant, make_adapter, of_the_base, tmp_path):
    """The folder goes to PEFT as it stands; ours gets the sizes and settings that were read out of it."""
    from peft import PeftModel

    folder = make_adapter(variant)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    evaluate_path(str(folder), [*ASKED, f"run_dir={tmp_path}"])
    theirs = PeftModel.from_pretrained(load_model(ModelConfig(name="tiny")), folder).get_base_model()
    assert answers(tmp_path, "tuned") == asked_directly(theirs) != of_the_base
    assert answers(tmp_path, "base") == of_the_base
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["evaluated"] == str(folder) and found["scores"]["tiny_math"]["difference"] is not None
    assert len(compare_runs(tmp_path).rows) == 2


def test_a_plain_model_has_one_column_and_a_second_start_asks_nothing(of_the_base, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model = Path(shutil.copytree(TINY, tmp_path / "mine"))
    evaluate_path("mine", ASKED)
    text = capsys.readouterr().out
    assert "base" in text and "tuned" not in text and "difference" not in text
    (out,) = (tmp_path / "outputs" / "eval").iterdir()
    assert out.name.startswith("mine-") and str(out.relative_to(tmp_path)) in text
    assert answers(out, "base") == of_the_base and not answers(out, "tuned")
    first = json.loads((out / "results.json").read_text())["scores"]
    assert all(entry["tuned"] is None and entry["difference"] is None for entry in first.values())
    assert {path.name for path in model.iterdir()} == {path.name for path in TINY.iterdir()}
    monkeypatch.setattr("loramoe_train.scoring.write_unit", lambda *_, **__: pytest.fail("asked again"))
    evaluate_path(f"{tmp_path}/mine", ASKED)  # the same place under another name
    assert json.loads((out / "results.json").read_text())["scores"] == first
    assert [path.name for path in (tmp_path / "outputs" / "eval").iterdir()] == [out.name]


def test_a_name_is_enough_for_an_embedded_model(tmp_path, of_the_base):
    evaluate_path("tiny", [*ASKED, f"run_dir={tmp_path}", "eval=quick", "eval.limit=3"])
    assert answers(tmp_path, "base") == of_the_base


def test_the_base_of_an_adapter_may_be_another_folder(adapter, tmp_path):
    shutil.copytree(TINY, tmp_path / "moved")
    edit(adapter, base_model_name_or_path="/gone/away")
    more = [*ASKED, f"run_dir={tmp_path}/out"]
    with pytest.raises(MissingFileError, match="the base of .*adapter, '/gone/away' .* is not there; give model.path="):
        evaluate_path(str(adapter), more)
    evaluate_path(str(adapter), [*more, f"model.path={tmp_path}/moved"])
    assert json.loads((tmp_path / "out" / "results.json").read_text())["scores"]["tiny_grammar"]["tuned"] is not None


@pytest.fixture
def unloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loramoe_train.models.loading.load_model", lambda *_, **__: pytest.fail("a model was loaded"))
    monkeypatch.setattr(
        "loramoe_train.models.load_model", lambda *_, **__: pytest.fail("a model was loaded"), raising=False
    )


def changed_config(**changes: Any) -> Callable[[Path], Any]:
    return lambda folder: edit(folder, **changes)


def pickled(folder: Path) -> None:
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")


def reshaped(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    save_file({name: t[:, 1:].contiguous() if "lora_A" in name else t for name, t in load_file(path).items()}, path)


def renamed(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    save_file({name.replace("q_proj", "q_porj"): tensor for name, tensor in load_file(path).items()}, path)


PEFT_REFUSED: dict[str, tuple[Callable[[Path], Any], type[LoramoeError], str]] = {
    "pickle": (pickled, MissingFileError, "holds only adapter_model.bin, a pickle file, which is never opened"),
    "kind": (changed_config(peft_type="IA3"), ConfigError, "peft_type is 'IA3'"),
    "bias": (changed_config(bias="all"), ConfigError, "bias='all'"),
    "whole modules": (changed_config(modules_to_save=["lm_head"]), ConfigError, "modules_to_save="),
    "pissa": (changed_config(init_lora_weights="pissa"), ConfigError, "init_lora_weights='pissa'"),
    "new": (changed_config(use_new=True), ConfigError, "the setting use_new=True is not known here"),
    "task": (changed_config(task_type="SEQ_CLS"), ConfigError, "task_type=SEQ_CLS is no causal language model"),
    "huge rank": (changed_config(r=1 << 40), DataError, "lora_A .* but adapter_config.json says rank"),
    "no base": (changed_config(base_model_name_or_path=None), ConfigError, "does not name its base"),
    "base gone": (changed_config(base_model_name_or_path="../gone"), MissingFileError, "'../gone' .* is not there"),
    "hub, offline": (
        changed_config(base_model_name_or_path="somebody/something"),
        MissingFileError,
        "the base of .* is not at hand: model.name=somebody/something: config.json is not in the hub cache",
    ),
    "other names": (renamed, ConfigError, "made for another base: model has no module .*q_porj.*q_proj"),
    "other sizes": (reshaped, ConfigError, "made for another base: its model.layers.0.self_attn.q_proj is"),
    "no tasks": (lambda folder: None, ConfigError, "says nothing about benchmarks; give eval.tasks=.*tiny_math"),
}


@pytest.mark.parametrize("case", PEFT_REFUSED)
def test_peft_refusals_come_before_a_model_is_loaded(case, adapter, tmp_path, unloaded):
    change, kind, words = PEFT_REFUSED[case]
    change(adapter)
    asked = () if case == "no tasks" else ASKED
    with pytest.raises(kind, match=words) as caught:
        evaluate_path(str(adapter), [*asked, f"run_dir={tmp_path}/out"])
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


def test_dora_weights_need_a_config_that_says_so(make_adapter, tmp_path, unloaded):
    folder = edit(Path(shutil.copytree(make_adapter("dora"), tmp_path / "dora")), use_dora=False)
    with pytest.raises(ConfigError, match="lora_magnitude_vector is DoRA"):
        read_peft_config(folder, allowed=("use_dora",))


PATHS: dict[str, tuple[str, tuple[str, ...], type[LoramoeError], str]] = {
    "missing": ("runz", ASKED, MissingFileError, "there is no runz; did you mean 'runs'"),
    "missing below": ("no/such/folder", ASKED, MissingFileError, "there is no no/such/folder"),
    "hub, offline": (
        "runs/on",
        ASKED,
        MissingFileError,
        "no runs/on; did you mean 'one'.*nor can it be had",
    ),
    "a file": ("file.txt", ASKED, ConfigError, "is a file; give its folder"),
    "nothing in it": ("runs", ASKED, MissingFileError, "holds no adapter.json .* did you mean runs/one"),
    "not ended": ("begun", ASKED, MissingFileError, "is a run that has not ended, and has no checkpoint yet"),
    "stopped": ("stopped", ASKED, MissingFileError, "has not ended; give .* stopped/checkpoints/step_000002"),
    "no tasks": ("runs/one", ("data.root=x",), ConfigError, "runs/one says nothing about benchmarks"),
    "unknown task": (
        "runs/one",
        ("eval.tasks=[tiny_mat]",),
        ConfigError,
        "'tiny_mat' is no known benchmark",
    ),
    "no data": (
        "runs/one",
        ("eval.tasks=[gsm8k]", "data.root=x"),
        MissingFileError,
        "x/gsm8k/test.jsonl is not there",
    ),
    "too long": ("runs/one", (*ASKED, "eval.max_length=99999"), ConfigError, "more than the model's"),
    "unknown key": ("runs/one", (*ASKED, "trainer.lr=1"), ConfigError, "unknown key trainer"),
    "misspelt key": ("runs/one", (*ASKED, "eval.limt=1"), ConfigError, "unknown key eval.limt=1; did you mean 'limit'"),
    "pickle": ("pickle", ASKED, MissingFileError, "pytorch_model.bin, a pickle file, which is never opened"),
}


@pytest.mark.parametrize("case", PATHS)
def test_what_lies_there_decides(case, tmp_path, monkeypatch, unloaded):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(TINY, tmp_path / "runs" / "one")
    for place in ("stopped/checkpoints/step_000001", "stopped/checkpoints/step_000002", "begun", "pickle"):
        (tmp_path / place).mkdir(parents=True)
    for place in ("stopped/checkpoints/step_000001", "stopped/checkpoints/step_000002"):
        (tmp_path / place / "adapter.json").write_text("{}")
    (tmp_path / "begun" / "config.resolved.yaml").write_text("seed: 0\n")
    (tmp_path / "file.txt").write_text("x")
    shutil.copy(TINY / "config.json", tmp_path / "pickle")
    (tmp_path / "pickle" / "pytorch_model.bin").write_bytes(b"x")
    path, asked, kind, words = PATHS[case]
    with pytest.raises(kind, match=words) as caught:
        evaluate_path(path, asked)
    assert "\n" not in str(caught.value) and not (tmp_path / "outputs").exists()


def test_places_of_results_differ_and_last(tmp_path):
    def place(name: str, path: Path | None, *more: str) -> str:
        return evaluating._place(evaluating._config({"name": name}, name, [*ASKED, *more]), path).as_posix()

    one, two = place("a", tmp_path / "x" / "a"), place("a", tmp_path / "y" / "a")
    assert one != two and one == place("a", tmp_path / "x" / ".." / "x" / "a") and one.startswith("outputs/eval/a-")
    assert place("o/a", None) != place("o/a", None, "model.revision=v2") and "/a-" in place("o/a", None)
    assert place("o/a", None, "run_dir=mine") == "mine"
