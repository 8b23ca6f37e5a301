"""One program in one child process: started with nothing of ours, watched, ended, its verdict read."""

import base64
import json
import marshal
import os
import queue
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import IO, Any

from loramoe_train.evaluation.sandbox.bubblewrap import bubblewrap, interpreter_inside
from loramoe_train.evaluation.sandbox.types import Level, Limits, Outcome, Program

OnOutcome = Callable[[int, Outcome], None]  # index of the program, how it ended

NOBODY = 65534
# Users that own nothing, for root: one to each program that runs, as the limit of processes counts by user
USERS: queue.SimpleQueue[int] = queue.SimpleQueue()
for number in range(65520, 65534):
    USERS.put(number)

INSIDE = f"{__package__}.inside"
# in the order in which they need each other
MODULES = ("kernel", "syscalls", "seccomp", "landlock", "namespaces", "values", "candidate", "judge", "main")
START = """
import binascii, json, marshal, sys, types
modules, settings = json.loads(sys.argv[1])
for name, code in modules:
    module = sys.modules[name] = types.ModuleType(name)
    above, _, last = name.rpartition(".")
    if above:
        setattr(sys.modules[above], last, module)
    exec(marshal.loads(binascii.a2b_base64(code)), module.__dict__)
module.main(settings)
"""


@dataclass(frozen=True)
class Sandbox:
    """A level of isolation, which `detect` found to work here."""

    level: Level
    limits: Limits = Limits()
    workers: int | None = None  # programs at a time; None: one per CPU, at most 8

    def run(self, program: Program) -> Outcome:
        """Run a program to its end or to a limit. Never raises because of what the program does."""
        started = time.monotonic()
        with tempfile.TemporaryFile() as output, _result_pipe() as (reader, writer), _user() as user:
            with self._folder(user) as folder:
                process = subprocess.Popen(
                    self._command(user, writer),
                    stdin=subprocess.PIPE,
                    stdout=output,
                    stderr=output,
                    cwd=folder,
                    env={"PATH": "/usr/bin:/bin", "LC_ALL": "C.UTF-8"},
                    pass_fds=(writer,),
                    start_new_session=True,
                )
                text = json.dumps({"code": program.code, "tests": program.tests}).encode()
                try:
                    stopped = self._wait(process, text, folder)
                finally:
                    _kill_group(process)
            seconds = time.monotonic() - started
            report = _read_now(reader)
            if stopped is not None:
                return Outcome(*stopped, seconds)
            if report is None:
                return self._without_report(process.returncode, output, seconds)
            return Outcome(report["verdict"], report["message"], seconds)

    def run_all(self, programs: Sequence[Program], on_outcome: OnOutcome | None = None) -> list[Outcome]:
        """Run programs, `workers` at a time; outcomes in the order of the programs.

        `on_outcome` gets each as soon as it is there, in this thread, in the order in which they end.
        """
        workers = self.workers or min(8, os.cpu_count() or 1)
        pool = ThreadPoolExecutor(max_workers=workers)
        try:
            futures = {pool.submit(self.run, program): index for index, program in enumerate(programs)}
            for future in as_completed(futures):
                if on_outcome is not None:
                    on_outcome(futures[future], future.result())
            return [future.result() for future in futures]
        finally:
            pool.shutdown(cancel_futures=True)

    def _wait(self, process: subprocess.Popen[bytes], text: bytes | None, folder: str) -> tuple[Any, str] | None:
        """None if the process ended by itself, else the verdict and why it has to be stopped."""
        end = time.monotonic() + self.limits.wall_seconds
        shared = folder != "/"  # nothing but our looking limits a folder on the machine's own disk
        while True:
            left = end - time.monotonic()
            if left <= 0:
                return "timeout", f"stopped after {self.limits.wall_seconds:g} s"
            try:
                process.communicate(text, timeout=min(left, 0.05) if shared else left)
            except subprocess.TimeoutExpired:
                text = None  # the first call goes on with it
                if shared and not _fits(folder, self.limits.disk_bytes):
                    return "failed", "wrote more than its private folder may hold"
                continue
            return None

    def _without_report(self, returncode: int, output: IO[bytes], seconds: float) -> Outcome:
        """Of a child that the judge could not report about. A wrapper gives signal N as 128 + N."""
        number = -returncode if returncode < 0 else returncode - 128
        spent = number == signal.SIGXCPU or (number == signal.SIGKILL and seconds >= self.limits.cpu_seconds)
        if spent:
            return Outcome("timeout", f"stopped after {self.limits.cpu_seconds} s of CPU time", seconds)
        return Outcome("died" if number > 0 else "failed", _last_line(output), seconds)

    def _command(self, user: int | None, result: int) -> list[str]:
        # -I: no environment, no user site; -S: no site-packages, so nothing of the project can be imported inside
        settings = json.dumps([_modules(), self._settings(user, result)])
        python = [os.path.realpath(sys.executable), "-I", "-S", "-c", START, settings]
        if self.level == "bubblewrap":
            return bubblewrap(self.limits.disk_bytes, NOBODY) + [interpreter_inside(python[0]), *python[1:]]
        return python

    def _settings(self, user: int | None, result: int) -> dict[str, Any]:
        limits = self.limits
        return {
            "level": self.level,
            "user": user,
            "inner_user": NOBODY,
            "result": result,
            "disk_bytes": limits.disk_bytes,
            "limits": {
                "RLIMIT_CPU": limits.cpu_seconds,
                "RLIMIT_AS": limits.memory_bytes,
                "RLIMIT_FSIZE": limits.file_bytes,
                "RLIMIT_NOFILE": limits.open_files,
                "RLIMIT_NPROC": limits.processes + (_our_tasks() if user is None else 0),
                "RLIMIT_CORE": 0,
            },
        }

    @contextmanager
    def _folder(self, user: int | None) -> Iterator[str]:
        """Where the child starts: the stronger levels have their own file system, the weakest may write nowhere."""
        if self.level != "seccomp":
            yield "/"
            return
        folder = tempfile.mkdtemp(prefix=f"candidate-{secrets.token_hex(8)}-")
        try:
            if user is not None:
                os.chown(folder, user, user)
            yield folder
        finally:
            _remove(folder)


