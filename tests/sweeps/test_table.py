"""Tables of made-up results: the numbers by hand, what is missing, what cannot be compared."""

import csv
import io
import json
import time
from pathlib import Path

import pytest

from loramoe_train.errors import ConfigError, DataError
from loramoe_train.sweeps.command import run as command
from loramoe_train.sweeps.status import look
from loramoe_train.sweeps.sweep import read_sweep
from loramoe_train.sweeps.table import as_csv, as_markdown, make_table
from tests.sweeps.made import finished

LAYOUTS = [(f"experts.layout={layout}", f"seed={seed}") for layout in ("2468", "8642") for seed in (0, 1, 2)]
SCORES = [
    {"gsm8k": 0.5, "arc_easy": 0.25},
    {"gsm8k": 0.6, "arc_easy": 0.75},
    {"gsm8k": 0.7, "arc_easy": 0.5},
    {"gsm8k": 0.9, "arc_easy": 0.5},
    {"gsm8k": 0.8},
    None,
]


def test_a_row_for_each_run(tmp_path: Path) -> None:
    sweep = finished(tmp_path / "sweep", LAYOUTS, SCORES)
    table = make_table(sweep, look(sweep))
    assert table.columns == ("run", "experts.layout", "seed", "gsm8k", "arc_easy", "mean", "eval loss")
    assert table.rows[0] == ("0", "2468", "0", "50.0", "25.0", "37.5", "1.2500")
    assert table.rows[4] == ("4", "8642", "1", "80.0", "-", "-", "1.2500")  # a mean over a part would mislead
    assert table.rows[5] == ("5", "8642", "2", "failed", "failed", "failed", "failed")
    assert table.notes == ("run 5 (experts.layout=8642 seed=2) failed: its job never began: it was cancelled, or lost",)
    assert make_table(sweep, look(sweep), side="difference").rows[0][3:5] == ("25.0", "0.0")


def test_mean_and_deviation_over_seeds(tmp_path: Path) -> None:
    sweep = finished(tmp_path / "sweep", LAYOUTS, SCORES)
    table = make_table(sweep, look(sweep), over="seed")
    assert table.columns == ("experts.layout", "gsm8k", "arc_easy", "mean", "eval loss")
    # deviations with n - 1: 0.1; 0.25; of the means 37.5, 67.5 and 60: 15.6
    assert table.rows[0] == ("2468", "60.0 ± 10.0", "50.0 ± 25.0", "55.0 ± 15.6", "1.2500 ± 0.0000")
    assert table.rows[1][1:4] == ("85.0 ± 7.1 (2 of 3)", "50.0 (1 of 3)", "70.0 (1 of 3)")
    lines = as_markdown(table).splitlines()
    assert lines[0] == "| experts.layout | gsm8k | arc_easy | mean | eval loss |" and lines[1].count("---") == 5
    assert lines[2].startswith("| 2468 | 60.0 ± 10.0 |") and lines[-1] == table.notes[0]


def test_csv_holds_what_is_stored(tmp_path: Path) -> None:
    sweep = finished(tmp_path / "sweep", LAYOUTS[:2], [{"gsm8k": 0.1 + 0.2}, None])
    lines = as_csv(sweep, look(sweep)).splitlines()
    assert lines[0] == "run,seed,state,gsm8k tuned,gsm8k base,gsm8k difference,eval loss"
    assert lines[1] == f"0,0,done,{0.1 + 0.2},0.25,{0.1 + 0.2 - 0.25},1.25" and lines[2] == "1,1,failed,,,,"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"n": 50}, "n is 50 in run 2 (seed=2) and 100 in run 0 (seed=0)"),
        ({"version": "2.0"}, "version is 2.0 in run 2"),
        ({"num_fewshot": 5}, "num_fewshot is 5 in run 2"),
        ({"metric": "exact_match,none"}, "metric is exact_match,none in run 2"),
        ({"made_with": {"task": {"data": {"test": "ab12"}}}}, "the data is {'test': 'ab12'} in run 2"),
    ],
)
def test_scores_that_were_made_otherwise(change: dict, words: str, tmp_path: Path) -> None:
    runs = [(f"seed={seed}",) for seed in range(3)]
    odd = {"gsm8k": {"tuned": 0.7, **change}}
    sweep = finished(tmp_path / "sweep", runs, [{"gsm8k": 0.5}, {"gsm8k": 0.6}, odd])
    with pytest.raises(ConfigError, match="mixed=mark") as refused:
        make_table(sweep, look(sweep))
    assert f"gsm8k cannot be compared: {words}" in str(refused.value)
    table = make_table(sweep, look(sweep), mark=True)
    assert [row[2] for row in table.rows] == ["50.0", "60.0", "70.0*"]
    assert len(table.notes) == 1 and words in table.notes[0]
    head, *rows = csv.reader(io.StringIO(as_csv(sweep, look(sweep))))
    assert head[-1] == "made otherwise" and [words in row[-1] for row in rows] == [False, False, True]


