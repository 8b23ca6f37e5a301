"""Cells from made-up results: the numbers by hand, what is missing, what cannot be compared; nothing from the paper."""

import csv
import io
import json
from pathlib import Path

import pytest

from loramoe_train.errors import ConfigError, DataError
from loramoe_train.reproduce.folder import find
from loramoe_train.reproduce.outcome import MEASURED, NOT_COMPARABLE, NOT_RUN, Outcome, outcome
from loramoe_train.reproduce.show import as_csv, as_latex, as_markdown, cell_text, statuses
from tests.reproduce.made import finished, given, scores, table

RUNS = {
    "tiny/lora/all/0": scores(0.4, 0.5, base=0.1),
    "tiny/lora/all/1": scores(0.6, 0.7, base=0.1),
    "tiny/mola/all/0": scores(0.8, 0.8),
    "tiny/mola/all/1": None,
}


def made(tmp_path: Path, runs=RUNS, **more) -> Outcome:
    finished(tmp_path, runs)
    return outcome(table(), "paper", find(tmp_path), **more)


def cells(found: Outcome, method: str) -> dict:
    return {cell.column: cell for cell in found.cells["tiny"][method]}


def test_means_deviations_and_differences(tmp_path: Path) -> None:
    lora = cells(made(tmp_path), "lora")
    assert lora["a"].status == MEASURED and lora["a"].mean == pytest.approx(50.0)
    assert lora["a"].deviation == pytest.approx(200**0.5)  # of 40 and 60, n - 1
    assert lora["a"].difference == pytest.approx(0.0) and lora["a"].within_noise
    # Student's t with one degree of freedom: 12.706 * 14.142 / sqrt(2)
    assert lora["a"].interval == pytest.approx((50 - 127.06, 50 + 127.06), abs=0.01)
    assert [run.id for run in lora["a"].runs] == ["sweep-1/tiny/lora/all/0", "sweep-1/tiny/lora/all/1"]
    assert lora["b"].status == NOT_COMPARABLE and lora["b"].why == "another judge"
    assert lora["b"].mean == pytest.approx(60.0) and lora["b"].difference is None
    assert lora["mean"].scores == pytest.approx({0: 45.0, 1: 65.0}) and lora["mean"].why == "another judge"
    assert cell_text(lora["a"]) == "50.0 ± 14.1 (paper 50: +0.0, within noise)"
    assert cell_text(lora["b"]) == "60.0 ± 14.1 (paper 60.5)"


def test_a_missing_run_is_said_and_no_cell_is_filled_from_the_paper(tmp_path: Path) -> None:
    found = made(tmp_path)
    mola = cells(found, "mola")
    assert mola["a"].scores == {0: 80.0} and mola["a"].deviation is None and mola["a"].within_noise is None
    assert cell_text(mola["a"]) == "80.0 (paper 90 (89-91): -10.0)"
    assert mola["c"].status == NOT_RUN and mola["c"].why == "nothing measures it at this scale"
    assert cells(found, "other")["a"].why == "nobody has it"
    assert {cell.mean for cell in cells(found, "other").values()} == {None}
    base = cells(found, "base")
    assert base["a"].scores == {0: 10.0} and base["a"].deviation is None and base["a"].paper is None
    assert "LoRA [A]: measured here; 2 seeds, runs sweep-1/tiny/lora/all/0, sweep-1/tiny/lora/all/1" in statuses(
        found, "tiny"
    )


