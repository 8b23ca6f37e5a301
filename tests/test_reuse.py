"""An evaluation that was interrupted goes on: what is finished is not asked again, and the end is the same."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from loramoe_train import scoring
from loramoe_train.build import attach
from loramoe_train.errors import DataError, MissingFileError
from loramoe_train.experts.adapters import MANIFEST, WEIGHTS, save_adapter
from loramoe_train.files import sha256, write_json
from loramoe_train.models import base_identity, load_model
from loramoe_train.reuse import evaluate_folder
from loramoe_train.run import train_run
from loramoe_train.settle import settle
from loramoe_train.site_plan import plan_sites
from loramoe_train.validation import domains_of
from tests.composing import composed
from tests.recipe_runs import QUICK

TASKS = ["tiny_grammar", "tiny_facts"]
ASKED = ("eval.limit=4", f"eval.tasks=[{','.join(TASKS)}]")
UNITS = [(name, side) for name in TASKS for side in ("tuned", "base")]


class Killed(Exception):
    """Stands for a signal that ends the process at once."""


class Scored(list[tuple[str, str]]):
    """Every unit that is scored. The process ends when the unit of number `kill_at` is to be written; 0: never."""

    kill_at = 0


@pytest.fixture
def units(monkeypatch: pytest.MonkeyPatch) -> Scored:
    """What is scored from here on."""
    seen, write = Scored(), scoring.write_unit

    def counted(folder: Path, side: Any, result: Any, *args: Any, **options: Any) -> None:
        seen.append((result.name, side))
        if len(seen) == seen.kill_at:
            raise Killed
        write(folder, side, result, *args, **options)

    monkeypatch.setattr(scoring, "write_unit", counted)
    return seen


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA that changes every answer, as a run leaves it. Read it only."""
    config = composed("+recipe=lora", "experts.rank=2")
    model, domains = load_model(config.model), domains_of(config)
    routed = attach(config, model, plan_sites(config, model, domains, ()), num_domains=len(domains))
    torch.manual_seed(0)
    for layer in routed.layers.values():
        layer.bank.up.data.normal_(0, 0.3)
    facts = {"base": base_identity(config.model), "tasks": config.data.tasks, "domains": domains}
    folder = tmp_path_factory.mktemp("adapter")
    save_adapter(folder, routed.tensors(), routed.plan, facts | {"config": config.plain()})
    return folder


@pytest.fixture
def copied(adapter: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(adapter, tmp_path / "adapter"))


