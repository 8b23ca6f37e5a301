"""Signals to the real command, on one rank and on two; and two commands in one run folder."""

import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from loramoe_train.training.checkpoint import fault, find_latest
from tests.cli import (
    ADAPTER,
    MIXER,
    NO_EVAL,
    TWO_TASKS,
    check_refused,
    half_written,
    lines,
    losses,
    same_bytes,
    start_cli,
)
from tests.forks import Forked, command

STEPS = 20  # half of them in each stage
FEW = 12  # for two ranks
RUN = (*MIXER, *TWO_TASKS, f"trainer.max_steps={STEPS}", "trainer.checkpoint_every=1", "resume=auto")
NUMBERS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)


def start(folder: Path, run_dir: Path, *arguments: str, **environment: str) -> Forked:
    given = ("train", (*RUN, NO_EVAL, f"run_dir={run_dir}", *arguments))
    return Forked(folder / "said", command, *given, cwd=folder, **environment)


@contextmanager
def ranks(folder: Path, run_dir: Path) -> Iterator[list[Forked]]:
    """The command on two ranks, as a launcher would start it."""
    with socket.socket() as free, ExitStack() as stack:
        free.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "ACCELERATE_USE_CPU": "true"}
        free.close()
        size = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        yield [
            stack.enter_context(
                start(folder / str(rank), run_dir, RANK=str(rank), LOCAL_RANK=str(rank), **place, **size)
            )
            for rank in (0, 1)
        ]


def trained(run_dir: Path) -> int:
    log = run_dir / "metrics.jsonl"
    return log.read_text().count('"kind": "train"') if log.is_file() else 0


def wait_for(running: Forked, run_dir: Path, steps: int) -> None:
    running.wait_until(lambda: trained(run_dir) >= steps)


def check_stopped(running: Forked, code: int, *words: str) -> str:
    returned = running.wait()
    return check_refused(subprocess.CompletedProcess([], returned, running.stdout, running.stderr), code, *words)


def check_saved(run_dir: Path, at_least: int) -> int:
    """The checkpoint after the last step in the log is there and complete, and nothing else; returns the step."""
    done = len(losses(run_dir))
    assert at_least <= done and not (run_dir / ADAPTER).exists(), "the signal came after the end: nothing was tested"
    latest = find_latest(run_dir, on_skip=pytest.fail)
    assert latest.name == f"step_{done:06d}" and not half_written(run_dir)
    return done