@cache
def _modules() -> list[tuple[str, str]]:
    """Names and byte code of what runs inside: the interpreter there is the same, and has less to do."""
    folder, parts = Path(__file__).parent / "inside", INSIDE.split(".")
    sources = {".".join(parts[: n + 1]): "" for n in range(len(parts))}
    sources |= {f"{INSIDE}.{name}": (folder / f"{name}.py").read_text(encoding="utf-8") for name in MODULES}
    codes = {name: marshal.dumps(compile(source, name, "exec")) for name, source in sources.items()}
    return [(name, base64.b64encode(code).decode()) for name, code in codes.items()]


@contextmanager
def _user() -> Iterator[int | None]:
    """Whom the child becomes; None where we have no right to choose. Waits where all are taken."""
    if os.geteuid() != 0:
        yield None
        return
    user = USERS.get()
    try:
        yield user
    finally:
        USERS.put(user)


def _our_tasks() -> int:
    """Threads of this process's user: a limit on them counts those outside as well."""
    count = 0
    for entry in os.scandir("/proc"):
        try:
            if entry.name.isdigit() and entry.stat().st_uid == os.geteuid():
                count += len(os.listdir(f"/proc/{entry.name}/task"))
        except OSError:  # ended meanwhile
            continue
    return count


def _fits(folder: str, size: int, files: int = 1000) -> bool:
    """Whether what lies in a folder is small. What cannot be looked into counts as large."""
    waiting, total, seen = [folder], 0, 0
    try:
        while waiting:
            with os.scandir(waiting.pop()) as entries:
                for entry in entries:
                    seen += 1
                    total += entry.stat(follow_symlinks=False).st_size
                    if total > size or seen > files:
                        return False
                    if entry.is_dir(follow_symlinks=False):
                        waiting.append(entry.path)
    except FileNotFoundError:  # just removed
        return True
    except OSError:
        return False
    return True


def _remove(folder: str) -> None:
    """Whatever a program left there: folders that nobody may read, or nested too deeply for Python."""
    try:
        shutil.rmtree(folder)
    except (OSError, RecursionError):
        for command in (["chmod", "-R", "u+rwx"], ["rm", "-rf"]):
            subprocess.run([*command, folder], stderr=subprocess.DEVNULL, check=False)


@contextmanager
def _result_pipe() -> Iterator[tuple[int, int]]:
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    try:
        yield reader, writer
    finally:
        os.close(reader)
        os.close(writer)


def _read_now(reader: int) -> dict[str, Any] | None:
    """The judge's report, or None if it gave none."""
    try:
        return dict(json.loads(os.read(reader, 4096)))
    except (BlockingIOError, ValueError):
        return None


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    """End the child and what it started in its session, which it has no means to leave."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()
    if process.stdin:
        process.stdin.close()


def _last_line(output: IO[bytes]) -> str:
    output.seek(max(0, output.seek(0, os.SEEK_END) - 4096))
    lines = output.read().decode("utf-8", "replace").strip().splitlines()
    return lines[-1][:300] if lines else ""
