"""Steps that are not finite may be left out: the run is the one without them, and it ends when they are too many."""

import json
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from loramoe_train.errors import DivergedError, SavedOnSignal
from loramoe_train.training import step as step_module
from loramoe_train.training.checkpoint import find_latest
from loramoe_train.training.parts import TrainingParts
from tests.training.harness import MadeUpData, make_parts, make_trainer, train, weights
from tests.training.test_resume import Signalled, check_same, log

# a rate that does not depend on the number of the step, so that a run without a step can be compared
STEADY = {"schedule": "constant", "warmup_fraction": 0.0, "stages": {"s": {"steps": 5}}, "log_every": 1}


class Poisoned(MadeUpData):
    """In some steps the model's last norm is infinite, and so is every loss."""

    def __init__(self, parts: TrainingParts, bad: set[int]) -> None:
        super().__init__(8, 4)
        self._norm, self._bad = parts.model.model.norm.weight, bad

    def steps(self, *, start: int, **which: int) -> Iterator[list]:
        for step, batches in enumerate(super().steps(start=start, **which), start):
            self._norm.data.fill_(float("inf") if step in self._bad else 1.0)
            yield batches


class Without(MadeUpData):
    """All steps but some."""

    def __init__(self, left_out: set[int]) -> None:
        super().__init__(8, 4)
        self._left_out = left_out

    def steps(self, *, start: int, stop: int, **which: int) -> Iterator[list]:
        every = super().steps(start=0, stop=stop + len(self._left_out), **which)
        taken = (batches for step, batches in enumerate(every) if step not in self._left_out)
        return (batches for step, batches in enumerate(taken) if step >= start)


def poisoned(bad: set[int]) -> TrainingParts:
    parts = make_parts()
    return replace(parts, stage_data=lambda name: Poisoned(parts, bad))


def entries(run_dir: Path, kind: str) -> list[dict]:
    return [entry for entry in map(json.loads, log(run_dir)) if entry["kind"] == kind]


@pytest.mark.parametrize("halts", [True, False], ids=["on the device", "asked by the host"])
def test_it_is_the_run_without_that_step(halts, tmp_path, monkeypatch):
    if not halts:
        monkeypatch.setattr(step_module, "halts_on_device", lambda optimizer, halted: False)
    parts = poisoned({2})
    summary = train(parts, make_trainer(**STEADY, max_skipped_steps=1, weight_decay=0.1), tmp_path / "one")
    other = replace(make_parts(), stage_data=lambda name: Without({2}))
    four = make_trainer(**{**STEADY, "stages": {"s": {"steps": 4}}}, weight_decay=0.1)
    expected = train(other, four, tmp_path / "other")
    assert [n for n, tensor in weights(other).items() if not torch.equal(weights(parts)[n], tensor)] == []
    found = [{**entry, "step": 0} for entry in entries(tmp_path / "one", "train")]  # its numbers spoil no line
    assert found == [{**entry, "step": 0} for entry in entries(tmp_path / "other", "train")] and len(found) == 4
    assert summary.stages[0].tokens == expected.stages[0].tokens and summary.stages[0].steps == 5


def test_the_batch_is_in_the_log_and_the_summary_warns(tmp_path):
    summary = train(poisoned({1, 3}), make_trainer(**{**STEADY, "log_every": 5}, max_skipped_steps=2), tmp_path)
    found = entries(tmp_path, "skipped")
    assert [entry["step"] for entry in found] == [2, 4]
    assert found[0]["not_finite"]["loss of task adding"] == "nan" and found[0]["tasks"] == [
        "adding",
        "naming",
        "sorting",
    ]
    assert found[0]["examples"] == [f"{('adding', 'naming', 'sorting')[i % 3]}:train:{i}" for i in range(8, 16)]
    assert summary.warnings == ("s: 2 steps were left out, for they were not finite (see metrics.jsonl)",)
    assert not (tmp_path / "diverged.json").exists()


def test_one_too_many_ends_the_run(tmp_path):
    parts = poisoned({1, 3})
    with pytest.raises(DivergedError, match=r"stage s, step 4: loss of task adding is nan.*max_skipped_steps") as told:
        train(parts, make_trainer(**STEADY, max_skipped_steps=1, checkpoint_every=3), tmp_path)
    assert told.value.exit_code == 4
    assert json.loads((tmp_path / "diverged.json").read_text())["step"] == 4
    assert [entry["step"] for entry in entries(tmp_path, "skipped")] == [2]
    alone = replace(make_parts(), stage_data=lambda name: Without({1}))
    train(alone, make_trainer(**{**STEADY, "stages": {"s": {"steps": 2}}}), tmp_path / "two")
    assert all(torch.equal(weights(parts)[name], tensor) for name, tensor in weights(alone).items())


def test_a_resumed_run_remembers_how_many(tmp_path):
    bad, settings = {1, 3}, {**STEADY, "log_every": 2}
    whole = poisoned(bad)
    train(whole, make_trainer(**settings, max_skipped_steps=2), tmp_path / "whole")
    parts = poisoned(bad)
    stopping = replace(parts, stage_data=lambda name: Signalled(Poisoned(parts, bad), signal.SIGTERM, 2))
    with pytest.raises(SavedOnSignal):
        train(stopping, make_trainer(**settings, max_skipped_steps=2), tmp_path / "cut")
    again = poisoned(bad)
    train(again, make_trainer(**settings, max_skipped_steps=2), tmp_path / "cut", resume=find_latest(tmp_path / "cut"))
    check_same(tmp_path / "cut", weights(again), (tmp_path / "whole", weights(whole)))


def test_and_ends_where_the_uninterrupted_one_would(tmp_path):
    parts = poisoned({1, 3})
    stopping = replace(parts, stage_data=lambda name: Signalled(Poisoned(parts, {1, 3}), signal.SIGTERM, 2))
    with pytest.raises(SavedOnSignal):
        train(stopping, make_trainer(**STEADY, max_skipped_steps=1), tmp_path)
    with pytest.raises(DivergedError, match="step 4: loss of task adding"):
        train(poisoned({1, 3}), make_trainer(**STEADY, max_skipped_steps=1), tmp_path, resume=find_latest(tmp_path))
