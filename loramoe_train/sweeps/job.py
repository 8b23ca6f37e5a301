"""One run of a sweep, in the process or processes that were started for it.

submitit has a handler for SIGUSR2, which queues the job again and ends the process without asking anybody to save. The
training loop puts its own in that place, saves at the next step and then calls submitit's (training/signals.py); here
only what submitit says when it will not queue again becomes one line of ours. The next start reads the same config and
goes on from the newest checkpoint of its own folder.

A partition with a grace time preempts by SIGTERM, and SLURM takes a job that leaves meanwhile for one that has failed.
So a run that was told to leave by a preemption is handed to submitit's handler too, once it has saved.
"""

import logging
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Any

from loramoe_train.errors import DataError, LoramoeError, MissingFileError, SavedOnSignal
from loramoe_train.guard import guard
from loramoe_train.rundir import RESULTS
from loramoe_train.sweeps.sweep import Run, read_sweep
from loramoe_train.training.signals import ignore_signals

IDLE_STARTS = 3  # in a row, after which a run is not queued again
REQUEUE_WAIT = 60  # seconds that the other ranks give rank 0 to queue the job again: scontrol's own limit in submitit


class SweepJob:
    """What submitit calls in every process of a job, and what it queues again."""

    idle = 0  # starts in a row that ended before anything was done; submitit stores it with the job
    began_at: tuple[int | None, int] | None = None

    def __call__(self, root: str, number: int) -> None:
        from submitit import JobEnvironment
        from submitit.helpers import TorchDistributedEnvironment

        environment = JobEnvironment()
        if environment.num_tasks > 1:
            # the devices stay as the scheduler gave them; accelerate takes the one of the local rank
            TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # submitit ignores it; a run must save, or end
        told = _in_our_words()
        usual = getattr(signal, f"SIG{environment.USR_SIG}")
        queue_again = signal.getsignal(usual)  # kept, because a process that leaves ignores it
        self.began_at = _progress(root, number)
        try:
            run_one(Path(root), number)
        except SystemExit as left:
            if left.code == SavedOnSignal.exit_code and not told and _is_preempted(environment.job_id):
                assert callable(queue_again)  # submitit's, with our words around it
                guard(lambda: queue_again(usual, None))
            if environment.global_rank > 0 and told:
                # a cluster may end a job with its first process, and rank 0 has not queued it again yet
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
                time.sleep(REQUEUE_WAIT)
            ignore_signals()  # SLURM's SIGTERM for a job that it queues again finds it leaving
            raise

    def checkpoint(self, root: str, number: int) -> Any:
        """The same again: the run's folder holds the rest.

        Raises SavedOnSignal where that has led nowhere, for a run without time for one step would come back for ever.
        """
        from submitit.helpers import DelayedSubmission

        self.idle = self.idle + 1 if _progress(root, number) == self.began_at else 0
        if self.idle >= IDLE_STARTS:
            raise SavedOnSignal(
                f"not queued again: {self.idle} starts in a row ended before a step was done or a benchmark scored;"
                " give a larger launcher.timeout_min to loramoe-sweep retry-failed, which goes on"
            )
        return DelayedSubmission(self, root, number)


def _progress(root: str, number: int) -> tuple[int | None, int] | None:
    """How far a run is: the last step in its log, and how many benchmarks are scored. None where that is not known."""
    from loramoe_train.evaluation.units import SAMPLES
    from loramoe_train.sweeps.status import last_step

    try:
        sweep = read_sweep(Path(root))
        folder = sweep.folder(sweep.runs[number])
    except (LoramoeError, IndexError):  # told, in its words, by what reads it next
        return None
    return last_step(folder), len(list((folder / SAMPLES).glob("*.json")))


def _in_our_words() -> list[int]:
    """Lay a handler over submitit's that calls it; returns a list that is not empty once it was called."""
    from submitit.core.utils import UncompletedJobError

    told: list[int] = []

    def wrap(number: signal.Signals) -> None:
        theirs = signal.getsignal(number)
        if not callable(theirs):
            return

        def ours(received: int, frame: FrameType | None) -> None:
            told.append(received)
            try:
                theirs(received, frame)
            except UncompletedJobError as error:
                reason = str(error).removeprefix("Job not requeued because: ").rstrip(".")
                raise SavedOnSignal(
                    f"stopped by {signal.Signals(received).name} and not queued again: {reason}; give a larger"
                    " launcher.timeout_min or launcher.max_num_timeout to loramoe-sweep retry-failed, which goes on"
                ) from None
            except (OSError, subprocess.SubprocessError) as error:
                raise SavedOnSignal(
                    f"stopped by {signal.Signals(received).name} and could not be queued again ({error});"
                    " loramoe-sweep retry-failed goes on"
                ) from None

        signal.signal(number, ours)

    for number in (signal.SIGUSR1, signal.SIGUSR2):
        wrap(number)
    return told


def _is_preempted(job: str) -> bool:
    """Whether SLURM wants the job's place, and has not queued it again yet: it runs in its grace time.

    One that was cancelled, or queued again by hand, is not running any more while its processes leave.
    """
    try:
        said = subprocess.run(("scontrol", "-o", "show", "job", job), capture_output=True, text=True, timeout=60).stdout
    except (OSError, subprocess.TimeoutExpired):
        return False
    facts = dict(re.findall(r"(JobState|PreemptTime)=(\S+)", said))
    return facts.get("JobState") == "RUNNING" and facts.get("PreemptTime", "None") != "None"


def run_one(root: Path, number: int) -> None:
    """Train run `number` of the sweep in `root`, or go on with it. Exits as `loramoe-train` does."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")

    def job() -> None:
        sweep = read_sweep(root.absolute())
        run = sweep.runs[number]
        if not Path(sweep.cwd).is_dir():
            raise MissingFileError(f"{sweep.cwd}, where the sweep was started, is not there on this machine")
        os.chdir(sweep.cwd)
        folder = sweep.folder(run)
        if _has_results(folder):
            print(f"{folder} has its results already", file=sys.stderr)
            return
        config = sweep.config(run)
        sys.argv[:] = _as_one_run(run, folder)  # told in results.json
        from loramoe_train.rundir import check_places
        from loramoe_train.settle import settle

        check_places(config)  # both before torch is imported
        settled = settle(config)
        from loramoe_train.run import train_run

        train_run(config, settled)

    guard(job)


def _as_one_run(run: Run, folder: Path) -> list[str]:
    """The command that would train this run alone."""
    keys = ((text, text.lstrip("+~").partition("=")[0]) for text in run.overrides)
    own = [text for text, key in keys if key not in ("run_dir", "resume", "launcher") and key[:9] != "launcher."]
    return ["loramoe-train", *own, f"run_dir={folder}", "resume=auto"]


def _has_results(folder: Path) -> bool:
    from loramoe_train.evaluation.results import read_results

    try:
        read_results(folder / RESULTS)
    except (MissingFileError, DataError):
        return False
    return True


if __name__ == "__main__":
    run_one(Path(sys.argv[1]), int(sys.argv[2]))
