"""Whole tiny runs."""

import json
from pathlib import Path

import torch

from tests.training.harness import SITES, TASKS, make_parts, make_trainer, train, weights


def lines(run_dir: Path, kind: str | None = None) -> list[dict]:
    """The lines of the log without what depends on the clock."""
    found = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "timing"} for line in found if kind in (None, line["kind"])]


def test_a_run_learns_and_logs(tmp_path: Path) -> None:
    parts = make_parts(dropout=0.1)
    before = weights(parts)
    summary = train(parts, make_trainer(), tmp_path)
    print(json.dumps(summary.plain(), indent=1))
    print(*lines(tmp_path), sep="\n")
    print(*sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*")), sep="\n")
    after = weights(parts)
    assert all(not torch.equal(before[name], after[name]) for name in before)