def test_nothing_run_gives_a_table_without_a_number(tmp_path: Path) -> None:
    found = outcome(table(), "paper", find(tmp_path))
    assert all(cell.status == NOT_RUN and cell.mean is None and cell.difference is None for cell in found.all())
    assert cell_text(cells(found, "lora")["a"]) == "not run (paper 50)"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"n": 50}, "n is 50 in sweep-1/tiny/mola/all/0 and 100 in sweep-1/tiny/lora/all/0"),
        ({"made_with": {"task": {"definition_sha256": "d2"}}}, "definition is d2 in sweep-1/tiny/mola/all/0"),
        ({"made_with": {"task": {"chat_template": True}}}, "eval.chat_template is True in sweep-1/tiny/mola/all/0"),
        ({"made_with": {"task": {"max_length": 64}}}, "eval.max_length is 64 in sweep-1/tiny/mola/all/0"),
        ({"version": "2.0"}, "version is 2.0 in sweep-1/tiny/mola/all/0"),
        ({"made_with": {"task": {"data": {"test": "f00"}}}}, "the data is {'test': 'f00'} in sweep-1/tiny/mola/all/0"),
    ],
)
def test_scores_that_were_made_otherwise_are_refused_or_marked(tmp_path: Path, change: dict, words: str) -> None:
    runs = {**RUNS, "tiny/mola/all/0": scores(0.8, 0.8, **change)}
    with pytest.raises(ConfigError, match="tiny_math cannot be compared: ") as refused:
        made(tmp_path, runs)
    assert words in str(refused.value) and "mixed=mark" in str(refused.value)
    marked = outcome(table(), "paper", find(tmp_path), mark=True)
    assert cell_text(cells(marked, "mola")["a"]).startswith("80.0* (") and not cells(marked, "lora")["a"].odd
    assert any(words in note for note in marked.notes)


def test_what_was_scored_again_otherwise_is_told(tmp_path: Path) -> None:
    """`loramoe-eval RUN eval.limit=10` changes results.json, and not what the run was told."""
    again = {"made_with": {"task": {"limit": 10, "chat_template": True, "max_length": None}}}
    finished(tmp_path, {key: scores(0.5, base=0.5, **again) for key in list(RUNS)[:3]})
    runs = find(tmp_path)
    whole = cells(outcome(table(), "paper", runs), "lora")
    said = "scored with eval.limit=10 eval.chat_template=true, which its run was not told"
    assert (whole["a"].status, whole["a"].why) == (NOT_COMPARABLE, said) and whole["a"].difference is None
    assert whole["b"].why == whole["mean"].why == f"another judge; {said}"
    assert cells(outcome(table(), "paper", runs), "base")["a"].why == said
    told = [given(run, "eval.limit=10", "eval.chat_template=True") for run in runs]
    assert "eval.limit=10" in cells(outcome(table(), "paper", told), "lora")["a"].why
    assert "scored with" not in cells(outcome(table(), "paper", told), "lora")["a"].why


def test_other_versions_are_refused(tmp_path: Path) -> None:
    sweep = finished(tmp_path, RUNS)
    path = sweep.root / "tiny/mola/all/0/results.json"
    content = json.loads(path.read_text())
    content["versions"]["lm_eval"] = "0.4.9"
    path.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match="version of lm_eval is 0.4.9 in sweep-1/tiny/mola/all/0 and 0.4.13 in"):
        outcome(table(), "paper", find(tmp_path))


def test_training_on_other_data_is_refused(tmp_path: Path) -> None:
    finished(tmp_path, {key: RUNS[key] for key in list(RUNS)[:2]})
    finished(tmp_path, {"tiny/mola/all/0": scores(0.8)}, number=2, max_length=64)
    with pytest.raises(ConfigError, match="sweep-2/tiny/mola/all/0 was trained on other data .*data.max_length"):
        outcome(table(), "paper", find(tmp_path))
    marked = outcome(table(), "paper", find(tmp_path), mark=True)
    assert cells(marked, "mola")["a"].odd and not cells(marked, "lora")["a"].odd


def test_a_damaged_file_is_told_in_its_cells_and_left_alone(tmp_path: Path) -> None:
    found = made(tmp_path, {**RUNS, "tiny/mola/all/0": '{"scores": {"tiny_m'})
    cell = cells(found, "mola")["a"]
    assert cell.status == NOT_RUN and "failed: " in cell.why and "is not a readable results file" in cell.why
    assert (tmp_path / "sweep-1/tiny/mola/all/0/results.json").read_text() == '{"scores": {"tiny_m'


