"""Checkpoints that are written while training goes on. Orders of events, never of clocks."""

import errno
import json
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from loramoe_train.errors import DivergedError, LoramoeError, SavedOnSignal
from loramoe_train.training.checkpoint import fault, find_latest
from loramoe_train.training.parts import TrainingParts
from loramoe_train.training.snapshot import snapshot
from loramoe_train.training.writer import Writer
from tests.training.harness import make_parts, make_trainer, train
from tests.training.processes import read_until, start_worker

PATIENCE = 30.0  # seconds after which a test gives up; nothing waits so long where all is well
ONE_STAGE = {"only": {"train": ["experts"], "routing": "by_domain", "steps": 4}}


class Watched:
    """Stage data that tells which step is being prepared."""

    def __init__(self, data, tell: Callable[[int], None]) -> None:
        self.data, self.tell = data, tell

    def steps(self, *, start: int, **which: int) -> Iterator[list]:
        for step, batches in enumerate(self.data.steps(start=start, **which), start):
            self.tell(step)
            yield batches


def slow(parts: TrainingParts, *, until: int, on_step: Callable[[int], None] = lambda step: None) -> tuple:
    """The parts with a first checkpoint that is not written before step `until` is being prepared; what happened."""
    events, reached, made = [], threading.Event(), parts.stage_data

    def tell(step: int) -> None:
        on_step(step)
        events.append(f"step {step}")
        if step == until:
            reached.set()

    def save_adapter(folder: Path, tensors: Mapping[str, Tensor]) -> None:
        first = not any(event.startswith("write") for event in events)
        events.append(f"write {folder.name}")
        if first:
            assert reached.wait(PATIENCE), "training waited for the write"
        parts.save_adapter(folder, tensors)
        events.append(f"wrote {folder.name}")

    return replace(parts, stage_data=lambda name: Watched(made(name), tell), save_adapter=save_adapter), events


def content(checkpoint: Path) -> dict[str, object]:
    """Every file of a checkpoint, byte for byte but for what depends on the clock."""
    assert fault(checkpoint) is None
    found: dict[str, object] = {p.name: p.read_bytes() for p in checkpoint.rglob("*.safetensors")}
    state = json.loads((checkpoint / "state" / "trainer.json").read_text())
    for timed in (state["stage_state"], state["stage_state"]["window"], *state["history"]):
        timed.pop("seconds")
    return found | {"trainer.json": state}


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path: Path) -> None:
    parts, events = slow(make_parts(), until=1)
    train(parts, make_trainer(stages=ONE_STAGE, checkpoint_every=1, keep=10), tmp_path)
    assert events.index("step 1") < events.index("wrote step_000001.tmp") < events.index("step 2")
    writes = [event.split()[0] for event in events if event.startswith("wr")]
    assert writes == ["write", "wrote"] * 4  # never two at a time
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {f"step_00000{n}" for n in (1, 2, 3, 4)}


