"""A run that was stopped anywhere and resumed is the uninterrupted run, bit for bit."""

import json
import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from loramoe_train.errors import ConfigError, Interrupted, LoramoeError, MissingFileError, SavedOnSignal
from loramoe_train.training.checkpoint import find_latest, read_checkpoint
from loramoe_train.training.parts import TrainingParts
from tests.training.harness import make_parts, make_trainer, train, weights
from tests.training.processes import run_worker

RUN = {"batch": 8, "micro": 4, "dropout": 0.3}
# log lines every 2 steps and evaluations every 2, so that windows and stages are cut in the middle
TRAINER = {"eval_every": 2, "log_every": 2, "keep": 10}


class Signalled:
    """Stage data that sends this process a signal while a step is being prepared."""

    def __init__(self, data, number: int, at: int) -> None:
        self.data, self.number, self.at = data, number, at

    def steps(self, *, start: int, **which: int) -> Iterator[list]:
        for step, batches in enumerate(self.data.steps(start=start, **which), start):
            if step == self.at:
                os.kill(os.getpid(), self.number)
            yield batches


def stopped_at(parts: TrainingParts, step: int, number: int = signal.SIGTERM) -> TrainingParts:
    """The parts with a signal coming in global step `step` of the two stages of three steps."""
    made, stage = parts.stage_data, ("first", "second")[step // 3]
    return replace(
        parts, stage_data=lambda name: Signalled(made(name), number, step % 3) if name == stage else made(name)
    )


def log(run_dir: Path) -> list[str]:
    """The log, line for line, but for what depends on the clock."""
    found = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [json.dumps({k: v for k, v in line.items() if k != "timing"}) for line in found]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    run_dir = tmp_path_factory.mktemp("whole")
    parts = make_parts(**RUN)
    train(parts, make_trainer(**TRAINER), run_dir)
    return run_dir, weights(parts)


def check_same(run_dir: Path, found: dict[str, Tensor], uninterrupted: tuple[Path, dict[str, Tensor]]) -> None:
    whole_dir, expected = uninterrupted
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []
    assert log(run_dir) == log(whole_dir)


@pytest.mark.parametrize("step", range(6))
def test_resume_at_every_step(step: int, tmp_path: Path, uninterrupted: tuple) -> None:
    with pytest.raises(SavedOnSignal, match=rf"stopped by SIGTERM after step {step + 1} \(stage "):
        train(stopped_at(make_parts(**RUN), step), make_trainer(**TRAINER), tmp_path)
    torch.manual_seed(step)  # whatever happened in between
    parts = make_parts(**RUN)
    summary = train(parts, make_trainer(**TRAINER), tmp_path, resume=find_latest(tmp_path))
    check_same(tmp_path, weights(parts), uninterrupted)
    assert summary.steps == 6 and [stage.steps for stage in summary.stages] == [3, 3]


def test_stopped_at_every_step_of_one_run(tmp_path: Path, uninterrupted: tuple) -> None:
    for step in range(6):
        with pytest.raises(SavedOnSignal):
            train(stopped_at(make_parts(**RUN), step), make_trainer(**TRAINER), tmp_path, resume=find_latest(tmp_path))
    parts = make_parts(**RUN)
    train(parts, make_trainer(**TRAINER), tmp_path, resume=find_latest(tmp_path))
    check_same(tmp_path, weights(parts), uninterrupted)


def test_resume_from_an_older_checkpoint_cuts_the_log(tmp_path: Path, uninterrupted: tuple) -> None:
    trainer = make_trainer(**TRAINER, checkpoint_every=1)
    train(make_parts(**RUN), trainer, tmp_path)
    (tmp_path / "metrics.jsonl").open("a").write('{"kind": "train", "st')  # killed while writing
    parts = make_parts(**RUN)
    train(parts, trainer, tmp_path, resume=tmp_path / "checkpoints" / "step_000002")
    check_same(tmp_path, weights(parts), uninterrupted)


def test_a_finished_run_has_nothing_left_to_do(tmp_path: Path, uninterrupted: tuple) -> None:
    whole_dir, expected = uninterrupted
    before, parts = log(whole_dir), make_parts(**RUN)
    summary = train(parts, make_trainer(**TRAINER), whole_dir, resume=find_latest(whole_dir))
    assert log(whole_dir) == before and summary.steps == 6 and summary.last_checkpoint.name == "step_000006"
    assert all(torch.equal(value, expected[name]) for name, value in weights(parts).items())


def test_ranks_hear_of_a_signal_with_the_numbers(
    tmp_path: Path, uninterrupted: tuple, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a rank may not act on its own signal, the run stops one step later; that step is in the checkpoint too."""
    from loramoe_train.training.stage_run import StageRun

    monkeypatch.setattr(StageRun, "_numbers_are_due", lambda self: self.state.done == self.plan.steps)
    trainer = make_trainer(**{**TRAINER, "log_every": 3, "eval_every": None})
    train(make_parts(**RUN), trainer, tmp_path / "whole")
    with pytest.raises(SavedOnSignal, match=r"after step 2 \(stage first\)"):
        train(stopped_at(make_parts(**RUN), 0), trainer, tmp_path)
    monkeypatch.undo()
    parts = make_parts(**RUN)
    train(parts, trainer, tmp_path, resume=find_latest(tmp_path))
    assert log(tmp_path) == log(tmp_path / "whole")


@pytest.mark.slow
def test_resume_in_a_new_process(tmp_path: Path, uninterrupted: tuple) -> None:
    from safetensors.torch import load_file

    with pytest.raises(SavedOnSignal):
        train(stopped_at(make_parts(**RUN), 4), make_trainer(**TRAINER), tmp_path)
    run_worker({"run_dir": str(tmp_path), "parts": RUN, "trainer": TRAINER, "resume": "auto"})
    check_same(tmp_path, load_file(tmp_path / "weights.safetensors"), uninterrupted)


def test_ctrl_c_saves_and_stops(tmp_path: Path) -> None:
    with pytest.raises(Interrupted, match=r"stopped by Ctrl-C after step 2 \(stage first\); saved .*step_000002"):
        train(stopped_at(make_parts(**RUN), 1, signal.SIGINT), make_trainer(**TRAINER), tmp_path)
    assert find_latest(tmp_path).name == "step_000002"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_second_ctrl_c_stops_at_once(tmp_path: Path) -> None:
    parts = stopped_at(stopped_at(make_parts(**RUN), 1, signal.SIGINT), 1, signal.SIGINT)
    with pytest.raises(Interrupted, match="stopped at once by Ctrl-C"):
        train(parts, make_trainer(**TRAINER), tmp_path)
    assert find_latest(tmp_path) is None  # nothing was due before


def test_the_previous_listener_hears_sigusr2_after_the_save(tmp_path: Path) -> None:
    heard = []
    before = signal.signal(signal.SIGUSR2, lambda number, frame: heard.append((number, find_latest(tmp_path).name)))
    try:
        with pytest.raises(SavedOnSignal, match="stopped by SIGUSR2"):
            train(stopped_at(make_parts(**RUN), 1, signal.SIGUSR2), make_trainer(**TRAINER), tmp_path)
        assert heard == [(signal.SIGUSR2, "step_000002")]
    finally:
        signal.signal(signal.SIGUSR2, before)


def test_a_signal_during_the_evaluation(tmp_path: Path, uninterrupted: tuple) -> None:
    """The evaluation is given up, and made up for when the run goes on."""

    class Ringing(dict):
        def items(self):
            os.kill(os.getpid(), signal.SIGUSR1)
            return super().items()

    parts = make_parts(**RUN)
    with pytest.raises(SavedOnSignal, match="after step 2"):
        train(replace(parts, validation=Ringing(parts.validation)), make_trainer(**TRAINER), tmp_path)
    assert [json.loads(line)["kind"] for line in log(tmp_path)] == ["train", "routing"]
    parts = make_parts(**RUN)
    train(parts, make_trainer(**TRAINER), tmp_path, resume=find_latest(tmp_path))
    check_same(tmp_path, weights(parts), uninterrupted)


@pytest.mark.parametrize(
    ("changes", "seed", "message"),
    [
        ({"lr": 0.1}, 5, r"stage first has lr=0\.1, but checkpoint .* has 0\.005; set it back to resume"),
        ({}, 6, "seed is 6, but checkpoint .* has 5"),
        ({"stages": {"first": {"train": ["experts"], "routing": "by_domain", "steps": 4}}}, 5, "has steps=4, but"),
    ],
)
def test_another_configuration_is_refused(changes: dict, seed: int, message: str, tmp_path: Path) -> None:
    with pytest.raises(SavedOnSignal):
        train(stopped_at(make_parts(**RUN), 1), make_trainer(**TRAINER), tmp_path)
    parts = make_parts(**RUN)
    before = weights(parts)
    with pytest.raises(ConfigError, match=message):
        trainer = make_trainer(**{**TRAINER, **changes})
        train(parts, trainer, tmp_path, resume=find_latest(tmp_path), seed=seed)
    assert all(torch.equal(value, before[name]) for name, value in weights(parts).items())


def test_a_checkpoint_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match="does not exist; give a folder such as"):
        read_checkpoint(tmp_path / "checkpoints" / "step_000009")
    (tmp_path / "checkpoints" / "step_000009").mkdir(parents=True)
    with pytest.raises(LoramoeError, match="cannot be used: it has no MANIFEST.json"):
        read_checkpoint(tmp_path / "checkpoints" / "step_000009")
