"""The order in which a child process gives up its rights, and then splits into judge and candidate."""

import json
import os
import resource
import signal
import sys
from typing import Any

from loramoe_train.evaluation.sandbox.inside import landlock, namespaces, seccomp
from loramoe_train.evaluation.sandbox.inside.candidate import serve
from loramoe_train.evaluation.sandbox.inside.judge import Full, Link, judge
from loramoe_train.evaluation.sandbox.inside.kernel import (
    SET_DUMPABLE,
    call,
    drop_capabilities,
    end_with_parent,
    no_new_rights,
)

LIBRARIES = ["/usr", "/lib", "/lib32", "/lib64", "/etc/ld.so.cache", "/etc/localtime", "/dev/null", "/dev/urandom"]

MAX_FILES = 1000


def main(settings: dict[str, Any]) -> None:
    """Run the program of standard input, report on the descriptor `result`, and end. Never returns.

    Settings: `level`, `user` (to become; None: stay who we are), `result`, `limits` (soft limits by name) and
    `disk_bytes`. The program (JSON: code, tests) is read after the split, by the judge alone.
    """
    level, result = settings["level"], settings["result"]
    end_with_parent()
    os.closerange(3, result)
    os.closerange(result + 1, 4096)
    if level == "namespaces":
        namespaces.enter(settings["inner_user"])
        namespaces.build_root(settings["disk_bytes"])
    questions, asked = os.pipe()
    answered, answers = os.pipe()
    hidden = settings["user"] is not None and level in ("seccomp", "user") and not _others_may_enter(sys.base_prefix)
    if hidden:
        namespaces.read_interpreter_by_descriptor()
    if level == "seccomp":
        landlock.restrict([*LIBRARIES, f"{sys.base_prefix}/lib"], [os.getcwd()])
    if settings["user"] is not None:
        os.setgroups([])
        os.setresgid(settings["user"], settings["user"], settings["user"])
        os.setresuid(settings["user"], settings["user"], settings["user"])
    end_with_parent()
    no_new_rights()
    drop_capabilities()
    # The candidate has the judge's user: it must not look into the judge. But who reads the interpreter by descriptor
    # needs its own /proc/self; then it is Landlock that hides the judge's, and on level "user" that can be read
    call("prctl", SET_DUMPABLE, int(hidden), 0, 0, 0)
    process = os.fork()
    for name, value in settings["limits"].items():
        _limit(getattr(resource, name), value)
    if process == 0:
        end_with_parent()
        nothing, end = os.pipe()
        os.dup2(nothing, 0)
        for other in (nothing, end, asked, answered, result):
            os.close(other)
        _filter(settings)
        serve(questions, answers)
        os._exit(0)
    for other in (questions, answers):
        os.close(other)
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    _filter(settings)
    if level in ("bubblewrap", "namespaces"):
        _count_files()
    verdict = judge(Link(asked, answered), process, json.load(sys.stdin), settings["limits"]["RLIMIT_CPU"])
    os.write(result, json.dumps({**verdict, "message": verdict["message"][:300]}).encode())
    os._exit(0)


def _limit(what: int, soft: int) -> None:
    # of CPU time there is one second between the signal and the end: it tells this from other deaths
    hard = soft + (what == resource.RLIMIT_CPU)
    present = resource.getrlimit(what)[1]
    if present != resource.RLIM_INFINITY:
        soft, hard = min(soft, present), min(hard, present)
    resource.setrlimit(what, (soft, hard))


def _count_files() -> None:
    """Stop the judge where the private /tmp, whose size alone is limited, gets too many files."""

    def look(*_: Any) -> None:
        found = os.statvfs("/tmp")
        if found.f_files - found.f_ffree > MAX_FILES:
            raise Full(f"more than {MAX_FILES} files")

    signal.signal(signal.SIGALRM, look)
    signal.setitimer(signal.ITIMER_REAL, 0.05, 0.05)


def _others_may_enter(place: str) -> bool:
    """Whether every user may enter a folder and all those above it."""
    place = os.path.realpath(place)
    return bool(os.stat(place).st_mode & 1) and (place == "/" or _others_may_enter(os.path.dirname(place)))


def _filter(settings: dict[str, Any]) -> None:
    level = settings["level"]
    files = "read" if level == "user" else "change"
    if level == "seccomp" and landlock.version() < 3:
        files = "no truncation"
    try:
        seccomp.install(files=files)
    except OSError:
        if level in ("seccomp", "user"):  # elsewhere it is a second wall behind the namespaces
            raise
