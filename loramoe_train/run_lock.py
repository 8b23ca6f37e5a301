"""One job at a time in a run folder. No torch in here.

The lock is one of the kernel's record locks on RUN_DIR/.lock. It belongs to the process: it is gone when the process
is, however that ended, and workers forked from it, which may outlive it by seconds, do not hold it (they would hold
`flock`'s). The file's content only says whose it is.

On NFS it holds between machines, if server and mount lock at all: with `nolock`, and on Lustre with `localflock`, it
keeps out the jobs of the same machine alone.
"""

import errno
import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from loramoe_train.errors import ConfigError

LOCK = ".lock"
_HELD = (errno.EACCES, errno.EAGAIN)
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EINVAL)


@contextmanager
def alone_in(run_dir: Path) -> Iterator[str | None]:
    """Hold the lock of a run folder, which is made if need be, and is removed again if nothing is left in it.

    Yields what the user should know: None, or that the file system has no locks.

    Raises ConfigError when another process holds the lock, or the folder cannot be written.
    """
    path = run_dir / LOCK
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        handle, note = _lock(path)
    except BlockingIOError:
        raise ConfigError(
            f"run_dir={run_dir} is in use by {_holder(path)}; wait until it has ended, or stop it (SIGTERM lets it "
            f"save first), and give the same command again; another run_dir starts a run beside it"
        ) from None
    except OSError as error:
        raise ConfigError(f"run_dir={run_dir} cannot be written: {error.strerror}") from error
    try:
        yield note
    finally:
        with suppress(OSError):
            path.unlink()  # before the lock goes, or it might be the next one's
        os.close(handle)
        with suppress(OSError):  # of a run that could not start nothing should be left; all others have something in it
            run_dir.rmdir()


def _lock(path: Path) -> tuple[int, str | None]:
    """An open file that is locked, and what there is to say. Raises BlockingIOError if another process holds it."""
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        note = None
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                os.close(handle)
                if error.errno in _HELD:
                    raise BlockingIOError(error.errno, os.strerror(error.errno)) from None
                raise
            note = f"{path.parent} lies on a file system without locks: nothing keeps a second job out of it"
        if _is_at(handle, path):
            with suppress(OSError):  # a full disk: the lock holds all the same
                os.ftruncate(handle, 0)
                os.write(handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
            return handle, note
        os.close(handle)  # its owner has just left and removed it; what counts is the file that is there now


def _is_at(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except FileNotFoundError:
        return False


def _holder(path: Path) -> str:
    try:
        return path.read_text(errors="replace").strip()[:200] or "another job"
    except OSError:
        return "another job"
