"""Runs model-written Python in a child process that can harm nothing: the strongest isolation there is, or refusal.

| level | files | network | how |
|---|---|---|---|
| bubblewrap | its own root: a read-only /usr and interpreter, a small private /tmp | none | `bwrap` |
| namespaces | the machine's, read-only; /tmp, /run hidden; user 65534 | none | `unshare`, as root |
| user | the machine's, as user 65534 in a private folder | hindered only | as root, and only if `allow_weak` |

Every level limits wall clock, CPU time, memory, processes, file size and captured output. A level is used only after a
probe in it has failed to write files outside, to see the network and to stay root. Linux only.
"""

import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import IO, Literal

from loramoe_train.errors import ConfigError

Level = Literal["bubblewrap", "namespaces", "user"]
Verdict = Literal["passed", "failed", "timeout", "died"]

NOBODY = 65534  # owns nothing; RLIMIT_NPROC counts only for a user that is not root
CHILD = Path(__file__).with_name("sandbox_child.py")
INTERPRETER_INSIDE = "/py"  # fixed: the real place may lie below a home that user 65534 cannot enter


@dataclass(frozen=True)
class Limits:
    """What one program may use."""

    wall_seconds: float = 10.0
    cpu_seconds: int = 5
    memory_bytes: int = 512 << 20  # address space of each process
    disk_bytes: int = 16 << 20  # of the private /tmp
    file_bytes: int = 1 << 20  # of each file; captured output too
    processes: int = 16
    open_files: int = 64


@dataclass(frozen=True)
class Program:
    """Code that somebody else wrote, and the tests that it must pass: Python source."""

    code: str
    tests: str


@dataclass(frozen=True)
class Outcome:
    """How one program ended. Only "passed" means that it ran to its last line."""

    verdict: Verdict
    message: str  # last line on standard error, "" if none
    seconds: float


@dataclass(frozen=True)
class Sandbox:
    """A level of isolation that was found to work here."""

    level: Level
    limits: Limits = Limits()

    def run(self, program: str) -> Outcome:
        """Run a program (Python source) to its end or to a limit. Never raises because of what the program does."""
        started = time.monotonic()
        secret = secrets.token_hex(16)
        with tempfile.TemporaryFile() as output, _result_pipe() as (reader, writer), self._folder() as folder:
            process = subprocess.Popen(
                self._command(),
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                cwd=folder,
                env={"PATH": "/usr/bin:/bin", "LC_ALL": "C.UTF-8"},
                pass_fds=(writer,),
                start_new_session=True,
            )
            text = json.dumps(self._settings(secret, writer)) + "\n" + program
            try:
                process.communicate(text.encode("utf-8", "replace"), timeout=self.limits.wall_seconds)
            except subprocess.TimeoutExpired:
                return Outcome("timeout", f"stopped after {self.limits.wall_seconds:g} s", time.monotonic() - started)
            finally:
                _kill_group(process)
            seconds = time.monotonic() - started
            if process.returncode == 0 and _read_now(reader) == secret.encode():
                return Outcome("passed", "", seconds)
            return Outcome(self._verdict(process.returncode, seconds), _last_line(output), seconds)

    def run_all(self, programs: Sequence[Program], workers: int | None = None) -> list[Outcome]:
        """Run programs a few at a time (default: one per CPU, at most 8); outcomes in the order of the programs."""
        workers = workers or min(8, os.cpu_count() or 1)
        with ThreadPoolExecutor(max_workers=workers) as pool:
            return list(pool.map(lambda program: self.run(f"{program.code}\n{program.tests}"), programs))

    def _verdict(self, returncode: int, seconds: float) -> Verdict:
        """Of a program that did not pass. bwrap reports signal N as 128 + N; unshare hides it, so time decides."""
        hidden = self.level == "namespaces" and seconds >= self.limits.cpu_seconds
        if hidden or returncode in {-signal.SIGXCPU, 128 + signal.SIGXCPU}:
            return "timeout"
        return "died" if returncode < 0 or returncode > 128 else "failed"

    def _command(self) -> list[str]:
        # -I: no environment, no user site; -S: no site-packages, so nothing of the project can be imported inside
        python = [os.path.realpath(sys.executable), "-I", "-S", "-c", CHILD.read_text(encoding="utf-8")]
        if self.level == "bubblewrap":
            return _bubblewrap(self.limits) + [_interpreter_inside(python[0]), *python[1:]]
        if self.level == "namespaces":
            spaces = ["--net", "--pid", "--mount", "--ipc", "--uts", "--mount-proc", "--fork", "--kill-child"]
            return ["unshare", *spaces, *python]
        return python

    def _settings(self, secret: str, result: int) -> dict[str, object]:
        limits = self.limits
        return {
            "secret": secret,
            "result": result,
            "seal": self.level == "namespaces",
            "interpreter": sys.base_prefix,
            "disk_bytes": limits.disk_bytes,
            "block_modules": self.level == "user",
            # inside an unprivileged bubblewrap the user is 65534 already and may not become anyone else
            "user": NOBODY if os.geteuid() == 0 else None,
            "limits": {
                "RLIMIT_CPU": limits.cpu_seconds,
                "RLIMIT_AS": limits.memory_bytes,
                "RLIMIT_FSIZE": limits.file_bytes,
                "RLIMIT_NOFILE": limits.open_files,
                "RLIMIT_NPROC": limits.processes,
                "RLIMIT_CORE": 0,
            },
        }

    @contextmanager
    def _folder(self) -> Iterator[str]:
        """Where the child starts; only the weakest level really works there."""
        if self.level != "user":
            yield "/"
            return
        with tempfile.TemporaryDirectory(prefix="candidate-") as folder:
            os.chown(folder, NOBODY, NOBODY)
            yield folder