def test_a_checkpoint_holds_its_own_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Written an optimizer step later it has the bytes that it would have had at once."""
    trainer = make_trainer(stages={"only": {"steps": 5, "anchor": 0.1}}, checkpoint_every=2, keep=10)
    options = {"dropout": 0.3, "micro": 4, "validation": False}
    parts, events = slow(make_parts(**options), until=3)
    train(parts, trainer, tmp_path / "late")
    assert events.index("step 3") < events.index("wrote step_000002.tmp")
    monkeypatch.setattr(Writer, "start", lambda self, work: work())
    train(make_parts(**options), trainer, tmp_path / "at_once")
    for step in (2, 4, 5):
        late, at_once = (tmp_path / kind / "checkpoints" / f"step_00000{step}" for kind in ("late", "at_once"))
        assert content(late) == content(at_once)
    assert content(late) != content(late.with_name("step_000002"))  # or the comparison could not fail


def test_a_snapshot_shares_nothing() -> None:
    base = torch.arange(6.0).view(2, 3)
    taken = snapshot({"a": {"x": base, "turned": base.T}, "b": {"x": base}})
    base.zero_()
    assert torch.equal(taken["a"]["x"], torch.arange(6.0).view(2, 3)) and torch.equal(taken["b"]["x"], taken["a"]["x"])
    assert torch.equal(taken["a"]["turned"], torch.arange(6.0).view(2, 3).T) and taken["a"]["turned"].is_contiguous()
    places = {tensor.data_ptr() for tensors in taken.values() for tensor in tensors.values()}
    assert len(places) == 3 and base.data_ptr() not in places


def failing(parts: TrainingParts, at: int) -> TrainingParts:
    """The parts with a disk that is full at the `at`-th save."""
    saves = []

    def save_adapter(folder: Path, tensors: Mapping[str, Tensor]) -> None:
        saves.append(folder)
        if len(saves) == at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        parts.save_adapter(folder, tensors)

    return replace(parts, save_adapter=save_adapter)


@pytest.mark.parametrize(("at", "left"), [(1, []), (3, ["step_000001", "step_000002"]), (4, ["step_000003"])])
def test_a_failure_comes_out_at_the_next_save_or_at_the_end(at: int, left: list[str], tmp_path: Path) -> None:
    trainer = make_trainer(stages=ONE_STAGE, checkpoint_every=1)
    said = f"step_00000{at} could not be written .No space left on device.; the former checkpoints are intact"
    with pytest.raises(LoramoeError, match=said):
        train(failing(make_parts(validation=False), at), trainer, tmp_path)
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names[-len(left) :] == left if left else names == []
    assert all(fault(tmp_path / "checkpoints" / name) is None for name in names)


def test_a_failure_is_said_when_the_run_ends_by_another_error(tmp_path: Path) -> None:
    import io

    from rich.console import Console

    parts = make_parts()

    def poison(step: int) -> None:
        if step == 2:
            with torch.no_grad():
                parts.model.model.norm.weight.fill_(float("inf"))

    made = parts.stage_data
    bad = replace(failing(parts, 1), stage_data=lambda name: Watched(made(name), poison))
    output = io.StringIO()
    with pytest.raises(DivergedError):
        train(bad, make_trainer(checkpoint_every=2), tmp_path, console=Console(file=output, width=500))
    assert "warning: checkpoint" in output.getvalue() and "No space left on device" in output.getvalue()


def test_a_signal_while_a_checkpoint_is_written(tmp_path: Path) -> None:
    def ring(step: int) -> None:
        if step == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    parts, events = slow(make_parts(), until=1, on_step=ring)
    with pytest.raises(SavedOnSignal, match="stopped by SIGTERM after step 2"):
        train(parts, make_trainer(stages=ONE_STAGE, checkpoint_every=1), tmp_path)
    assert events[-1] == "wrote step_000002.tmp"
    for name in ("step_000001", "step_000002"):
        assert fault(tmp_path / "checkpoints" / name) is None


def test_the_best_checkpoint_is_spared_by_a_write_that_comes_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from loramoe_train.training import stage_run
    from loramoe_train.training.validation import EvalResult

    curve = iter([2.0, 3.0, 4.0, 5.0])  # best after the first step, whose checkpoint is written during the third
    monkeypatch.setattr(stage_run, "evaluate", lambda *a, **k: EvalResult(next(curve), {}))
    parts, _ = slow(make_parts(), until=1)
    summary = train(parts, make_trainer(stages=ONE_STAGE, eval_every=1, checkpoint_every=1, keep=1), tmp_path)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step_000001", "step_000003", "step_000004"]
    assert summary.best_checkpoint.name == "step_000001"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGTERM, 75), pytest.param(signal.SIGINT, 130, marks=pytest.mark.nightly), (signal.SIGKILL, -9)],
)
def test_a_process_that_is_stopped_while_it_writes(number: int, code: int, tmp_path: Path) -> None:
    """Asked to stop it finishes both checkpoints; killed it leaves the former one."""
    trainer = {"checkpoint_every": 1, "keep": 10, "stages": ONE_STAGE}
    worker = start_worker({"run_dir": str(tmp_path), "trainer": trainer, "hold": 2, "pause": 0.2})
    read_until(worker, "writing 2")
    worker.send_signal(number)
    _, errors = worker.communicate(timeout=120)
    assert worker.returncode == code, errors
    latest = find_latest(tmp_path)
    if number == signal.SIGKILL:
        assert latest.name == "step_000001" and (tmp_path / "checkpoints" / "step_000002.tmp").is_dir()
    else:
        assert latest.name == "step_000003" and "Traceback" not in errors
        assert fault(tmp_path / "checkpoints" / "step_000002") is None


def test_the_writer_hands_errors_on_once() -> None:
    writer, started = Writer(), threading.Event()

    def fail() -> None:
        started.set()
        raise OSError(errno.EIO, "broken")

    writer.start(fail)
    assert started.wait(PATIENCE)
    with pytest.raises(OSError, match="broken"):
        writer.wait()
    writer.wait()
    writer.start(fail)
    assert "broken" in str(writer.close())
