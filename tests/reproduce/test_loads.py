"""Routers' loads: read from logs by hand-computed numbers, put into cells, and what is wrong with them told."""

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest

from loramoe_train.errors import ConfigError, DataError
from loramoe_train.reproduce.compare import compare
from loramoe_train.reproduce.folder import find
from loramoe_train.reproduce.loads import HELD_OUT, TRAINING, last_record, mean_share, share, shares
from loramoe_train.reproduce.outcome import MEASURED, NOT_RUN, Outcome, outcome
from loramoe_train.reproduce.schema import PaperTable
from loramoe_train.reproduce.show import as_csv, as_latex, as_markdown, cell_text
from tests.reproduce.made import finished, scores, table

LAYERS = {
    "model.layers.0": {"a": [1.0, 0.0], "b": [0.25, 0.25]},  # weights need not add up to one
    "model.layers.1": {"a": [0.5, 0.5], "b": [0.0, 0.0]},  # no token of b came by
    "model.layers.2": {"a": [1.0], "b": [1.0]},  # fewer experts: another question
}
PLACES = {
    "a": {"load": {"take": "largest", "task": "math"}, "ours": "top 2"},
    "b": {"load": {"take": "smallest"}},
    "c": {"benchmark": "tiny_math"},
}


def line(kind: str, layers: Any) -> str:
    return json.dumps({"kind": kind, "step": 1, "stage": "routers", "sites": {}, "layers": layers})


def write_log(folder: Path, *lines: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(f"{text}\n" for text in lines))


def test_shares_are_means_over_layers_and_tasks() -> None:
    found = shares({"layers": LAYERS})
    assert found == {"a": pytest.approx([75.0, 25.0]), "b": pytest.approx([50.0, 50.0])}
    assert mean_share(found) == pytest.approx([62.5, 37.5])
    record = {"layers": LAYERS}
    assert share(record, "a", "largest") == pytest.approx(75.0) and share(record, "a", "smallest") == pytest.approx(
        25.0
    )
    assert share(record, None, "largest") == pytest.approx(62.5) and share(record, "b", "largest") == pytest.approx(
        50.0
    )


def test_the_mean_over_tasks_is_taken_before_the_largest() -> None:
    """Experts that serve a task each are evenly loaded as a whole."""
    record = {"layers": {"model.layers.0": {"a": [0.9, 0.1], "b": [0.1, 0.9]}}}
    assert share(record, None, "largest") == pytest.approx(50.0) and share(record, "b", "largest") == pytest.approx(
        90.0
    )


def test_the_newest_record_of_held_out_examples_is_read(tmp_path: Path) -> None:
    old, new = {"l.0": {"a": [0.5, 0.5]}}, {"l.0": {"a": [0.9, 0.1]}}
    training = line(TRAINING, {"l.0": {"a": [0.2, 0.8]}})
    write_log(tmp_path, line(HELD_OUT, old), line(HELD_OUT, new), training)
    assert last_record(tmp_path)["layers"] == new
    write_log(tmp_path, training)
    with pytest.raises(DataError, match="has no routing of held-out examples"):
        last_record(tmp_path)
    assert last_record(tmp_path, (HELD_OUT, TRAINING))["kind"] == TRAINING


@pytest.mark.parametrize(
    "text",
    [
        '{"kind": "eval_routing", "lay',
        '{"kind": "eval_routing"}',
        line(HELD_OUT, []),
        line(HELD_OUT, {"l.0": {"a": [0.5, None]}}),
        line(HELD_OUT, {"l.0": {"a": [0.5, 1.5]}}),
        line(HELD_OUT, {"l.0": {"a": []}}),
        line(HELD_OUT, {"l.0": {"a": [float("nan"), 0.5]}}),
    ],
)
def test_a_damaged_record_is_told(tmp_path: Path, text: str) -> None:
    write_log(tmp_path, line(HELD_OUT, LAYERS), text)
    with pytest.raises(DataError, match="metrics.jsonl is damaged: "):
        last_record(tmp_path)


def test_a_log_that_is_not_there_and_a_task_that_is_not(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="metrics.jsonl cannot be read"):
        last_record(tmp_path)
    with pytest.raises(DataError, match="no task 'maht'; did you mean 'math'"):
        share({"layers": {"l.0": {"math": [0.5, 0.5]}}}, "maht", "largest")
    with pytest.raises(DataError, match="no layer in which anything was decided"):
        share({"layers": {}}, None, "largest")


def loaded() -> PaperTable:
    """A table with two loads and a benchmark; mola's numbers are the paper's."""
    values = table().model_dump(exclude_unset=True)
    values["scales"]["paper"]["columns"] = PLACES
    values["columns"]["b"].pop("not_comparable")
    values["numbers"][0]["rows"] = {"mola": {"a": 80.0, "b": {"low": 15.0, "high": 18.0}}}
    return PaperTable(**values)


def made(root: Path, loads: dict[str, list[float] | None], **more: Any) -> Outcome:
    """Runs as `method/seed` -> what the two experts get of math; of the other task both get half."""
    sweep = finished(root, {f"tiny/{m}/all/{seed}": scores(0.5, base=0.1) for m, seed in (k.split("/") for k in loads)})
    for key, weights in loads.items():
        method, seed = key.split("/")
        lines = [] if weights is None else [line(HELD_OUT, {"l.0": {"math": weights, "code": [0.5, 0.5]}})]
        write_log(sweep.root / f"tiny/{method}/all/{seed}", line("train", {}), *lines)
    return outcome(loaded(), "paper", find(root), **more)


