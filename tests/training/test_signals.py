"""Real signals to real processes: what is saved, what is said, how they exit."""

import json
import signal
from pathlib import Path

import pytest

from loramoe_train.training.checkpoint import find_latest
from loramoe_train.training.signals import StopSignals
from tests.training.processes import read_until, run_worker, start_worker

pytestmark = pytest.mark.slow


def stop(options: dict, number: int) -> tuple[int, str, str]:
    """Signal a run while it prepares its second step; returns exit code, output, errors."""
    worker = start_worker(options)
    said = read_until(worker, "step 1")
    worker.send_signal(number)
    output, errors = worker.communicate(timeout=120)
    return worker.returncode, said + output, errors


@pytest.mark.parametrize(
    ("number", "code", "words"),
    [
        (signal.SIGTERM, 75, "stopped by SIGTERM after step 2"),
        pytest.param(signal.SIGUSR1, 75, "stopped by SIGUSR1 after step 2", marks=pytest.mark.nightly),
        (signal.SIGUSR2, 75, "stopped by SIGUSR2 after step 2"),
        (signal.SIGINT, 130, "stopped by Ctrl-C after step 2"),
    ],
)
def test_finish_the_step_save_and_leave(number: int, code: int, words: str, tmp_path: Path) -> None:
    options = {"run_dir": str(tmp_path), "pause": 1.0, "listen": True}
    returned, output, errors = stop(options, number)
    assert returned == code, errors
    assert words in errors and "Traceback" not in errors
    assert find_latest(tmp_path).name == "step_000002"
    assert ("requeued step_000002" in output) == (number == signal.SIGUSR2)
    if number == signal.SIGTERM:
        output = run_worker({**options, "pause": 0.0, "resume": "auto"})
        steps = [line for line in output.splitlines() if line.startswith("step")]
        assert steps == ["step 2", "step 0", "step 1", "step 2"] and "done" in output
        kinds = [json.loads(line)["kind"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
        assert kinds.count("stage") == 2


def test_a_second_ctrl_c(tmp_path: Path) -> None:
    """The step would take a minute."""
    worker = start_worker({"run_dir": str(tmp_path), "pause": 60.0})
    read_until(worker, "step 0")
    worker.send_signal(signal.SIGINT)
    with pytest.raises(Exception, match="timed out"):
        worker.wait(timeout=2)  # the first one is only noted
    worker.send_signal(signal.SIGINT)
    _, errors = worker.communicate(timeout=30)
    assert worker.returncode == 130 and "stopped at once by Ctrl-C" in errors and "Traceback" not in errors


@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGUSR2])
def test_whoever_listened_is_told_whatever_came_first(first: int) -> None:
    """A scheduler that preempts may send SIGTERM before the signal that queues the job again."""
    told: list[int] = []
    before = signal.signal(signal.SIGUSR2, lambda number, frame: told.append(number))
    try:
        with StopSignals() as signals:
            for number in (first, signal.SIGTERM, signal.SIGUSR2):
                signal.raise_signal(number)
            assert not told and signals.received == first
            signals.chain()
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert told == [signal.SIGUSR2]
