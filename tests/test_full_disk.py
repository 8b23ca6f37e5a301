"""A disk that is really full: a small file system of memory, mounted where only the test's own process sees it."""

import ctypes
import os
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file

from loramoe_train.errors import LoramoeError
from loramoe_train.training.checkpoint import fault, find_latest
from tests.cli import MIXER, NO_EVAL, TWO_TASKS, check_refused, half_written
from tests.forks import Forked, command
from tests.training.harness import make_parts, make_trainer, train, weights
from tests.training.test_resume import RUN, log

NEW_USER, NEW_MOUNTS, RECURSIVE, PRIVATE, REMOUNT = 0x10000000, 0x20000, 0x4000, 0x40000, 0x20
NO_MOUNT = 77
KIB = 1024
TRAINER = {"stages": {"only": {"steps": 4}}, "checkpoint_every": 1, "keep": 10, "log_every": 1}


def mount(folder: Path, kib: int, *, again: bool = False) -> None:
    """A file system of that size at a folder, seen by this process alone; `again` changes the size."""
    libc = ctypes.CDLL(None, use_errno=True)

    def call(name: str, *given: Any) -> None:
        if getattr(libc, name)(*given):
            print(f"cannot mount a file system here: {name}: {os.strerror(ctypes.get_errno())}", flush=True)
            os._exit(NO_MOUNT)

    if not again:
        ids = {"uid_map": f"0 {os.getuid()} 1", "gid_map": f"0 {os.getgid()} 1"}
        call("unshare", NEW_MOUNTS if os.getuid() == 0 else NEW_MOUNTS | NEW_USER)
        if os.getuid() != 0:
            for name, text in {"setgroups": "deny", **ids}.items():
                Path(f"/proc/self/{name}").write_text(text)
        call("mount", b"none", b"/", None, RECURSIVE | PRIVATE, None)
    call("mount", b"none", os.fsencode(folder), b"tmpfs", REMOUNT if again else 0, f"size={kib}k".encode())


def fill(folder: Path) -> None:
    with pytest.raises(OSError, match="No space left"), (folder / "filler").open("wb", buffering=0) as file:
        while True:
            file.write(bytes(KIB))


def on_small_disk(tmp_path: Path, job: Callable[..., None], *arguments: Any, code: int = 0) -> Forked:
    """The job has come to its end with that exit code; skips where nothing can be mounted."""
    disk = tmp_path / "disk"
    disk.mkdir()
    with Forked(tmp_path / "said", job, disk, *arguments, cwd=tmp_path) as running:
        found = running.wait()
    if found == NO_MOUNT:
        pytest.skip(running.stdout)
    assert found == code, running.stderr
    return running


def train_and_keep(run_dir: Path, place: Path, **options: Any) -> None:
    parts = make_parts(**RUN)
    train(parts, make_trainer(**TRAINER), run_dir, **options)
    save_file(weights(parts), place)


def save_and_resume(disk: Path, kib: int) -> None:
    mount(disk, kib)
    run_dir = disk / "run"
    with pytest.raises(LoramoeError) as full:
        train(make_parts(**RUN), make_trainer(**TRAINER), run_dir)
    assert "step_000002 could not be written (No space left on device); the former checkpoints are" in str(full.value)
    assert [path.name for path in (run_dir / "checkpoints").iterdir()] == ["step_000001"]
    assert fault(run_dir / "checkpoints" / "step_000001") is None
    mount(disk, 10 * kib, again=True)  # room is made
    train_and_keep(run_dir, disk.parent / "again", resume=find_latest(run_dir, on_skip=pytest.fail))
    (disk.parent / "metrics.jsonl").write_bytes((run_dir / "metrics.jsonl").read_bytes())


def test_a_full_disk_during_a_save(tmp_path: Path) -> None:
    """It says so, the former checkpoint is intact, and once there is room the run ends as if nothing had happened."""
    with Forked(tmp_path / "said", train_and_keep, tmp_path / "whole", tmp_path / "once") as running:
        assert running.wait() == 0, running.stderr
    first = tmp_path / "whole" / "checkpoints" / "step_000001"
    size = sum(path.stat().st_size for path in first.rglob("*") if path.is_file())
    on_small_disk(tmp_path, save_and_resume, size * 3 // 2 // KIB)
    assert (tmp_path / "again").read_bytes() == (tmp_path / "once").read_bytes()
    assert log(tmp_path) == log(tmp_path / "whole")


class Filling:
    """Stage data that fills the disk while the third step is prepared."""

    def __init__(self, data: Any, disk: Path) -> None:
        self.data, self.disk = data, disk

    def steps(self, *, start: int, **which: int) -> Iterator[Any]:
        for step, batches in enumerate(self.data.steps(start=start, **which), start):
            if step == 2:
                fill(self.disk)
            yield batches


def log_that_does_not_fit(disk: Path) -> None:
    mount(disk, 4096)
    parts = make_parts(**RUN)
    made = parts.stage_data
    parts = replace(parts, stage_data=lambda name: Filling(made(name), disk))
    with pytest.raises(LoramoeError, match=r"metrics.jsonl cannot be written .No space left on device.; make room"):
        train(
            parts,
            make_trainer(**{**TRAINER, "stages": {"only": {"steps": 20}}, "checkpoint_every": None}),
            disk / "run",
        )


def test_a_full_disk_for_the_log(tmp_path: Path) -> None:
    running = on_small_disk(tmp_path, log_that_does_not_fit)
    assert "Traceback" not in running.stderr


def filled_after_training(disk: Path, run_dir: Path, arguments: tuple[str, ...]) -> None:
    """The command, with a disk that is full once the training is over; then `saved`, or what is wrong."""
    from loramoe_train import run

    mount(disk, 64 * KIB)
    fit = run.fit

    def fit_and_fill(*given: Any, **named: Any) -> Any:
        summary = fit(*given, **named)
        fill(disk)
        return summary

    run.fit = fit_and_fill
    try:
        command("train", arguments)
    finally:
        print("saved" if fault(find_latest(run_dir)) is None and not half_written(run_dir) else os.listdir(run_dir))


def test_a_full_disk_at_the_end_of_the_command(tmp_path: Path) -> None:
    run_dir = tmp_path / "disk" / "run"
    arguments = (*MIXER, *TWO_TASKS, NO_EVAL, "trainer.max_steps=2", "resume=auto", f"run_dir={run_dir}")
    running = on_small_disk(tmp_path, filled_after_training, run_dir, arguments, code=2)
    words = f"{run_dir} could not be written (No space left on device); nothing that was trained is lost"
    check_refused(subprocess.CompletedProcess([], 2, running.stdout, running.stderr), 2, words)
    assert running.stdout.splitlines()[-1] == "saved"