def cells(found: Outcome, method: str) -> dict:
    return {cell.column: cell for cell in found.cells["tiny"][method]}


RUNS = {"lora/0": None, "mola/0": [0.9, 0.1], "mola/1": [0.3, 0.7]}


def test_cells_of_loads(tmp_path: Path) -> None:
    found = made(tmp_path, RUNS)
    mola = cells(found, "mola")
    assert mola["a"].status == MEASURED and mola["a"].scores == pytest.approx({0: 90.0, 1: 70.0})
    assert mola["a"].mean == pytest.approx(80.0) and mola["a"].difference == pytest.approx(0.0)
    assert [run.id for run in mola["a"].runs] == ["sweep-1/tiny/mola/all/0", "sweep-1/tiny/mola/all/1"]
    assert mola["b"].scores == pytest.approx({0: 30.0, 1: 40.0})  # (0.1 + 0.5) / 2 and (0.3 + 0.5) / 2
    assert mola["c"].scores == pytest.approx({0: 50.0, 1: 50.0})
    assert mola["mean"].scores == pytest.approx({0: 60.0, 1: 55.0})
    assert cell_text(mola["a"]) == "80.0 ± 14.1 (paper 80: +0.0, within noise)"
    assert cell_text(mola["b"]) == "35.0 ± 7.1 (paper 15-18)"


def test_runs_without_a_load_say_why(tmp_path: Path) -> None:
    found = made(tmp_path, RUNS)
    lora, base = cells(found, "lora"), cells(found, "base")
    assert lora["a"].status == NOT_RUN and lora["a"].mean is None and lora["c"].status == MEASURED
    assert "sweep-1/tiny/lora/all/0: " in lora["a"].why and "the run has no routers" in lora["a"].why
    assert base["a"].status == NOT_RUN and base["a"].why == "the untuned base has no routers"
    assert base["c"].scores == pytest.approx({0: 10.0})
    assert cells(outcome(loaded(), "paper", []), "mola")["a"].why == "no run was started"


def test_a_run_that_is_not_done_has_no_load_yet(tmp_path: Path) -> None:
    made(tmp_path, RUNS)
    (tmp_path / "sweep-1/tiny/mola/all/1/results.json").unlink()
    cell = cells(outcome(loaded(), "paper", find(tmp_path)), "mola")["a"]
    assert cell.scores == pytest.approx({0: 90.0})


def test_loads_of_other_versions_are_refused_or_marked(tmp_path: Path) -> None:
    made(tmp_path, {**RUNS, "mola/2": [0.9, 0.1]})
    path = tmp_path / "sweep-1/tiny/mola/all/0/results.json"
    content = json.loads(path.read_text())
    content["scores"], content["versions"]["transformers"] = {}, "4.0"
    path.write_text(json.dumps(content))
    with pytest.raises(
        ConfigError, match="largest expert's share of math cannot be compared: .*transformers is 4.0 in"
    ):
        outcome(loaded(), "paper", find(tmp_path))
    marked = cells(outcome(loaded(), "paper", find(tmp_path), mark=True), "mola")
    assert marked["a"].odd and marked["b"].odd and not marked["c"].odd
    content["versions"] |= {"transformers": "5.23.0", "lm_eval": "0.3"}  # which takes no part in a load
    path.write_text(json.dumps(content))
    assert not cells(outcome(loaded(), "paper", find(tmp_path)), "mola")["a"].odd


def test_loads_are_compared_over_seeds_alone_and_are_not_better(tmp_path: Path) -> None:
    loads = {f"{m}/{s}": [w + s / 100, 1 - w - s / 100] for m, w in (("lora", 0.5), ("mola", 0.8)) for s in (0, 1, 2)}
    found = made(tmp_path, loads)
    rows = {row.column: row for row in compare(found, "tiny")}
    assert rows["a"].p_value is None and rows["a"].seeds == 3 and rows["a"].difference == pytest.approx(30.0)
    assert rows["a"].verdict == "larger" and rows["b"].verdict == "smaller"
    assert "a load, which no document has: tested over seeds alone" in rows["a"].line(found)


def test_loads_in_every_format(tmp_path: Path) -> None:
    found = made(tmp_path, RUNS)
    assert "- A: paper exact match; here largest expert's share of math, top 2" in as_markdown(found).splitlines()
    assert r"35.0 $\pm$ 7.1 (paper 15-18)" in as_latex(found)
    rows = {(row["method"], row["column"]): row for row in csv.DictReader(io.StringIO(as_csv(found)))}
    assert rows["mola", "b"]["our rule"] == "smallest expert's share of all tasks"
    assert float(rows["mola", "b"]["mean"]) == pytest.approx(35.0) and rows["lora", "b"]["mean"] == ""


@pytest.mark.parametrize(
    ("place", "words"),
    [
        ({}, "give exactly one of benchmark and load"),
        ({"benchmark": "tiny_math", "load": {"take": "largest"}}, "give exactly one of benchmark and load"),
        ({"load": {"take": "most"}}, "'largest' or 'smallest'"),
        ({"load": {"task": "math"}}, "Field required"),
        ({"load": {"take": "largest", "expert": 1}}, "Extra inputs are not permitted"),
        ({"load": {"take": "largest"}, "train": "some"}, "names 'some'"),
    ],
)
def test_a_place_that_is_none_is_refused(place: dict, words: str) -> None:
    values = table().model_dump(exclude_unset=True)
    values["scales"]["paper"]["columns"] = {"a": place}
    with pytest.raises(ValueError, match=words):
        PaperTable(**values)
