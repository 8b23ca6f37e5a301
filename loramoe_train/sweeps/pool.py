"""`launcher=local`: the runs of a sweep in processes of this machine, a few at a time.

Each run is a process of its own with its own log, so one that dies takes no other along. A signal to the pool is handed
to the runs, which save and leave; `loramoe-sweep retry-failed` goes on with them.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from loramoe_train.errors import ConfigError, Interrupted, SavedOnSignal, SweepFailed
from loramoe_train.schema.launcher import LauncherConfig
from loramoe_train.sweeps.sweep import INNER, Job, Sweep, alone_with, is_locked, read_sweep
from loramoe_train.training.signals import Terminated

POLL_SECONDS = 0.1
LOG = "pool.log"


def devices() -> list[str]:
    """The GPUs that runs may use, as CUDA_VISIBLE_DEVICES names them; empty without any."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        return [name for name in given.split(",") if name not in ("", "-1")]
    if shutil.which("nvidia-smi") is None:
        return []
    import torch

    return [str(index) for index in range(torch.cuda.device_count())]


def at_once(launcher: LauncherConfig, gpus: Sequence[str]) -> int:
    """How many runs share the machine. Raises ConfigError where one run wants more GPUs than there are."""
    wanted = launcher.gpus_per_node or (1 if gpus else 0)
    if wanted > len(gpus):
        raise ConfigError(f"launcher.gpus_per_node={wanted}, but this machine has {len(gpus)}; give at most that many")
    return launcher.array_parallelism or (len(gpus) // wanted if wanted else 1)


def jobs_for(sweep: Sweep, numbers: Sequence[int]) -> dict[int, Job]:
    """The next try at each run, with its place for a log."""
    tries = {number: len(sweep.runs[number].jobs) + 1 for number in numbers}
    return {number: Job(f"local-{n}", f"{INNER}/local-{n}/{number}.log") for number, n in tries.items()}


def run_pool(sweep: Sweep, numbers: Sequence[int], say: Callable[[str], None] = lambda line: None) -> None:
    """Run them all and return when they have ended; how each one ended is in its folder and its log.

    Raises SavedOnSignal or Interrupted where a signal asked the pool to stop, and SweepFailed where the next run cannot
    be started, after the runs have saved.
    """
    launcher = LauncherConfig(**sweep.parameters)
    gpus = devices()
    slots = list(range(at_once(launcher, gpus)))
    waiting, running = list(numbers), {}
    with alone_with(sweep):
        try:
            while waiting or running:
                while waiting and slots:
                    number, slot = waiting.pop(0), slots.pop(0)
                    running[number] = (_start(sweep, number, launcher, gpus, slot), slot)
                    say(f"{sweep.label(sweep.runs[number])} has begun")
                time.sleep(POLL_SECONDS)
                for number, (process, slot) in list(running.items()):
                    if process.poll() is not None:
                        _note_end(sweep, number, process.returncode)
                        del running[number]
                        slots.append(slot)
                        say(f"{sweep.label(sweep.runs[number])} {'is done' if process.returncode == 0 else 'failed'}")
        except (KeyboardInterrupt, Terminated) as stop:
            say("stopping: the runs save first; Ctrl-C stops them at once")
            _stop([process for process, _ in running.values()])
            kind, by = (SavedOnSignal, str(stop)) if isinstance(stop, Terminated) else (Interrupted, "Ctrl-C")
            raise kind(f"stopped by {by}; loramoe-sweep retry-failed {sweep.root} goes on") from None
        except OSError as error:  # no room for a log, or for a process
            _stop([process for process, _ in running.values()])
            what = f"{error.filename}: " if error.filename else ""
            raise SweepFailed(
                f"the next run cannot be started ({what}{error.strerror}), and the others were told to save;"
                f" loramoe-sweep retry-failed {sweep.root} goes on"
            ) from None


def _start(
    sweep: Sweep, number: int, launcher: LauncherConfig, gpus: Sequence[str], slot: int
) -> "subprocess.Popen[bytes]":
    environment = dict(os.environ)
    parallel = at_once(launcher, gpus)
    if gpus:
        each = launcher.gpus_per_node or 1
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(gpus[(slot * each + i) % len(gpus)] for i in range(each))
    if parallel * launcher.processes > 1:
        environment.setdefault("OMP_NUM_THREADS", str(max((os.cpu_count() or 1) // (parallel * launcher.processes), 1)))
    start = [sys.executable]
    if launcher.processes > 1:
        start += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={launcher.processes}"]
    log = sweep.root / sweep.runs[number].jobs[-1].log
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as out:
        return subprocess.Popen(
            [*start, "-m", "loramoe_train.sweeps.job", str(sweep.root.absolute()), str(number)],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            env=environment,
            start_new_session=True,  # Ctrl-C in the terminal is the pool's to hand on
        )


def _note_end(sweep: Sweep, number: int, code: int) -> None:
    if code < 0:  # it could not say so itself
        with (sweep.root / sweep.runs[number].jobs[-1].log).open("a") as log:
            log.write(f"\nloramoe: ended by {signal.Signals(-code).name}\n")


def _stop(processes: Sequence["subprocess.Popen[bytes]"]) -> None:
    for process in processes:
        process.send_signal(signal.SIGTERM)
    try:
        for process in processes:
            process.wait()
    except KeyboardInterrupt:
        for process in processes:
            process.kill()


def start_in_background(sweep: Sweep, numbers: Sequence[int]) -> Path:
    """The pool in a process that outlives this one and its terminal; returns its log."""
    at_once(LauncherConfig(**sweep.parameters), devices())
    log = sweep.root / INNER / LOG
    with log.open("ab") as out:
        pool = subprocess.Popen(
            [sys.executable, "-m", "loramoe_train.sweeps.pool", str(sweep.root.absolute()), *map(str, numbers)],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            start_new_session=True,
        )
    while pool.poll() is None and not is_locked(sweep.root / INNER):  # from then on `status` sees that it works
        time.sleep(POLL_SECONDS)
    return log


def main() -> None:
    """`python -m loramoe_train.sweeps.pool ROOT NUMBER...`"""
    from loramoe_train.guard import guard

    root, *numbers = sys.argv[1:]
    guard(lambda: run_pool(read_sweep(Path(root)), list(map(int, numbers)), lambda line: print(line, flush=True)))


if __name__ == "__main__":
    main()
