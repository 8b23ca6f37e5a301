"""`loramoe-compare` on folders as evaluations leave them: what it finds, how it reads, what it refuses."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from loramoe_train.errors import ConfigError, DataError, LoramoeError, MissingFileError
from loramoe_train.evaluation.compare_runs import as_json, as_markdown, compare_runs, show
from loramoe_train.evaluation.comparison import paired_score
from loramoe_train.evaluation.results import write_results
from loramoe_train.evaluation.types import BenchmarkResult
from loramoe_train.evaluation.units import facts_of, write_unit
from tests.cli import check_refused, run_cli

TASK = {"definition_sha256": "d", "limit": None, "num_fewshot": 0, "chat_template": False, "data": {"test": "x"}}
RIGHT = [1.0] * 10 + [0.0] * 10
BETTER = [1.0] * 19 + [0.0]  # gains 9, loses none


def make_result(name: str, values: list, **changes: Any) -> BenchmarkResult:
    words = changes.pop("words", "p")
    score = changes.pop("score", sum(values) / len(values))
    samples = [
        {
            "doc_id": i,
            "doc": {"q": i},
            "prompt": f"{words}{i}",
            "target": 1,
            "metrics": {"acc,none": value, "x,none": 1},
        }
        for i, value in enumerate(values)
    ]
    plain = dict(metrics={"acc,none": score, "x,none": 1}, stderrs={"acc,none": 0.1, "x,none": 0.0}, n=len(values))
    plain |= dict(num_fewshot=0, fewshot_seed=None, version="1.0", seconds=2.5, truncated=0, samples=samples)
    return BenchmarkResult(**{**plain, "name": name, "metric": "acc,none", "score": score, "stderr": 0.1, **changes})


def write(
    folder: Path, sides: dict[str, dict[str, list]], *, save_samples: bool = False, task: Any = TASK, **changes: Any
) -> Path:
    """A folder with results, of {side: {benchmark: values of its documents}}."""
    made = {side: {n: make_result(n, values, **changes) for n, values in of.items()} for side, of in sides.items()}
    for side, results in made.items():
        for result in results.values():
            facts = facts_of(task, {"weights": str(folder)}, 0)
            write_unit(folder / "samples", side, result, facts, save_samples=save_samples)
    names = dict.fromkeys(name for results in made.values() for name in results)
    scores = {name: paired_score(*(made.get(side, {}).get(name) for side in ("tuned", "base"))) for name in names}
    write_results(
        folder / "results.json", scores=scores, skipped={}, config=None, seed=0, model="tiny", wall_seconds=1.0
    )
    return folder


@pytest.fixture
def a(tmp_path):
    return write(tmp_path / "a", {"tuned": {"cola": RIGHT, "sst2": RIGHT}, "base": {"cola": RIGHT, "sst2": BETTER}})


@pytest.fixture
def b(tmp_path):
    return write(tmp_path / "b", {"tuned": {"sst2": RIGHT[::-1], "cola": BETTER, "rte": RIGHT}})


def test_two_runs_by_hand(a, b):
    cola, sst2 = compare_runs(a, b).rows
    assert (cola.benchmark, cola.n, cola.first, cola.second) == ("cola", 20, 0.5, 0.95)
    assert cola.p_value == pytest.approx(2 / 2**9) and cola.p_holm == pytest.approx(4 / 2**9)
    assert cola.differing == tuple(range(10, 19)) and cola.low < 0.45 < cola.high and cola.verdict == "B is better"
    assert (sst2.difference, sst2.p_value, sst2.p_holm, len(sst2.differing)) == (0, 1, 1, 20)
    assert sst2.verdict == "within noise"
    assert compare_runs(a, b).notes == (f"only in {b} (tuned): rte",)
    turned = {row.benchmark: row for row in compare_runs(b, a).rows}["cola"]
    assert turned.verdict == "A is better" and turned.difference == -cola.difference
    assert (turned.low, turned.high) == pytest.approx((-cola.high, -cola.low), abs=0.051)  # a document is 0.05


def test_one_run_is_its_base_and_its_tuned(a):
    cola, sst2 = compare_runs(a).rows
    assert (cola.first, cola.second, cola.p_value) == (0.5, 0.5, 1.0)
    assert (sst2.first, sst2.second, sst2.verdict) == (0.95, 0.5, "A is better")
    stored = json.loads((a / "results.json").read_text())["scores"]["sst2"]
    assert stored["p_value"] == sst2.p_value and stored["difference_interval"] == [sst2.low, sst2.high]


def test_a_base_alone_is_compared_with_what_was_tuned(a, tmp_path):
    plain = write(tmp_path / "plain", {"base": {"cola": BETTER}})
    found = compare_runs(plain, a)
    assert (found.first.side, found.second.side) == ("base", "tuned") and found.rows[0].first == 0.95
    with pytest.raises(ConfigError, match="has no tuned scores"):
        compare_runs(plain)


def test_holm_counts_the_rows(tmp_path):
    """One gain of 9 documents is 0.0039; among 20 benchmarks it is 0.078, and noise."""
    names = [f"task{number}" for number in range(20)]
    one = write(tmp_path / "one", {"tuned": dict.fromkeys(names, RIGHT)})
    two = write(tmp_path / "two", {"tuned": {name: RIGHT for name in names[1:]} | {"task0": BETTER}})
    row = compare_runs(one, two).rows[0]
    assert row.p_value < 0.05 < row.p_holm == pytest.approx(20 * row.p_value) and row.verdict == "within noise"


def test_all_metrics(a, b):
    found = compare_runs(a, b, metrics="all").rows
    keys = [(row.benchmark, row.metric) for row in found]
    assert keys == [(name, metric) for name in ("cola", "sst2") for metric in ("acc,none", "x,none")]


def test_a_metric_that_is_no_mean_is_not_tested(a, tmp_path):
    other = write(tmp_path / "other", {"tuned": {"cola": RIGHT}}, score=0.123)
    (row,) = compare_runs(a, other).rows
    assert (row.second, row.p_value, row.p_holm, row.low, row.verdict) == (0.123, None, None, None, "not tested")
    assert "not tested" in as_markdown(compare_runs(a, other))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"task": TASK | {"limit": 20}}, "limit is None in .*a .tuned. and 20 in "),
        ({"task": TASK | {"definition_sha256": "e"}}, "definition_sha256 is d"),
        ({"task": TASK | {"chat_template": True}}, "chat_template is False"),
        ({"version": "2.0"}, "version is 1.0 in"),
        ({"fewshot_seed": 3}, "fewshot_seed is None"),
        ({"words": "Q: "}, "document 0 of .* is another one, or was asked with another prompt"),
    ],
)
def test_what_was_asked_differently_is_refused(a, tmp_path, change, words):
    other = write(tmp_path / "other", {"tuned": {"cola": BETTER}}, **change)
    with pytest.raises(ConfigError, match=f"cola cannot be compared: .*{words}"):
        compare_runs(a, other)


def test_fewer_documents_are_refused(a, tmp_path):
    with pytest.raises(ConfigError, match="cola cannot be compared: documents is 20 in"):
        compare_runs(a, write(tmp_path / "other", {"tuned": {"cola": RIGHT[:4]}}))


def test_another_harness_is_refused_and_another_torch_is_said(a, b):
    for name, fatal in (("lm_eval", True), ("torch", False)):
        path = b / "samples" / "cola.tuned.json"
        before = path.read_text()
        record = json.loads(before)
        record["facts"]["versions"][name] = "0.0.1"
        path.write_text(json.dumps(record))
        if fatal:
            with pytest.raises(ConfigError, match="lm_eval version is .* in .* and 0.0.1"):
                compare_runs(a, b)
        else:
            assert any(note.startswith("torch is ") and "0.0.1 in B" in note for note in compare_runs(a, b).notes)
        path.write_text(before)


def test_bad_input_is_one_line(a, b, tmp_path):
    cases: list[tuple[Any, type[LoramoeError], str]] = [
        ((a, a), ConfigError, "are the same run"),
        ((a, a / ".." / "a"), ConfigError, "are the same run"),
        ((a, tmp_path / "bb"), MissingFileError, "there is no folder .*bb; did you mean 'b'"),
        ((a / "samples",), MissingFileError, "results.json is not there"),
        ((a, write(tmp_path / "c", {"tuned": {"rte": RIGHT}})), ConfigError, "no benchmark in common: cola, sst2; rte"),
    ]
    for arguments, kind, words in cases:
        with pytest.raises(kind, match=words) as caught:
            compare_runs(*arguments)
        assert "\n" not in str(caught.value)
    record = b / "samples" / "cola.tuned.json"
    whole = record.read_text()
    record.write_text(whole.replace('"doc_id": 7', '"doc_id" 7'))
    with pytest.raises(DataError, match=rf"{record}:\d+ is not JSON"):
        compare_runs(a, b)
    record.write_text(whole.replace('"score": 0.95', '"score": 0.9'))
    with pytest.raises(DataError, match="cola scores 0.9 in .*0.95 in results.json; an evaluation was interrupted"):
        compare_runs(a, b)
    record.unlink()
    with pytest.raises(MissingFileError, match="holds a score of cola, but not its documents"):
        compare_runs(a, b)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["x", "y", "z"], "one folder or two, got 3"),
        ([], "one folder or two, got 0"),
        (["x", "form=json"], "unknown key form; did you mean 'format'"),
        (["x", "format=latex"], "format=latex: must be one of text, markdown, json"),
        (["x", "metrics=acc"], "metrics=acc: must be one of headline, all"),
    ],
)
def test_arguments(arguments, words):
    with pytest.raises(ConfigError, match=words):
        show(arguments)


def test_the_command(a, b):
    done = run_cli("compare", str(a), str(b), cwd=a.parent)
    assert done.returncode == 0 and "B is better" in done.stdout, done.stderr
    check_refused(run_cli("compare", str(a), str(a), cwd=a.parent), 2, "are the same run")
    check_refused(run_cli("eval", "nowhere", cwd=a.parent), 3, "there is no nowhere")


def test_how_it_reads(a, b, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    show([str(a), str(b)])
    text = capsys.readouterr().out
    (line,) = (line for line in text.splitlines() if " cola " in line)
    for words in ("50.0", "95.0", "+45.0", "+25.0 to +65.0", "0.004", "0.008", "B is better"):
        assert words in line, line
    assert "within noise" in text and "Holm: corrected for the 2 rows" in text and "only in" in text
    show([str(a), str(b), "format=markdown"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].count("---") == 12 and {line.count("|") for line in lines[:4]} == {13}
    show([str(a), str(b), "format=json", "metrics=all"])
    found = json.loads(capsys.readouterr().out)
    assert found["rows"][0]["differing"] == list(range(10, 19)) and found["a"]["side"] == "tuned"
    assert found["made_with"]["b"]["cola"]["versions"]["lm_eval"]
    assert math.isclose(found["rows"][0]["p_value"], 2 / 2**9) and as_json(compare_runs(a, b)) != text
