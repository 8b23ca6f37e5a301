"""What has become of a sweep's runs, from their folders, their logs and the queue. Reads only; no torch in here."""

import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loramoe_train.errors import DataError, LoramoeError, MissingFileError, printable
from loramoe_train.evaluation.results import read_results
from loramoe_train.rundir import RESULTS
from loramoe_train.sweeps.sweep import INNER, Run, Sweep, is_locked

DONE, RUNNING, WAITING, FAILED, UNKNOWN = "done", "running", "waiting", "failed", "unknown"
TAIL_BYTES = 1 << 16
SAID = re.compile(r"^(loramoe: |slurmstepd: error: |.*\b\w+(Error|Exception)\b|.*out of memory|Killed)", re.IGNORECASE)
NO_NEWS = re.compile(r"^(submitit \w+ |\w+ submitit: |srun: |\s*$)")


@dataclass(frozen=True)
class RunStatus:
    run: Run
    state: str
    why: str = ""  # of a run that failed, the last line that says so
    step: int | None = None  # optimizer steps in its log
    results: Mapping[str, Any] = field(default_factory=dict, repr=False)  # of a run that is done


def statuses(sweep: Sweep, queued: Mapping[str, str] | None) -> list[RunStatus]:
    """What each run is doing. `queued`: job id -> SLURM's state; None: SLURM could not be asked."""
    pooled = is_locked(sweep.root / INNER)
    return [_status(sweep, run, queued, pooled) for run in sweep.runs]


def ask(sweep: Sweep) -> dict[str, str]:
    """The states of the newest jobs of runs that have no results yet. Raises LoramoeError when SLURM is silent."""
    if sweep.launcher != "slurm":
        return {}
    from loramoe_train.sweeps.slurm import queue

    open_runs = (run for run in sweep.runs if run.jobs and not (sweep.folder(run) / RESULTS).is_file())
    return queue(run.jobs[-1].id for run in open_runs)


def look(sweep: Sweep, note: Callable[[str], None] = lambda line: None) -> list[RunStatus]:
    """What each run is doing; those that only SLURM knows of are `unknown` while it is silent."""
    try:
        return statuses(sweep, ask(sweep))
    except LoramoeError as error:
        note(f"note: {error}")
        return statuses(sweep, None)


def _status(sweep: Sweep, run: Run, queued: Mapping[str, str] | None, pooled: bool) -> RunStatus:
    from loramoe_train.sweeps import slurm

    folder = sweep.folder(run)
    done, damaged = _results(run, folder)
    if done is not None:
        return done
    step = last_step(folder)
    if not run.jobs:
        return RunStatus(run, FAILED, "it was never started", step)
    job = run.jobs[-1]
    state = (queued or {}).get(job.id, "")
    if state in (*slurm.WAITING, *slurm.RUNNING):
        return RunStatus(run, WAITING if state in slurm.WAITING else RUNNING, "", step)
    if is_locked(folder):
        return RunStatus(run, RUNNING, "", step)
    log = sweep.root / job.log
    if sweep.launcher == "local" and pooled and not log.is_file():
        return RunStatus(run, WAITING, "", step)
    if queued is None:
        return RunStatus(run, UNKNOWN, "SLURM could not be asked", step)
    done, damaged = _results(run, folder)  # it may have ended since the first look, before that for its lock
    if done is not None:
        return done
    said = damaged or (last_error(log) if log.is_file() else "its job never began: it was cancelled, or lost")
    if sweep.launcher == "local" and pooled and not said:
        return RunStatus(run, RUNNING, "", step)  # it has not reached its folder yet
    ended = state if state not in ("COMPLETED", "FAILED") else ""
    return RunStatus(run, FAILED, ": ".join(filter(None, (ended, said))) or "it left no results and said nothing", step)


def _results(run: Run, folder: Path) -> tuple[RunStatus | None, str]:
    """The status of a run that is done, and what is wrong with results that cannot be read."""
    try:
        return RunStatus(run, DONE, results=read_results(folder / RESULTS)), ""
    except MissingFileError:
        return None, ""
    except DataError as error:
        return None, str(error)


def last_step(folder: Path) -> int | None:
    """The newest step in a run's log; None before the first."""
    for line in reversed(_tail(folder / "metrics.jsonl")):
        try:
            return int(json.loads(line)["step"])
        except (ValueError, KeyError, TypeError):
            continue  # cut short at either end
    return None


def last_error(log: Path) -> str:
    """The last line of a log that says what went wrong; the last one at all if none does; "" for an empty log."""
    lines = [line.strip() for line in _tail(log) if not NO_NEWS.match(line)]
    found = next((line for line in reversed(lines) if SAID.match(line)), lines[-1] if lines else "")
    return printable(found.removeprefix("loramoe: "))


def _tail(path: Path) -> list[str]:
    try:
        with path.open("rb") as file:
            file.seek(max(file.seek(0, os.SEEK_END) - TAIL_BYTES, 0))
            return file.read().decode(errors="replace").splitlines()
    except OSError:
        return []


def summary(found: list[RunStatus]) -> str:
    """`4 done, 1 running, 1 failed`."""
    counts = (
        (state, sum(each.state == state for each in found)) for state in (DONE, RUNNING, WAITING, FAILED, UNKNOWN)
    )
    return ", ".join(f"{count} {state}" for state, count in counts if count)
