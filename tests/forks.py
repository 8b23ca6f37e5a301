"""Processes that start in a fraction of a second: forked from a server that has imported everything and has one thread.

`multiprocessing`'s fork server is that server; a child of it is a process like any other and may be killed.
"""

import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
# pytest, because multiprocessing runs the main script's imports in every child
PRELOADED = ("pytest", "tests.preloaded")


class Forked:
    """A job in a process of its own. Its output goes to files in `folder`."""

    def __init__(
        self, folder: Path, job: Callable[..., Any], *arguments: Any, cwd: Path = ROOT, **environment: str
    ) -> None:
        context = _server()
        folder.mkdir(parents=True, exist_ok=True)
        self._out, self._err = folder / "stdout.txt", folder / "stderr.txt"
        for file in (self._out, self._err):
            file.write_bytes(b"")
        places = (str(self._out), str(self._err), str(cwd), environment)
        self._process = context.Process(target=_child, args=(os.getpid(), *places, job, arguments))
        self._process.start()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def running(self) -> bool:
        return self._process.is_alive()

    @property
    def stdout(self) -> str:
        return self._out.read_text()

    @property
    def stderr(self) -> str:
        return self._err.read_text()

    def send(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def wait(self, timeout: float = 120) -> int:
        """The exit code, negative for a signal; one that does not end in time is killed, and that is a failure."""
        self._process.join(timeout)
        if self._process.is_alive():
            self.kill()
            raise AssertionError(f"no end after {timeout} s: {self.stdout[-2000:]} {self.stderr[-2000:]}")
        return self._process.exitcode

    def kill(self) -> int:
        """SIGKILL, and the exit code: another one if the process had ended before."""
        self._process.kill()
        self._process.join()
        return self._process.exitcode

    def wait_until(self, happened: Callable[[], bool], *, timeout: float = 120, every: float = 0.005) -> None:
        """Return once something has happened; fails with the process's own words if it ends or sleeps before."""
        deadline = time.monotonic() + timeout
        while not happened():
            running = self.running
            if (not running and not happened()) or time.monotonic() > deadline:
                self.kill()
                raise AssertionError(f"it did not happen; it said {self.stdout[-2000:]} {self.stderr[-4000:]}")
            time.sleep(every)

    def __enter__(self) -> "Forked":
        return self

    def __exit__(self, *error: object) -> None:
        self.kill()


def run_forked(name: str, *arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess:
    """As `tests.cli.run_cli`, some seconds faster: nothing is imported. Not for what variables decide at import."""
    with tempfile.TemporaryDirectory() as folder:
        started = Forked(Path(folder), command, name, arguments, cwd=cwd, COLUMNS="160", **environment)
        code = started.wait(300)
        return subprocess.CompletedProcess([name, *arguments], code, started.stdout, started.stderr)


def command(name: str, arguments: Sequence[str]) -> None:
    """`loramoe-NAME ARGUMENTS`, for `Forked`."""
    from loramoe_train import cli

    sys.argv = [f"loramoe-{name}", *arguments]
    getattr(cli, {"eval": "evaluate"}.get(name, name))()


def _server() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    # arrow's allocator would begin a thread when it is imported
    wanted = {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "JE_ARROW_MALLOC_CONF": "background_thread:false"}
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        forkserver.ensure_running()
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
    return context


def _child(
    starter: int, out: str, err: str, cwd: str, environment: dict[str, str], job: Callable[..., Any], given: tuple
) -> None:
    import torch

    for target, file in ((1, out), (2, err)):
        os.dup2(os.open(file, os.O_WRONLY | os.O_APPEND), target)
    assert os.getppid() != starter, "this was not forked from the server"
    assert len(os.listdir(f"/proc/{os.getppid()}/task")) == 1, "a thread was alive in the server"
    torch.set_num_threads(1)
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        assert signal.getsignal(number) is signal.SIG_DFL, f"whoever runs the tests ignores {number.name}"
    os.environ.update(environment)
    os.chdir(cwd)
    job(*given)