@cache
def detect(*, allow_weak: bool = False, limits: Limits = Limits()) -> Sandbox:
    """The strongest level that works here; a fraction of a second, once per process.

    Args:
        allow_weak: also accept the level that cannot keep the network away.

    Raises:
        ConfigError: model-written code cannot be contained on this machine.
    """
    tried = []
    for level in _levels(allow_weak):
        sandbox = Sandbox(level, limits)
        complaint = _probe(sandbox)
        if complaint is None:
            return sandbox
        tried.append(f"{level} ({complaint})")
    raise ConfigError(
        "eval.allow_code_execution=true, but nothing on this machine can contain model-written code"
        + (f"; tried {', '.join(tried)}" if tried else "")
        + "; install bubblewrap (apt install bubblewrap), or leave humaneval out of eval.tasks"
    )


def _levels(allow_weak: bool) -> list[Level]:
    levels: list[Level] = []
    if not sys.platform.startswith("linux"):
        return levels
    if shutil.which("bwrap"):
        levels.append("bubblewrap")
    if os.geteuid() == 0:
        # without root the child would keep the user's identity, and with it the user's keys and sockets
        if shutil.which("unshare"):
            levels.append("namespaces")
        if allow_weak:
            levels.append("user")
    return levels


# must do no harm where nothing holds: only the marker is written, the user's own places are asked about
PROBE = """
import os
try:
    open({marker!r}, "w").close()
except OSError:
    pass
else:
    raise AssertionError("a file outside could be written")
assert not any(os.access(place, os.W_OK) for place in {places!r}), "the user's folders are open"
assert {weak} or os.readlink("/proc/self/ns/net") != {network!r}, "the network is shared"
assert os.geteuid() != 0, "still root"
import json, typing, math, collections, re
"""


def _probe(sandbox: Sandbox) -> str | None:
    """None if programs run in the sandbox and cannot get out; else what went wrong."""
    with tempfile.TemporaryDirectory(prefix="probe-") as folder:
        marker = Path(folder, "marker")
        marker.write_text("untouched")
        places = [os.path.expanduser("~"), os.getcwd(), str(CHILD.parent), "/usr"]
        network = os.readlink("/proc/self/ns/net")
        program = PROBE.format(marker=str(marker), places=places, weak=sandbox.level == "user", network=network)
        try:
            outcome = sandbox.run(program)
        except OSError as error:
            return str(error)
        if outcome.verdict != "passed":
            return outcome.message or outcome.verdict
        return None if marker.read_text() == "untouched" else "a file outside was overwritten"


def _bubblewrap(limits: Limits) -> list[str]:
    command = ["bwrap", "--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts", "--unshare-cgroup-try"]
    command += ["--die-with-parent", "--new-session", "--hostname", "sandbox", "--cap-drop", "ALL"]
    if os.geteuid() == 0:
        # the child itself becomes user 65534: `--uid` as root would leave RLIMIT_NPROC without effect
        command += ["--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
    else:
        command += ["--unshare-user", "--uid", str(NOBODY), "--gid", str(NOBODY)]
    command += ["--ro-bind", "/usr", "/usr"]
    for name in ("/bin", "/sbin", "/lib", "/lib32", "/lib64"):
        if os.path.islink(name):
            command += ["--symlink", os.readlink(name), name]
        else:
            command += ["--ro-bind-try", name, name]
    command += ["--ro-bind-try", "/etc/ld.so.cache", "/etc/ld.so.cache", "--proc", "/proc", "--dev", "/dev"]
    if not _below_usr(sys.base_prefix):
        command += ["--ro-bind", sys.base_prefix, INTERPRETER_INSIDE]
        command += ["--setenv", "LD_LIBRARY_PATH", f"{INTERPRETER_INSIDE}/lib"]
    command += ["--perms", "1777", "--size", str(limits.disk_bytes), "--tmpfs", "/tmp", "--chdir", "/tmp"]
    return command + ["--remount-ro", "/dev", "--remount-ro", "/"]


def _below_usr(folder: str) -> bool:
    return Path(folder).resolve().is_relative_to("/usr")


def _interpreter_inside(python: str) -> str:
    if _below_usr(sys.base_prefix):
        return python
    return str(Path(INTERPRETER_INSIDE, Path(python).relative_to(Path(sys.base_prefix).resolve())))


@contextmanager
def _result_pipe() -> Iterator[tuple[int, int]]:
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    try:
        yield reader, writer
    finally:
        os.close(reader)
        os.close(writer)


def _read_now(reader: int) -> bytes:
    try:
        return os.read(reader, 4096)
    except BlockingIOError:
        return b""


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    """End the child and what it started in its session; namespaces end with their first process anyway."""
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
