"""SIGKILL at random moments, saves included: what is resumed from the pieces ends as if nothing had happened."""

import random
import signal
import time
from contextlib import suppress
from pathlib import Path

import pytest
from safetensors.torch import save_file

from loramoe_train.training.checkpoint import fault, find_latest, step_of
from tests.forks import Forked
from tests.training.harness import make_parts, make_trainer, train, weights
from tests.training.test_resume import RUN, log
from tests.training.test_writer import content
from tests.training.worker import announced

WEIGHTS, KEEP = "weights.safetensors", 2
EARLY = 0.15  # of the kills come while a start still builds, restores and cuts the log


def settings(steps: int, keep: int) -> dict:
    second = {"train": ["experts", "routers"], "steps": steps // 2, "anchor": 0.05}
    stages = {"first": {"train": ["experts"], "routing": "by_domain", "steps": steps - steps // 2}, "second": second}
    return {"eval_every": 3, "log_every": 2, "checkpoint_every": 1, "keep": keep, "stages": stages}


def one_start(run_dir: Path, trainer: dict) -> None:
    """In a process of its own: go on from the newest complete checkpoint to the end. Says `step N` for every step."""
    parts = make_parts(**RUN)
    train(announced(parts), make_trainer(**trainer), run_dir, resume=find_latest(run_dir))
    aside = run_dir / "aside"
    save_file(weights(parts), aside)
    aside.rename(run_dir / WEIGHTS)


class Killer:
    """Starts a run again and again, and kills it."""

    def __init__(self, folder: Path, steps: int, seed: int) -> None:
        self.folder, self.steps, self.random = folder, steps, random.Random(seed)
        self.runs = self.kills = self.early = self.in_save = 0
        self.whole = folder / "whole"
        with Forked(folder / "said", one_start, self.whole, settings(steps, keep=1000)) as running:
            running.wait_until(lambda: "step" in running.stdout)
            began = time.monotonic()
            assert running.wait() == 0, running.stderr
        self.pace = (time.monotonic() - began) / steps  # seconds for a step with its save

    def run_once(self, kills: int) -> None:
        """A run that is killed until a start comes to the end before its kill, or was killed often enough; then it
        must be the whole run."""
        self.runs += 1
        run_dir, newest = self.folder / f"run_{self.runs}", -1
        while self.start(run_dir, to_kill=self.kills < kills):
            found = find_latest(run_dir)
            assert found is None or fault(found) is None
            now = -1 if found is None else step_of(found)
            assert now >= newest, "a checkpoint that was complete is gone"
            newest = now
        self.compare(run_dir)

    def start(self, run_dir: Path, *, to_kill: bool) -> bool:
        """Whether it was killed before the end."""
        before = half_written(run_dir)
        with Forked(self.folder / "said", one_start, run_dir, settings(self.steps, KEEP)) as running:
            early = self.random.random() < EARLY
            if not to_kill:
                assert running.wait() == 0, running.stderr
                return False
            if early:
                time.sleep(self.random.uniform(0.0, 2 * self.pace))
            else:
                running.wait_until(lambda: "step" in running.stdout or not running.running)
                time.sleep(self.random.uniform(0.0, 2.5 * self.pace))
                if self.random.random() < 0.5:  # of the kills are aimed at a save
                    wait_for_save(run_dir, running, before)
            code = running.kill()
        if code == 0:
            return False
        assert code == -signal.SIGKILL, running.stderr
        self.kills += 1
        self.early += early
        self.in_save += bool(half_written(run_dir) - before)
        return True

    def compare(self, run_dir: Path) -> None:
        assert (run_dir / WEIGHTS).read_bytes() == (self.whole / WEIGHTS).read_bytes()
        assert log(run_dir) == log(self.whole) and len(log(run_dir)) > self.steps
        complete = [path for path in (run_dir / "checkpoints").iterdir() if fault(path) is None]
        newest = {f"step_{step:06d}" for step in range(self.steps - KEEP + 1, self.steps + 1)}
        assert newest <= {path.name for path in complete}
        for path in complete:
            assert content(path) == content(self.whole / "checkpoints" / path.name), path.name


def half_written(run_dir: Path) -> set[tuple[int, int]]:
    """Folders that only a save in progress leaves, told apart from those of the same name that were left before."""
    found = set()
    for path in (run_dir / "checkpoints").glob("step_*.tmp"):
        with suppress(FileNotFoundError):  # renamed meanwhile
            found.add((path.stat().st_ino, path.stat().st_ctime_ns))
    return found


def wait_for_save(run_dir: Path, running: Forked, before: set[tuple[int, int]]) -> None:
    while running.running and not half_written(run_dir) - before:
        time.sleep(0.002)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kills", "steps"), [(10, 8), pytest.param(100, 24, marks=pytest.mark.nightly)], ids=["short", "long"]
)
def test_killed_at_random_moments_it_ends_the_same(kills: int, steps: int, tmp_path: Path) -> None:
    began, killer = time.monotonic(), Killer(tmp_path, steps, seed=kills)
    while killer.kills < kills:
        killer.run_once(kills)
    print(
        f"\n{killer.kills} kills in {killer.runs} runs of {steps} steps, {time.monotonic() - began:.0f} s: "
        f"{killer.in_save} inside a save, {killer.early} before training went on"
    )
    assert killer.in_save >= kills // 8, "too few kills landed inside a save"
