"""Start a sweep, and wait for it or not."""

import time
from collections.abc import Callable, Sequence
from typing import Any

from loramoe_train.errors import ConfigError, LoramoeError, SweepFailed
from loramoe_train.sweeps.pool import at_once, devices, jobs_for, run_pool, start_in_background
from loramoe_train.sweeps.slurm import cancel, check_slurm, merged, submit
from loramoe_train.sweeps.status import DONE, FAILED, RunStatus, look, summary
from loramoe_train.sweeps.sweep import Composed, Sweep, alone_with, checked, counted, create, discard, read_sweep

POLL_SECONDS = 5
Say = Callable[[str], None]


def start(composed: Sequence[Composed], hydras: dict[str, Any], *, wait: bool, say: Say) -> Sweep:
    """Check a sweep, write its folder, start its runs; with `wait` until the last has ended.

    Raises ConfigError with nothing written and nothing started; SweepFailed after waiting, when runs have failed.
    """
    launcher = composed[0].config.launcher
    if launcher.name == "slurm":
        if launcher.signal_delay_s >= 60 * launcher.timeout_min:
            raise ConfigError(
                f"launcher.signal_delay_s={launcher.signal_delay_s} seconds before the end is before the start of"
                f" launcher.timeout_min={launcher.timeout_min}; give fewer seconds or more minutes"
            )
        check_slurm()
        launcher = merged(launcher, hydras)
    else:
        if hydras:
            raise ConfigError("hydra/launcher goes with launcher=slurm; leave it out, launcher=local has its own pool")
        if launcher.nodes > 1:
            raise ConfigError(f"launcher.nodes={launcher.nodes} needs launcher=slurm; local runs stay on this machine")
        at_once(launcher, devices())
    sweep, configs = checked(composed, launcher.model_dump())
    made = create(sweep, configs)
    try:
        sweep = _begin(sweep, range(len(sweep.runs)), wait=wait, say=say)
    except LoramoeError:
        if not any(run.jobs for run in read_sweep(sweep.root).runs):
            discard(sweep, made)
        raise
    return _finish(sweep, say) if wait else sweep


def again(sweep: Sweep, numbers: Sequence[int], *, wait: bool, say: Say) -> Sweep:
    """Start runs of a sweep once more; each goes on from its own newest checkpoint."""
    sweep = _begin(sweep, numbers, wait=wait, say=say)
    return _finish(sweep, say) if wait else sweep


def _begin(sweep: Sweep, numbers: Sequence[int], *, wait: bool, say: Say) -> Sweep:
    """Start runs and record their jobs. Local runs have ended afterwards, with `wait`."""
    if sweep.launcher == "slurm":
        with alone_with(sweep):
            jobs = submit(sweep, numbers)
            try:
                sweep = sweep.with_jobs(jobs)
            except LoramoeError:  # a full disk; nobody would know of them
                cancel(jobs.values())
                raise
        ids = sorted({run.jobs[-1].id.partition("_")[0] for run in sweep.runs if run.number in numbers})
        say(f"sweep {sweep.root}: {counted(numbers)} submitted as job {', '.join(ids)}")
        return sweep
    with alone_with(sweep):
        sweep = sweep.with_jobs(jobs_for(sweep, numbers))
    if wait:
        say(f"sweep {sweep.root}: {counted(numbers)}")
        run_pool(sweep, numbers, say)
    else:
        say(f"sweep {sweep.root}: {counted(numbers)} in the background; log {start_in_background(sweep, numbers)}")
    return sweep


def _finish(sweep: Sweep, say: Say) -> Sweep:
    found = _wait(sweep, say)
    failed = [each for each in found if each.state != DONE]
    say(f"sweep {sweep.root}: {summary(found)}; loramoe-sweep table {sweep.root} compares them")
    if failed:
        raise SweepFailed(
            f"{len(failed)} of {len(found)} runs failed, first {sweep.label(failed[0].run)}: {failed[0].why};"
            f" loramoe-sweep retry-failed {sweep.root} starts them again"
        )
    return sweep


def _wait(sweep: Sweep, say: Say) -> list[RunStatus]:
    """Return once no run is waiting or running. Needs no accounting: SLURM's queue and the folders say enough."""
    told: dict[int, str] = {}
    before: list[RunStatus] = []
    try:
        while True:
            found = look(sweep)
            for each in found:
                news = each.state + (f": {each.why}" if each.why else "")
                if sweep.launcher == "slurm" and told.get(each.run.number) != news:
                    say(f"{sweep.label(each.run)} {news}")
                told[each.run.number] = news
            ended = all(each.state in (DONE, FAILED) for each in found)
            if ended and found == before:  # seen twice: a shared disk may show results later than the queue does
                return found
            before = found if ended else []
            time.sleep(POLL_SECONDS)
    except KeyboardInterrupt:
        say(f"the jobs go on; loramoe-sweep status {sweep.root} tells how they do, scancel stops them")
        raise
