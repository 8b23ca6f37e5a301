"""Two jobs in one run folder: the second is refused, and whatever ends the first lets the next one in."""

import errno
import fcntl
import os
import signal
import time
from pathlib import Path

import pytest

from loramoe_train import run_lock
from loramoe_train.errors import ConfigError
from loramoe_train.run_lock import LOCK, alone_in
from tests.forks import Forked


def hold(run_dir: Path) -> None:
    """Hold the lock for good, with a child beside, as a worker that loads data is one."""
    with alone_in(run_dir):
        (run_dir / "mine").write_text("")
        child = os.fork()
        if child == 0:
            time.sleep(300)
            os._exit(0)
        print(child, flush=True)
        time.sleep(300)


def test_the_lock_goes_with_its_process_and_with_nothing_else(tmp_path: Path) -> None:
    run_dir = tmp_path / "runs" / "one"
    with Forked(tmp_path / "said", hold, run_dir) as first:
        first.wait_until(lambda: first.stdout.endswith("\n"))
        child = int(first.stdout)
        with pytest.raises(ConfigError, match=rf"run_dir={run_dir} is in use by process {first.pid} on \S+; wait"):
            with alone_in(run_dir):
                pytest.fail("two hold the lock")
        assert first.kill() == -signal.SIGKILL
    try:
        os.kill(child, 0)  # it lives on, with all files open that its parent had
        with alone_in(run_dir) as note:
            assert note is None and f"process {os.getpid()} on" in (run_dir / LOCK).read_text()
        assert [path.name for path in run_dir.iterdir()] == ["mine"]
    finally:
        os.kill(child, signal.SIGKILL)


def test_a_folder_that_stays_empty_goes(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), alone_in(tmp_path / "run"):
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_its_owner_has_just_removed_does_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between opening and locking it: the lock would be on a file that nobody else can find."""
    real, calls = fcntl.lockf, []

    def late(handle: int, how: int) -> None:
        if not calls:
            (tmp_path / LOCK).unlink()
        calls.append(handle)
        real(handle, how)

    monkeypatch.setattr(run_lock.fcntl, "lockf", late)
    with alone_in(tmp_path):
        assert len(calls) == 2 and os.fstat(calls[-1]).st_ino == (tmp_path / LOCK).stat().st_ino


@pytest.mark.parametrize(("number", "refused"), [(errno.ENOLCK, False), (errno.ENOTSUP, False), (errno.EIO, True)])
def test_a_file_system_without_locks(
    number: int, refused: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lockf(handle: int, how: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(run_lock.fcntl, "lockf", lockf)
    if refused:
        with pytest.raises(ConfigError, match="cannot be written: Input/output error"), alone_in(tmp_path / "run"):
            pass
    else:
        with alone_in(tmp_path / "run") as note:
            assert "without locks: nothing keeps a second job out" in note


def test_a_folder_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written: Not a directory"), alone_in(tmp_path / "file" / "run"):
        pass
