"""The two tables that the README runs, cut short: runs in processes of their own, the table, and the same call again.

    loramoe-reproduce lora_mixer_table2
    loramoe-reproduce mola_table1

are the whole of it, and take minutes.
"""

import csv
import io
from pathlib import Path

import pytest

from tests.forks import run_forked

SHORT = ("seeds=0", "trainer.max_steps=3", "eval.limit=4", "launcher.array_parallelism=2", "format=csv")


def table(name: str, folder: Path, *more: str) -> tuple[str, dict[tuple[str, str], dict[str, str]]]:
    """What the command says, and its cells: (method, column) -> fields."""
    done = run_forked("reproduce", name, *SHORT, *more, cwd=folder)
    assert done.returncode == 0, done.stderr
    return done.stderr, {(row["method"], row["column"]): row for row in csv.DictReader(io.StringIO(done.stdout))}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "methods", "columns", "runs"),
    [
        ("lora_mixer_table2", ("base", "lora", "lora_mixer"), 5, 2),
        ("mola_table1", ("mola_2468",), 2, 2),
    ],
)
def test_a_table_of_the_readme(name: str, methods: tuple[str, ...], columns: int, runs: int, tmp_path: Path) -> None:
    asked = (f"methods={','.join(methods)}",)
    said, cells = table(name, tmp_path, *asked)
    assert f"{runs} runs: 0 done, 0 failed, {runs} to start" in said
    assert {method for method, _ in cells} == set(methods)
    for method in methods:
        here = [cell for (own, _), cell in cells.items() if own == method and cell["mean"]]
        single = [cell for cell in here if len(cell["runs"].split()) == 1]
        assert len(single) >= columns, cells
        for cell in here:
            # made-up tasks: never beside the paper's number, and never that number itself
            assert cell["status"] == "not comparable" and "not the paper's" in cell["why"]
            assert not cell["difference"] and 0 <= float(cell["mean"]) <= 100
        for run in {run for cell in here for run in cell["runs"].split()}:
            assert (tmp_path / "reproduce" / name / "tiny" / run / "results.json").is_file()
    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.json*")}
    again, same = table(name, tmp_path, *asked)
    assert f"{runs} runs: {runs} done, 0 failed, 0 to start" in again and same == cells
    assert stamps == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.json*")}