def test_another_version_of_the_harness(tmp_path: Path) -> None:
    sweep = finished(tmp_path / "sweep", LAYOUTS[:3], [{"gsm8k": 0.5}] * 3)
    path = tmp_path / "sweep" / "1" / "results.json"
    content = json.loads(path.read_text())
    content["versions"]["lm_eval"] = "0.5.0"
    path.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=r"version of lm_eval is 0\.5\.0 in run 1"):
        make_table(sweep, look(sweep))


def test_damaged_results_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "sweep"
    finished(root, LAYOUTS[:2], [{"gsm8k": 0.5}, {"gsm8k": 0.6}])
    before = '{"schema": 1, "scores": {"gsm'
    (root / "1" / "results.json").write_text(before)
    command(["table", str(root), "format=markdown"])
    said = capsys.readouterr().out.splitlines()
    assert said[3] == "| 1 | 1 | failed | failed |"
    assert said[-1].startswith("run 1 (seed=1) failed: ") and "results.json is not a readable results file" in said[-1]
    with pytest.raises(DataError, match="remove that file, and the same command makes it again"):
        command(["retry-failed", str(root)])
    assert (root / "1" / "results.json").read_text() == before


def test_two_hundred_runs_within_seconds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = [f"task_{n}" for n in range(8)]
    runs = [(f"experts.rank={rank}", f"seed={seed}") for rank in range(1, 41) for seed in range(5)]
    finished(tmp_path / "sweep", runs, [{name: 0.5 + n / 1000 for name in names} for n in range(200)])
    for text in ("format=csv", "over=seed", "format=text"):
        began = time.process_time()  # what other programs take of the machine does not count
        command(["table", str(tmp_path / "sweep"), text])
        assert time.process_time() - began < 5
        said = capsys.readouterr().out
        if text == "format=csv":
            assert len(said.splitlines()) == 201 and said.splitlines()[200].startswith("199,40,4,done,0.699")
        if text == "over=seed":  # of 0.5, 0.501 ... 0.504: deviation 0.158 per cent
            assert "50.2 ± 0.2" in said


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["tabel"], "no such command; did you mean 'table'?"),
        (["table"], "wants the folder of a sweep first"),
        (["table", "FOLDER", "formt=csv"], "unknown option 'formt=csv'; did you mean 'format'?"),
        (["table", "FOLDER", "format=latex"], "format must be one of text, markdown, csv"),
        (["table", "FOLDER", "format=csv", "over=seed"], "format=csv has every run and every side by itself"),
        (["table", "FOLDER", "over=sed"], "over=sed is no key that varies in"),
        (["table", "FOLDER", "side=tund"], "side must be one of tuned, base, difference"),
        (["retry-failed", "FOLDER", "seed=4"], "retry-failed takes launcher.KEY=VALUE only, got 'seed=4'"),
        (["retry-failed", "FOLDER", "launcher.timeout=4"], "did you mean 'timeout_min'?"),
        (["retry-failed", "FOLDER", "launcher.name=slurm"], "a sweep stays where it was started"),
    ],
)
def test_refusals_name_what_would_be_right(arguments: list[str], words: str, tmp_path: Path) -> None:
    finished(tmp_path / "sweep", LAYOUTS[:3], [{"gsm8k": 0.5}] * 3)
    with pytest.raises(ConfigError) as refused:
        command([text.replace("FOLDER", str(tmp_path / "sweep")) for text in arguments])
    assert words in str(refused.value)


def test_varying_keys_of_recipes_and_plus(tmp_path: Path) -> None:
    runs = [("+recipe=mola", "seed=0", "++data.max_examples=4"), ("+recipe=lora", "seed=0", "++data.max_examples=4")]
    finished(tmp_path / "sweep", runs, [None, None])
    assert read_sweep(tmp_path / "sweep").varying() == ("recipe",)