def test_folders_that_are_no_sweeps_of_a_table(tmp_path: Path) -> None:
    finished(tmp_path, {"tiny/lora/all/0": scores(0.5)})
    (tmp_path / "sweep-old").mkdir()
    with pytest.raises(DataError, match="is not numbered"):
        find(tmp_path)


def test_the_newer_sweep_fills_what_an_older_one_failed(tmp_path: Path) -> None:
    finished(tmp_path, RUNS)
    finished(tmp_path, {"tiny/mola/all/1": scores(0.9)}, number=2)
    assert cells(outcome(table(), "paper", find(tmp_path)), "mola")["a"].scores == pytest.approx({0: 80.0, 1: 90.0})


def test_markdown_latex_and_csv(tmp_path: Path) -> None:
    found = made(tmp_path)
    lines = as_markdown(found).splitlines()
    at = lines.index("| method | A | B | C | mean |")
    assert lines[at + 4].startswith("| LoRA | 50.0 ± 14.1 (paper 50: +0.0, within noise) | 60.0 ± 14.1 (paper 60.5) |")
    latex = as_latex(found)
    assert r"Other \& co\_ & not run" in latex and r"50.0 $\pm$ 14.1" in latex and r"\begin{tabular}{lrrrr}" in latex
    rows = {(row["method"], row["column"]): row for row in csv.DictReader(io.StringIO(as_csv(found)))}
    assert len(rows) == 16 and rows["lora", "a"]["runs"] == "sweep-1/tiny/lora/all/0 sweep-1/tiny/lora/all/1"
    assert float(rows["lora", "a"]["mean"]) == pytest.approx(50.0) and rows["lora", "a"]["mark"] == "seen"
    assert rows["other", "a"]["mean"] == "" and rows["other", "a"]["status"] == NOT_RUN
    assert rows["mola", "a"]["paper low"] == "89.0"


def rated(losses: dict[str, tuple[float, float]]) -> dict[str, str]:
    """Runs of a rate sweep: rate -> validation losses of two seeds; the tuned score is the rate, to know them by."""
    from tests.sweeps.made import results

    made = {}
    for rate, values in losses.items():
        for seed, loss in enumerate(values):
            content = results(scores(float(rate)))
            content["training"]["stages"][-1]["eval_loss"] = loss
            made[f"tiny/lora/all/lr-{rate}/{seed}"] = json.dumps(content)
    return made


def test_the_best_rate_by_validation_loss_is_the_one_shown(tmp_path: Path) -> None:
    finished(tmp_path, rated({"0.1": (1.0, 1.4), "0.2": (1.1, 1.1), "0.9": (1.3, 1.3)}))
    found = outcome(table(), "paper", find(tmp_path))
    assert cells(found, "lora")["a"].scores == pytest.approx({0: 20.0, 1: 20.0})  # 0.9 scores best, and is not taken
    assert found.notes == ("lora on tiny (all): lr-0.2 of 3 has the lowest validation loss (1.1000)",)


def test_the_base_is_taken_from_whichever_run_scored_it(tmp_path: Path) -> None:
    runs = rated({"0.1": (1.0, 1.4), "0.2": (1.1, 1.1)})
    values = json.loads(runs["tiny/lora/all/lr-0.1/0"])  # neither the chosen rate nor the seed that is asked for
    values["scores"]["tiny_math"]["base"] = 0.3
    finished(tmp_path, {**runs, "tiny/lora/all/lr-0.1/0": json.dumps(values)})
    found = outcome(table(), "paper", find(tmp_path), seeds=[1])
    assert cells(found, "lora")["a"].scores == pytest.approx({1: 20.0})
    assert cells(found, "base")["a"].scores == pytest.approx({0: 30.0})


def test_with_and_without_a_sweep_of_rates_is_no_choice(tmp_path: Path) -> None:
    finished(tmp_path, {**rated({"0.1": (1.0, 1.0)}), "tiny/lora/all/0": scores(0.5)})
    with pytest.raises(ConfigError, match="sweep-1/tiny/lora/all/0 was run without a sweep of rates"):
        outcome(table(), "paper", find(tmp_path))


