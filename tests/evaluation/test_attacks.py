"""Every attack of `attacks.py`, on every level that works on this machine: contained, and scored as failed."""

import ctypes
import os
import re
import secrets
import select
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from loramoe_train.evaluation.sandbox import Limits, Outcome, Program, Sandbox
from loramoe_train.evaluation.sandbox.probe import probe
from loramoe_train.evaluation.sandbox.types import LEVELS
from tests.evaluation.attacks import ATTACKS, BITE, ENDS, NOT_HIDDEN, TESTS, open_to_others

LIMITS = Limits(wall_seconds=2.0, cpu_seconds=1, memory_bytes=256 << 20, disk_bytes=4 << 20)
PATIENT = replace(LIMITS, wall_seconds=20.0, cpu_seconds=5)
WRONG = "def f(x): return x\n"
CONTENT = "SECRET, three years of work"


@dataclass
class Surroundings:
    """The user's things. Each attack has a folder with a marker of its own."""

    root: Path
    victim: "subprocess.Popen[bytes]"
    listening: list[socket.socket]
    words: dict[str, str]
    scored: "dict[str, Scored]" = field(default_factory=dict)  # by level; tests of one level need not come in a row

    def fill(self, name: str, code: str) -> str:
        folder = self.folder(name)
        folder.mkdir()
        folder.chmod(0o777)  # isolation must do it alone
        marker = folder / "marker"
        marker.write_text(CONTENT)
        marker.chmod(0o666)
        os.utime(marker, (1e9, 1e9))
        words = {**self.words, "FOLDER": repr(str(folder)), "MARKER": repr(str(marker))}
        return re.sub("|".join(words), lambda found: words[found[0]], code)

    def folder(self, name: str) -> Path:
        return self.root / re.sub(r"\W+", "-", name)

    def harm(self, name: str) -> str | None:
        """What was done to the marker, its folder, the process, or sent to where the machine listens."""
        folder, marker = self.folder(name), self.folder(name) / "marker"
        if not folder.is_dir() or [path.name for path in folder.iterdir()] != ["marker"]:
            return "files were made or removed"
        state = marker.stat()
        if (state.st_mode & 0o777, state.st_mtime, state.st_nlink) != (0o666, 1e9, 1):
            return "the file has other rights, times or links"
        if marker.read_text() != CONTENT:
            return "the file was changed"
        if self.victim.poll() is not None:
            return "the process was killed"
        heard = select.select(self.listening, [], [], 0)[0]
        return f"something was sent to {heard}" if heard else None


@pytest.fixture(scope="module")
def surroundings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Surroundings]:
    with surrounded(tmp_path_factory.mktemp("things")) as things:
        yield things


@contextmanager
def surrounded(root: Path) -> Iterator[Surroundings]:
    open_to_others(root)
    home = root / "home"
    home.mkdir()
    (home / "notes").write_text("SECRET")
    (home / "SECRET").touch()
    secret = ctypes.create_string_buffer(b"SECRET")
    names = [f"\0loramoe-{secrets.token_hex(8)}" for _ in range(2)]
    with (
        pytest.MonkeyPatch.context() as patch,
        running(["sleep", "600"], {**os.environ, "LORAMOE_TOKEN": "SECRET"}) as victim,
        socket.create_server(("127.0.0.1", 0)) as stream,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as datagrams,
        socket.socket(socket.AF_UNIX) as unix,
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as unix_datagrams,
        open(home / "notes") as held,
    ):
        patch.setenv("LORAMOE_TOKEN", "SECRET")
        os.set_inheritable(held.fileno(), True)
        datagrams.bind(stream.getsockname())
        unix.bind(names[0])
        unix.listen()
        unix_datagrams.bind(names[1])
        words = {
            "HOME": repr(str(home)),
            "VICTIM": str(victim.pid),
            "OURS": str(os.getpid()),
            "PORT": str(stream.getsockname()[1]),
            "STREAM": repr(names[0]),
            "SOCKET": repr(names[1]),
            "WHERE": str(ctypes.addressof(secret)),
        }
        yield Surroundings(root, victim, [stream, datagrams, unix, unix_datagrams], words)


@contextmanager
def running(command: list[str], environment: dict[str, str]) -> Iterator["subprocess.Popen[bytes]"]:
    process = subprocess.Popen(command, env=environment)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


@dataclass
class Scored:
    sandbox: Sandbox
    programs: dict[str, Program]
    outcomes: dict[str, Outcome]
    left: list[str]  # in the folder for temporary files


@pytest.fixture(scope="module", params=LEVELS)
def scored(request: pytest.FixtureRequest, surroundings: Surroundings, tmp_path_factory) -> Scored:
    """All attacks on one level, run as the completions of an evaluation are."""
    if request.param in surroundings.scored:
        return surroundings.scored[request.param]
    box = Sandbox(request.param, LIMITS, workers=4)
    complaint = probe(box)
    if complaint is not None:
        pytest.skip(f"{request.param} does not work here: {complaint}")
    programs = {}
    for name, code in ATTACKS.items():
        filled = WRONG + surroundings.fill(f"{box.level} {name}", code)
        programs[name] = Program(filled, TESTS.get(name, "assert f(1) == 2"))
    temporary = tmp_path_factory.mktemp("temporary")
    temporary.chmod(0o755)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tempfile, "tempdir", str(temporary))
        outcomes = box.run_all(list(programs.values()))
    time.sleep(0.5)  # for what would outlive it
    made = Scored(box, programs, dict(zip(programs, outcomes, strict=True)), os.listdir(temporary))
    return surroundings.scored.setdefault(box.level, made)


@pytest.mark.parametrize("name", ATTACKS)
def test_attack_is_contained_and_scored_as_failed(scored, surroundings, name):
    level, outcome = scored.sandbox.level, scored.outcomes[name]
    assert outcome.verdict != "passed" and outcome.seconds < LIMITS.wall_seconds + 20
    assert surroundings.harm(f"{level} {name}") is None
    pattern = ENDS.get(name, "")
    if outcome.verdict == "timeout" and not re.search(pattern, "timeout"):
        # a machine that is busy elsewhere comes to the limit of time before another
        outcome = replace(scored.sandbox, limits=PATIENT).run(scored.programs[name])
    assert re.search(pattern, f"{outcome.verdict} {outcome.message}"), outcome
    if level != "user" or name.removeprefix("views: ") not in NOT_HIDDEN:
        assert "SECRET" not in outcome.message


def test_nothing_is_left_behind(scored):
    assert scored.left == []
    for place in ("/usr/bin/loramoe-attack", "/etc/loramoe-attack"):
        assert not Path(place).exists()
    orphans = []
    for process in filter(str.isdigit, os.listdir("/proc")):
        with suppress(OSError):
            command = Path("/proc", process, "cmdline").read_bytes()
            parent = re.search(r"PPid:\s+(\d+)", Path("/proc", process, "status").read_text())
            if b"loramoe_train.evaluation.sandbox.inside" in command and parent is not None and parent[1] == "1":
                orphans.append(process)
    assert orphans == []


@pytest.mark.parametrize("name", BITE)
def test_an_attack_bites_where_nothing_holds(name, tmp_path):
    """Or their failure above would mean nothing."""
    with surrounded(tmp_path) as things:
        code = things.fill(name, ATTACKS[name])
        done = subprocess.run([sys.executable, "-I", "-c", code], cwd=tmp_path, capture_output=True, timeout=20)
        time.sleep(0.05)
        assert things.harm(name) or "SECRET" in done.stderr.decode().splitlines()[-1]
