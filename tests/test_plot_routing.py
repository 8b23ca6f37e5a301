"""The picture of a routing record; the numbers are those of reproduce/loads.py."""

import runpy
import sys
from pathlib import Path

import pytest

from tests.reproduce.test_loads import LAYERS, line, write_log

SCRIPT = str(Path(__file__).parents[1] / "scripts" / "plot_routing.py")


def test_what_is_printed_and_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    pytest.importorskip("matplotlib")
    write_log(tmp_path, line("eval_routing", LAYERS))
    monkeypatch.setattr(sys, "argv", [SCRIPT, str(tmp_path), str(tmp_path / "loads.png")])
    runpy.run_path(SCRIPT, run_name="__main__")
    shown = [row.split() for row in capsys.readouterr().out.splitlines()]
    assert shown[1:] == [["a", "75.0", "25.0"], ["b", "50.0", "50.0"], ["all", "62.5", "37.5"]]
    assert (tmp_path / "loads.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_without_routers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_log(tmp_path, line("train", {}))
    monkeypatch.setattr(sys, "argv", [SCRIPT, str(tmp_path), str(tmp_path / "loads.png")])
    with pytest.raises(SystemExit, match="has no routing of held-out examples"):
        runpy.run_path(SCRIPT, run_name="__main__")
    assert not (tmp_path / "loads.png").exists()