@pytest.mark.slow
def test_a_stopped_command_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    """Every signal in turn, over both stages, and the adapter is that of a run nobody touched."""
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    with start(tmp_path, whole, "trainer.checkpoint_every=null") as running:
        assert running.wait() == 0, running.stderr
    done = 0
    for number, steps in zip(NUMBERS, (1, 3, 6, STEPS // 2 + 2), strict=True):
        with start(tmp_path, stopped) as running:
            wait_for(running, stopped, max(steps, done + 1))
            running.send(number)
            name, code = ("Ctrl-C", 130) if number == signal.SIGINT else (number.name, 75)
            check_stopped(running, code, f"stopped by {name} after step", "resume=auto continues")
        done = check_saved(stopped, max(steps, done + 1))
    assert {entry["stage"] for entry in lines(stopped, "train")} == {"experts", "routers"}
    for _ in range(2):  # the second time there is nothing left to do
        with start(tmp_path, stopped) as running:
            assert running.wait() == 0, running.stderr
        assert same_bytes(whole, stopped) and lines(stopped, "train") == lines(whole, "train")
    assert f"1/{STEPS // 2}" not in running.stderr and f"continuing step_{STEPS:06d}" in running.stderr


@pytest.mark.slow
def test_a_signal_to_one_rank_stops_both(tmp_path: Path) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    with ranks(tmp_path, whole) as both:
        assert [rank.wait() for rank in both] == [0, 0], both[0].stderr + both[1].stderr
    done = 0
    for steps, number, to, code, told in (
        (1, signal.SIGUSR1, 1, 75, ("a signal to another process", "SIGUSR1")),
        (FEW // 2 + 1, signal.SIGINT, 1, 130, ("Ctrl-C", "Ctrl-C")),
    ):
        with ranks(tmp_path, stopped) as both:
            wait_for(both[0], stopped, max(steps, done + 1))
            both[to].send(number)
            for rank, name in zip(both, told, strict=True):
                check_stopped(rank, code, f"stopped by {name} after step", "resume=auto continues")
        done = check_saved(stopped, max(steps, done + 1))
    with ranks(tmp_path, stopped) as both:
        assert [rank.wait() for rank in both] == [0, 0], both[0].stderr + both[1].stderr
    assert same_bytes(whole, stopped) and lines(stopped, "train") == lines(whole, "train")


@pytest.mark.nightly
def test_a_launcher_hands_sigterm_on(tmp_path: Path) -> None:
    """torchrun's own exit code is 1; what counts is that all ranks have saved."""
    run_dir = tmp_path / "run"
    launcher = start_cli("train", *RUN, NO_EVAL, f"run_dir={run_dir}", cwd=tmp_path, processes=2)
    try:
        deadline = time.monotonic() + 180
        while trained(run_dir) < 4 and launcher.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        launcher.send_signal(signal.SIGTERM)
        _, errors = launcher.communicate(timeout=120)
    finally:
        launcher.kill()
    assert launcher.returncode == 1 and errors.count("stopped by SIGTERM after step") == 2, errors
    check_saved(run_dir, 4)


def stalled(arguments: tuple[str, ...]) -> None:
    """The command with a first step that takes ten minutes."""
    from loramoe_train.data.stage import MixtureStage

    steps = MixtureStage.steps

    def slow(self: MixtureStage, **which: Any) -> Iterator[Any]:
        print("a step begins", flush=True)
        time.sleep(600)
        yield from steps(self, **which)

    MixtureStage.steps = slow
    command("train", arguments)


def test_a_second_ctrl_c_stops_the_command_at_once(tmp_path: Path) -> None:
    arguments = (*RUN, NO_EVAL, f"run_dir={tmp_path / 'run'}")
    with Forked(tmp_path / "said", stalled, arguments, cwd=tmp_path) as running:
        running.wait_until(lambda: "a step begins" in running.stdout)
        running.send(signal.SIGINT)
        running.wait_until(lambda: "saving after this step; again to stop at once" in running.stderr)
        running.send(signal.SIGINT)
        check_stopped(running, 130, "stopped at once by Ctrl-C")


def ringing(number: int, name: str, arguments: tuple[str, ...]) -> None:
    """The command with a signal to itself when a function of run.py is called, and again while it leaves."""
    from loramoe_train import guard, run

    def ring(*given: Any, **named: Any) -> None:
        os.kill(os.getpid(), number)
        time.sleep(60)

    fail = guard.fail

    def fail_and_ring(message: str, code: int) -> None:
        try:
            fail(message, code)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)

    setattr(run, name, ring)
    guard.fail = fail_and_ring
    command("train", arguments)


@pytest.mark.parametrize(
    ("number", "name"), [(signal.SIGUSR1, "prepare"), (signal.SIGUSR2, "evaluate_routed"), (signal.SIGINT, "prepare")]
)
def test_a_signal_before_and_after_training(number: signal.Signals, name: str, tmp_path: Path) -> None:
    """There is nothing to save, or all is saved: it ends at once, in one line, and another signal changes nothing."""
    run_dir = tmp_path / "run"
    arguments = (*MIXER, *TWO_TASKS, "trainer.max_steps=2", "resume=auto", f"run_dir={run_dir}")
    with Forked(tmp_path / "said", ringing, number, name, arguments, cwd=tmp_path) as running:
        if number == signal.SIGINT:
            check_stopped(running, 130, "interrupted")
        else:
            check_stopped(running, 75, f"stopped by {number.name}; the same command with resume=auto goes on")
    if name == "prepare":
        assert not run_dir.exists()  # the corrected command may use it
    else:
        assert (run_dir / ADAPTER).is_file() and find_latest(run_dir).name == "step_000002"
        assert not (run_dir / ".lock").exists()


@pytest.mark.slow
def test_two_commands_in_one_folder(tmp_path: Path) -> None:
    """Started together, one is refused; the other goes on, and when it is killed the folder is free."""
    run_dir = tmp_path / "run"
    with start(tmp_path / "a", run_dir) as a, start(tmp_path / "b", run_dir) as b:
        a.wait_until(lambda: not (a.running and b.running) or trained(run_dir) >= 2)
        assert trained(run_dir) < STEPS
        a.wait_until(lambda: not (a.running and b.running))
        winner, loser = (a, b) if a.running else (b, a)
        check_stopped(loser, 2, f"run_dir={run_dir} is in use by process {winner.pid} on ", "another run_dir")
        winner.wait_until(lambda: trained(run_dir) >= 2)
        assert winner.kill() == -signal.SIGKILL and (run_dir / ".lock").exists()
    assert all(fault(path) is None for path in (run_dir / "checkpoints").glob("step_??????"))
    with start(tmp_path / "c", run_dir, "trainer.checkpoint_every=null") as again:
        assert again.wait() == 0, again.stderr
    assert not (run_dir / ".lock").exists() and len(losses(run_dir)) == STEPS and "continuing step_" in again.stderr
