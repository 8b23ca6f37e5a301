"""Which level is chosen, refused or found out; and the filter's table of system calls."""

import base64
import marshal
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from loramoe_train.errors import ConfigError
from loramoe_train.evaluation.sandbox import Limits, Sandbox, box, detect, levels
from loramoe_train.evaluation.sandbox.inside import syscalls
from loramoe_train.evaluation.sandbox.levels import possible_levels
from loramoe_train.evaluation.sandbox.probe import probe
from loramoe_train.evaluation.sandbox.types import LEVELS
from loramoe_train.paths import PACKAGE
from tests.evaluation.attacks import open_to_others

QUICK = Limits(wall_seconds=8.0, cpu_seconds=1)


@pytest.fixture
def forgotten() -> Any:
    """`detect` looks again."""
    detect.cache_clear()
    yield
    detect.cache_clear()


def test_the_order_of_preference():
    assert possible_levels("auto") == [level for level in LEVELS if level != "user"]
    for level in LEVELS:
        assert possible_levels(level) == [level]


def test_without_bubblewrap_the_next_level_is_taken(monkeypatch, forgotten):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert possible_levels("auto") == ["namespaces", "seccomp"]
    monkeypatch.setattr(levels, "probe", lambda made: "no" if made.level == "namespaces" else None)
    assert detect().level == "seccomp"


def test_without_any_isolation_it_is_refused(monkeypatch, forgotten):
    """The weak level would work, and is not taken unless it is named."""
    monkeypatch.setattr(levels, "probe", lambda made: None if made.level == "user" else "no")
    with pytest.raises(
        ConfigError, match="nothing on this machine can contain.*seccomp \\(no\\).*install bubblewrap"
    ) as caught:
        detect()
    assert "\n" not in str(caught.value) and "eval.sandbox=user" in str(caught.value)
    assert detect("user").level == "user"
    with pytest.raises(ConfigError, match=r"eval.sandbox=seccomp does not work here; tried seccomp \(no\)"):
        detect("seccomp")


def test_other_systems_are_refused(monkeypatch, forgotten):
    monkeypatch.setattr(sys, "platform", "darwin")
    for name in ("auto", *LEVELS):
        with pytest.raises(ConfigError, match="that needs Linux"):
            detect(name)


def test_a_level_that_does_not_hold_is_refused(monkeypatch, forgotten, tmp_path):
    """A `bwrap` that isolates nothing must be found out by the probe, which harms nothing of the user's."""
    home = tmp_path / "home"
    home.mkdir()
    (home / "notes").write_text("mine")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setattr(box, "bubblewrap", lambda *_: [])
    monkeypatch.setattr(box, "interpreter_inside", lambda python: python)
    with pytest.raises(ConfigError, match=r"tried bubblewrap \(AssertionError: a file outside could be"):
        detect("bubblewrap")
    assert [path.name for path in home.iterdir()] == ["notes"] and (home / "notes").read_text() == "mine"


@pytest.mark.parametrize(
    ("part", "complaint"),
    [
        ("landlock.restrict", "a file outside could be written"),
        ("seccomp.install", "a datagram left|lost its rights"),
        ("resource.setrlimit", "memory is not limited"),
    ],
)
def test_the_probe_finds_out_what_is_missing(part, complaint, monkeypatch, tmp_path):
    """Level seccomp with one of its parts taken away."""
    if probe(Sandbox("seccomp", QUICK)) is not None:
        pytest.skip("level seccomp does not work here")
    name = f"{box.INSIDE}.main"
    source = (Path(box.__file__).parent / "inside" / "main.py").read_text()
    assert part in source
    without = compile(source.replace(part, "(lambda *_, **__: None)"), name, "exec")
    modules = [(known, code) for known, code in box._modules() if known != name]
    modules.append((name, base64.b64encode(marshal.dumps(without)).decode()))
    monkeypatch.setattr(box, "_modules", lambda: modules)
    assert re.search(complaint, str(probe(Sandbox("seccomp", QUICK))))


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user")
def test_an_ordinary_user_is_contained_too(tmp_path):
    """Every level that works for root here works, by the probe, for a user without any rights."""
    python = "/usr/bin/python3"  # that of the environment may lie below a home that others may not enter
    if not Path(python).exists() or subprocess.run([python, "-c", "import datetime as d; d.UTC"]).returncode != 0:
        pytest.skip("no second interpreter of version 3.11 or later")
    open_to_others(tmp_path)
    copy = tmp_path / "loramoe_train"
    shutil.copytree(PACKAGE / "evaluation" / "sandbox", copy / "evaluation" / "sandbox")
    for file in ("__init__.py", "errors.py", "evaluation/__init__.py"):
        shutil.copy(PACKAGE / file, copy / file)
    program = (
        "from loramoe_train.evaluation.sandbox import *; from loramoe_train.evaluation.sandbox.probe import probe\n"
        f"print([probe(Sandbox(level)) for level in {LEVELS}])"
    )
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(tmp_path), "HOME": str(tmp_path)}
    done = subprocess.run(
        [python, "-c", program], user=12345, group=12345, extra_groups=[], env=environment, cwd="/",
        capture_output=True, text=True,
    )  # fmt: skip
    works_for_root = [probe(Sandbox(level)) for level in LEVELS]
    assert done.stdout.strip() == str(works_for_root), done.stderr


@pytest.mark.parametrize(
    ("column", "header"),
    [(0, "/usr/include/x86_64-linux-gnu/asm/unistd_64.h"), (1, "/usr/include/asm-generic/unistd.h")],
)
def test_numbers_of_system_calls_are_those_of_the_headers(column, header):
    if not Path(header).exists():
        pytest.skip(f"no {header}")
    text = Path(header).read_text()
    known = {name: int(number) for name, number in re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)", text)}
    for table in (syscalls.ALLOWED, syscalls.CHANGE_FILES, syscalls.LOOKED_INTO):
        for name, numbers in table.items():
            if numbers[column] is not None:
                assert known[name if name in known else name.removeprefix("new")] == numbers[column], name
    tables = {**syscalls.ALLOWED, **syscalls.CHANGE_FILES, **syscalls.LOOKED_INTO}
    assert len(tables) >= 130
    dangerous = """socket connect bind sendmsg ptrace process_vm_writev pidfd_open pidfd_getfd execve fork vfork setsid
        mount unshare setns bpf keyctl perf_event_open io_uring_setup userfaultfd chmod fchmodat fchownat utimensat"""
    assert not set(dangerous.split()) & tables.keys()
