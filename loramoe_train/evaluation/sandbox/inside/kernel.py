"""The system calls that Python does not wrap."""

import ctypes
import os
import signal

libc = ctypes.CDLL(None, use_errno=True)

SET_PDEATHSIG, SET_DUMPABLE, SET_SECCOMP, SET_NO_NEW_PRIVS = 1, 4, 22, 38  # of prctl


def call(name: str, *arguments: int | bytes | None | ctypes.Array[ctypes.c_char]) -> int:
    """A function of libc, integers as 64 bits. Raises OSError, naming the call, where it gives -1."""
    wide = [ctypes.c_long(value) if isinstance(value, int) else value for value in arguments]
    result = int(getattr(libc, name)(*wide))
    if result == -1:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")
    return result


def end_with_parent() -> None:
    """Be killed when the parent ends, however it does. Forgotten by fork and by a change of user."""
    call("prctl", SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def no_new_rights() -> None:
    """From now on no program that is started gives this process more rights."""
    call("prctl", SET_NO_NEW_PRIVS, 1, 0, 0, 0)


def drop_capabilities() -> None:
    """All of them; a user other than root has none, but the first process of a user namespace has them all."""
    version_3 = 0x20080522
    header = ctypes.create_string_buffer(version_3.to_bytes(4, "little") + bytes(4), 8)
    call("capset", header, ctypes.create_string_buffer(24))
