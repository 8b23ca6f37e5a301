"""Methods side by side, from made-up documents: paired over documents and seeds, and noise called noise."""

from pathlib import Path

import pytest

from loramoe_train.evaluation.types import BenchmarkResult
from loramoe_train.evaluation.units import SAMPLES, facts_of, write_unit
from loramoe_train.reproduce.compare import Compared, compare
from loramoe_train.reproduce.folder import find
from loramoe_train.reproduce.outcome import outcome
from tests.reproduce.made import finished, given, scores, table

RIGHT = [1.0] * 10 + [0.0] * 10
BETTER = [1.0] * 19 + [0.0]  # gains 9, loses none


def documents(folder: Path, values: list[float], words: str = "p") -> None:
    """What an evaluation of tiny_math leaves beside its score."""
    samples = [
        {"doc_id": i, "doc": {"q": i}, "prompt": f"{words}{i}", "target": 1, "metrics": {"acc,none": value}}
        for i, value in enumerate(values)
    ]
    mean = sum(values) / len(values)
    plain = {"metrics": {"acc,none": mean}, "stderrs": {"acc,none": 0.1}, "n": len(values), "num_fewshot": 0}
    more = {"fewshot_seed": None, "version": "1.0", "seconds": 1.0, "truncated": 0, "samples": samples}
    result = BenchmarkResult(name="tiny_math", metric="acc,none", score=mean, stderr=0.1, **plain, **more)
    write_unit(folder / SAMPLES, "tuned", result, facts_of({}, {}, 0), save_samples=False)


def compared(root: Path, lora: dict[int, list[float]], mola: dict[int, list[float]], words: str = "p") -> Compared:
    """MoLA less LoRA in column A; documents by seed."""
    runs = {
        f"tiny/{method}/all/{seed}": (values, method)
        for method, of in (("lora", lora), ("mola", mola))
        for seed, values in of.items()
    }
    sweep = finished(root, {name: scores(sum(values) / len(values)) for name, (values, _) in runs.items()})
    for name, (values, method) in runs.items():
        documents(sweep.root / name, values, words if method == "mola" else "p")
    rows = {row.column: row for row in compare(outcome(table(), "paper", find(root)), "tiny")}
    assert set(rows) == {"a", "b", "mean"}  # the base and the reference itself are no rows
    return rows["a"]


def test_one_seed_is_tested_over_documents(tmp_path: Path) -> None:
    row = compared(tmp_path, {0: RIGHT}, {0: BETTER})
    assert row.difference == pytest.approx(45.0) and row.interval is None and row.seeds == 1
    assert row.p_value == pytest.approx(2 / 2**9)  # nine documents fall one way: McNemar
    assert row.verdict == "better"


def test_a_difference_that_seeds_do_not_agree_on_is_noise(tmp_path: Path) -> None:
    row = compared(tmp_path, {0: RIGHT, 1: RIGHT}, {0: BETTER, 1: RIGHT})
    assert row.difference == pytest.approx(22.5) and row.p_value is not None and row.p_value < 0.05
    assert row.interval is not None and row.interval[0] < 0 < row.interval[1] and row.verdict == "within noise"


def test_a_difference_that_documents_do_not_bear_out_is_noise(tmp_path: Path) -> None:
    one_more = [1.0] * 11 + [0.0] * 9
    row = compared(tmp_path, {0: RIGHT, 1: RIGHT}, {0: one_more, 1: one_more})
    assert row.interval == pytest.approx((5.0, 5.0)) and row.p_value == 1.0 and row.verdict == "within noise"


def test_worse_in_every_seed(tmp_path: Path) -> None:
    row = compared(tmp_path, {0: BETTER, 1: BETTER}, {0: RIGHT, 1: RIGHT})
    assert row.verdict == "worse"
    found = outcome(table(), "paper", find(tmp_path))
    assert row.line(found).startswith(
        "MoLA less LoRA, A: -45.0 (2 seeds, 95 % over seeds -45.0 to -45.0, p 0.004, Holm "
    )


def test_other_documents_are_not_paired(tmp_path: Path) -> None:
    row = compared(tmp_path, {0: RIGHT}, {0: BETTER}, words="another prompt ")
    assert row.p_value is None and "they are not the same" in row.why and row.verdict.startswith("not tested")


def test_without_documents_seeds_alone_are_tested(tmp_path: Path) -> None:
    finished(
        tmp_path,
        {f"tiny/{m}/all/{s}": scores(v + s / 100) for m, v in (("lora", 0.2), ("mola", 0.6)) for s in (0, 1, 2)},
    )
    rows = compare(outcome(table(), "paper", find(tmp_path)), "tiny")
    assert all(row.p_value is None and row.seeds == 3 for row in rows)
    assert (
        rows[0].difference == pytest.approx(40.0) and rows[0].verdict == "better" and "cannot be paired" in rows[0].why
    )
    assert rows[1].verdict == "within noise"  # column B: the same scores


def test_runs_that_were_not_made_alike_get_no_verdict(tmp_path: Path) -> None:
    finished(tmp_path / "data", {"tiny/lora/all/0": scores(0.2)})
    finished(tmp_path / "data", {"tiny/mola/all/0": scores(0.6)}, number=2, max_examples=7)
    marked = compare(outcome(table(), "paper", find(tmp_path / "data"), mark=True), "tiny")
    assert [row.verdict for row in marked] == ["not comparable: see *"] * 3

    finished(tmp_path / "steps", {"tiny/lora/all/0": scores(0.2), "tiny/mola/all/0": scores(0.6)})
    lora, mola = find(tmp_path / "steps")
    for steps, verdict in (
        ("3", "not tested: one seed"),
        ("60", "not comparable: trainer.max_steps=3 was given to one"),
    ):
        runs = [given(lora, "trainer.max_steps=3"), given(mola, f"trainer.max_steps={steps}")]
        assert {row.verdict[: len(verdict)] for row in compare(outcome(table(), "paper", runs), "tiny")} == {verdict}