def test_an_end_of_the_grid_and_a_grid_with_gaps(tmp_path: Path) -> None:
    finished(tmp_path / "end", rated({"0.1": (1.0, 1.0), "0.2": (1.1, 1.1)}))
    assert "at the end of the grid" in outcome(table(), "paper", find(tmp_path / "end")).notes[0]
    finished(tmp_path / "gap", {**rated({"0.1": (1.0, 1.0)}), "tiny/lora/all/lr-0.2/0": None})
    found = outcome(table(), "paper", find(tmp_path / "gap"))
    assert cells(found, "lora")["a"].status == NOT_RUN and "no rate is chosen yet" in found.notes[0]


def test_a_rate_at_which_training_diverged_is_the_worst_and_no_gap(tmp_path: Path) -> None:
    runs = {
        **rated({"0.1": (1.0, 1.0), "0.2": (0.9, 0.9)}),
        "tiny/lora/all/lr-0.8/0": None,
        "tiny/lora/all/lr-0.8/1": None,
    }
    sweep = finished(tmp_path, runs)
    for seed in "01":
        (sweep.root / f"tiny/lora/all/lr-0.8/{seed}").mkdir(parents=True)
        (sweep.root / f"tiny/lora/all/lr-0.8/{seed}/diverged.json").write_text("{}")
    found = outcome(table(), "paper", find(tmp_path))
    assert found.notes == ("lora on tiny (all): lr-0.2 of 3 has the lowest validation loss (0.9000)",)
    assert cells(found, "lora")["a"].status == MEASURED

    for run in find(tmp_path):
        (run.path / "results.json").unlink(missing_ok=True)
        (run.path / "diverged.json").write_text("{}")
    found = outcome(table(), "paper", find(tmp_path))
    assert found.notes == ("lora on tiny (all): training diverged at every rate",)
    assert cells(found, "lora")["a"].status == NOT_RUN


def test_runs_are_not_looked_for_in_a_file(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(DataError, match="notes.txt is a file; give a folder"):
        find(tmp_path / "notes.txt")
    assert find(tmp_path / "nothing yet") == []


def test_a_picture(tmp_path: Path) -> None:
    from loramoe_train.reproduce.plot import check_plot, plot

    pytest.importorskip("matplotlib")
    found = made(tmp_path / "runs")
    for name, begin in (("table.png", b"\x89PNG"), ("table.pdf", b"%PDF")):
        check_plot(tmp_path / name)
        plot(found, tmp_path / name)
        assert (tmp_path / name).read_bytes().startswith(begin)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["runs", "table.pdf", "table.png"]


def test_a_run_with_less_than_the_table_says_is_not_set_against_the_paper(tmp_path: Path) -> None:
    finished(tmp_path, RUNS)
    runs = find(tmp_path)
    elsewhere = ("launcher.array_parallelism=2", "data.root=x", "trainer.micro_batch_size=1")
    same = outcome(table(), "paper", [given(run, *elsewhere, computed=("trainer.lr=0.1",)) for run in runs])
    assert cells(same, "lora")["a"].status == MEASURED and cells(same, "lora")["a"].difference is not None

    short = outcome(table(), "paper", [given(run, "trainer.max_steps=3") for run in runs])
    lora = cells(short, "lora")
    assert (lora["a"].status, lora["a"].difference) == (NOT_COMPARABLE, None) and lora["a"].mean == pytest.approx(50.0)
    assert lora["a"].why == "run with trainer.max_steps=3, which the table does not say"
    assert lora["b"].why == "another judge; run with trainer.max_steps=3, which the table does not say"
    assert cells(short, "base")["a"].status == MEASURED  # which nobody trained

    few = outcome(table(), "paper", [given(run, "eval.limit=4") for run in runs])
    assert {cells(few, row)["a"].status for row in ("base", "lora", "mola")} == {NOT_COMPARABLE}

    budget = outcome(table(), "paper", [given(run, computed=("experts.rank=7", "experts.alpha=14.0")) for run in runs])
    assert "experts.rank=7" in cells(budget, "mola")["a"].why and cells(budget, "base")["a"].status == MEASURED
