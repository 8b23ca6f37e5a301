"""What goes into the sandbox and what comes out."""

from dataclasses import dataclass
from typing import Literal, get_args

Level = Literal["bubblewrap", "namespaces", "seccomp", "user"]  # strongest first
Verdict = Literal["passed", "failed", "timeout", "died"]
LEVELS: tuple[Level, ...] = get_args(Level)


@dataclass(frozen=True)
class Limits:
    """What one program may use."""

    wall_seconds: float = 10.0
    cpu_seconds: int = 5
    memory_bytes: int = 512 << 20  # address space of each of its two processes
    disk_bytes: int = 16 << 20  # of its private folder
    file_bytes: int = 1 << 20  # of each file; captured output too
    processes: int = 16  # threads, where there is a seccomp filter: with it no process can be started at all
    open_files: int = 64


@dataclass(frozen=True)
class Program:
    """Code that somebody else wrote, and the tests that it must pass: Python source."""

    code: str
    tests: str


@dataclass(frozen=True)
class Outcome:
    """How one program ended. "passed" means that the code and then the tests ran to their last line."""

    verdict: Verdict
    message: str  # what the failing test or the code raised, or which limit was met; "" if it passed
    seconds: float