@pytest.fixture(scope="module")
def whole(adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An evaluation that nothing interrupted. Read it only."""
    out = tmp_path_factory.mktemp("whole")
    evaluate_folder(adapter, [*ASKED, f"run_dir={out}"])
    return out


def change_weights(folder: Path) -> None:
    weights = load_file(folder / WEIGHTS)
    save_file({name: tensor * 0.5 for name, tensor in weights.items()}, folder / WEIGHTS)
    manifest = json.loads((folder / MANIFEST).read_text())
    write_json(folder / MANIFEST, manifest | {"weights_sha256": sha256(folder / WEIGHTS)})


def results(folder: Path) -> dict[str, Any]:
    """results.json without what the clock and the place decide."""
    found = json.loads((folder / "results.json").read_text())
    for entry in found["scores"].values():
        entry.pop("seconds")
    return {key: value for key, value in found.items() if key not in ("wall_seconds", "adapter", "config_hash")}


def samples(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (folder / "samples").glob("*.jsonl")}


@pytest.mark.parametrize("number", [1, 4])
def test_what_is_finished_is_not_asked_again_and_the_end_is_the_same(copied, whole, units, number):
    units.kill_at = number
    with pytest.raises(Killed):
        evaluate_folder(copied, ASKED)
    assert units == UNITS[:number] and not (copied / "results.json").exists()
    units.clear()
    units.kill_at = 0
    evaluate_folder(copied, ASKED)
    assert units == UNITS[number - 1 :]
    assert results(copied) == results(whole) and samples(copied) == samples(whole)
    assert len(samples(copied)) == len(UNITS)


def test_what_decides_a_score_decides_whether_it_is_asked_again(copied, units):
    evaluate_folder(copied, ASKED)
    first = results(copied)
    for more, again in [
        ([], []),
        (["eval.batch_size=3", "eval.save_samples=false"], []),
        (["eval.again=true"], UNITS),
        (["eval.limit=3"], UNITS),
        (["eval.limit=3", "seed=5"], UNITS),
    ]:
        units.clear()
        evaluate_folder(copied, [*ASKED, *more])
        assert units == again, more
        if not more:
            assert results(copied) == first
    assert {entry["n"] for entry in results(copied)["scores"].values()} == {3}
    units.clear()
    change_weights(copied)
    manifest = json.loads((copied / MANIFEST).read_text())
    evaluate_folder(copied, [*ASKED, "eval.limit=3", "seed=5"])
    assert units == [unit for unit in UNITS if unit[1] == "tuned"], "the base is the same"
    units.clear()
    manifest["sites"][0]["scales"] = [9.0]
    write_json(copied / MANIFEST, manifest)
    evaluate_folder(copied, [*ASKED, "eval.limit=3", "seed=5"])
    assert units == [unit for unit in UNITS if unit[1] == "tuned"], "another scale with the same weights"


def test_scores_of_other_weights_do_not_stay_beside_new_ones(adapter, tmp_path):
    """Two adapters into one folder; the first's benchmark stays only as long as its weights do."""
    other = Path(shutil.copytree(adapter, tmp_path / "other"))
    change_weights(other)
    out = f"run_dir={tmp_path}/out"
    for folder, task, names in [(adapter, 0, [0]), (adapter, 1, [0, 1]), (other, 1, [1])]:
        evaluate_folder(folder, ["eval.limit=2", f"eval.tasks=[{TASKS[task]}]", out])
        assert list(results(tmp_path / "out")["scores"]) == [TASKS[name] for name in names]


def test_results_that_cannot_be_read_are_told_before_anything_is_loaded(copied, monkeypatch):
    monkeypatch.setattr("loramoe_train.run.load_model", lambda *_, **__: pytest.fail("a model was loaded"))
    (copied / "results.json").write_text('{"scores": {')
    with pytest.raises(DataError, match="is not a readable results file .*; evaluate again, after removing it"):
        evaluate_folder(copied, ASKED)


def test_without_samples_paired_errors_are_the_same(copied, whole, units):
    units.kill_at = 2
    with pytest.raises(Killed):
        evaluate_folder(copied, [*ASKED, "eval.save_samples=false"])
    units.kill_at = 0
    evaluate_folder(copied, [*ASKED, "eval.save_samples=false"])
    assert results(copied) == results(whole) and not samples(copied)


def test_scores_say_what_they_were_made_with(whole):
    for name, entry in results(whole)["scores"].items():
        made = entry["made_with"]
        assert made["task"]["limit"] == 4 and made["seed"] == 0 and len(made["task"]["definition_sha256"]) == 64
        assert made["versions"]["lm_eval"] and made["commit"] == dict.fromkeys(
            ("tuned", "base"), results(whole)["commit"]
        )
        base, tuned = made["model"]["base"], made["model"]["tuned"]
        assert base["base"]["name"] == "tiny" and len(base["base"]["weights_sha256"]) == 64
        assert base.items() < tuned.items() and len(tuned["adapter_sha256"]) == 64
        low, high = entry["difference_interval"]
        assert low <= entry["difference"] <= high and 0 <= entry["p_value"] <= 1, name


def test_a_score_names_the_commit_that_it_was_made_at(copied, units, monkeypatch):
    monkeypatch.setattr("loramoe_train.evaluation.units.commit", lambda: "older")
    units.kill_at = 3
    with pytest.raises(Killed):
        evaluate_folder(copied, ASKED)
    monkeypatch.undo()
    evaluate_folder(copied, ASKED)
    found = results(copied)
    now = found["commit"]
    assert found["scores"][TASKS[0]]["made_with"]["commit"] == {"tuned": "older", "base": "older"}
    assert found["scores"][TASKS[1]]["made_with"]["commit"] == {"tuned": now, "base": now}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"path": "/gone/away"}, "model.path=/gone/away: there is no such folder"),
        ({"name": "o/n"}, "o/n: config.json is not"),
    ],
)
def test_a_base_that_is_absent_is_told_before_anything_is_loaded(copied, change, words, monkeypatch):
    monkeypatch.setattr("loramoe_train.run.load_model", lambda *_, **__: pytest.fail("a model was loaded"))
    manifest = json.loads((copied / MANIFEST).read_text())
    manifest["config"]["model"].update(change)
    write_json(copied / MANIFEST, manifest)
    with pytest.raises(MissingFileError, match=words):
        evaluate_folder(copied, ASKED)


def test_training_that_ended_in_its_evaluation_goes_on_there(tmp_path, units):
    run_dir = tmp_path / "run"
    tasks = ("trainer.max_steps=2", "trainer.checkpoint_every=1", "eval.enabled=true", *ASKED)
    config = composed("+recipe=lora", *QUICK, *tasks, f"run_dir={run_dir}")
    units.kill_at = 3
    with pytest.raises(Killed):
        train_run(config, settle(config))
    units.clear()
    units.kill_at = 0
    config = config.model_copy(update={"resume": "auto"})
    train_run(config, settle(config))
    assert units == UNITS[2:]
    assert list(results(run_dir)["scores"]) == TASKS
    (header,) = (line for line in map(json.loads, (run_dir / "metrics.jsonl").open()) if line["kind"] == "run")
    assert (
        header["step"] == 0 and header["versions"] == results(run_dir)["versions"] and len(header["config_hash"]) == 64
    )
    stored = json.loads((run_dir / MANIFEST).read_text())
    assert stored["commit"] == results(run_dir)["commit"]
    assert yaml.safe_load((run_dir / "config.resolved.yaml").read_text())["eval"]["again"] is False


def test_a_wish_to_score_again_is_not_kept(copied, units):
    evaluate_folder(copied, ASKED)
    manifest = json.loads((copied / MANIFEST).read_text())
    manifest["config"]["eval"]["again"] = True
    write_json(copied / MANIFEST, manifest)
    units.clear()
    evaluate_folder(copied, ASKED)
    assert not units
