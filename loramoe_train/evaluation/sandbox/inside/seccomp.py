"""A seccomp filter: the system calls that a computing Python program needs, and no other. x86_64 and aarch64.

There is no call to open a socket, to start a process or a program, to trace or signal another process, to mount, to
enter a namespace, to change the mode, owner or times of a file, and none of keyctl, bpf, perf, io_uring, userfaultfd:
what is not listed fails with EPERM; what is newer than this table, with ENOSYS. Threads are allowed.
"""

import ctypes
import os
import struct

from loramoe_train.evaluation.sandbox.inside.kernel import SET_SECCOMP, call, no_new_rights
from loramoe_train.evaluation.sandbox.inside.syscalls import ALLOWED, CHANGE_FILES, LOOKED_INTO, NEWEST, Numbers

MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column of the tables, AUDIT_ARCH
CLONE_THREAD, CLONE_NEW_ANYTHING = 0x10000, 0x7E020000
WRITE_FLAGS, TRUNCATE_FLAG = 0o1 | 0o2 | 0o100 | 0o1000 | 0o20000000, 0o1000  # O_WRONLY, RDWR, CREAT, TRUNC, TMPFILE
PLAIN_FCNTL = (0, 1, 2, 3, 4, 5, 6, 7, 1030, 1032)  # not F_SETOWN and F_SETSIG, which send signals
# is it a terminal, its size, bytes waiting, blocking or not, closed on exec or not
PLAIN_IOCTL = (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)
PLAIN_PRCTL = (15, 16)  # the name of a thread
UNIX, STREAM = 1, 1

LOAD, AND, EQUAL, ANY_BIT, LATER, RETURN = 0x20, 0x54, 0x15, 0x45, 0x35, 0x06
ALLOW, KILL_PROCESS, ERROR, EPERM, ENOSYS = 0x7FFF0000, 0x80000000, 0x50000, 1, 38
Step = tuple[int, int, int, int]  # code, steps to skip if true, if false, constant


def install(*, files: str) -> None:
    """Filter this process's system calls from now on; its threads inherit that.

    Args:
        files: "change", "no truncation" (opening may not empty a file) or "read".

    Raises:
        OSError: the architecture is not in the table, or the kernel has no filters.
    """
    machine = os.uname().machine
    if machine not in MACHINES or struct.calcsize("P") != 8:
        raise OSError(f"no system call table for {machine}")
    program = b"".join(struct.pack("=HBBI", *step) for step in _steps(machine, files, os.getpid()))
    kept = ctypes.create_string_buffer(program, len(program))
    head = struct.pack("@HP", len(program) // 8, ctypes.addressof(kept))
    no_new_rights()
    call("prctl", SET_SECCOMP, 2, head, 0, 0)


def _steps(machine: str, files: str, own_pid: int) -> list[Step]:
    column, architecture = MACHINES[machine]
    steps: list[Step] = [
        (LOAD, 0, 0, 4),
        (EQUAL, 1, 0, architecture),  # a 32-bit call has other numbers
        (RETURN, 0, 0, KILL_PROCESS),
        (LOAD, 0, 0, 0),
    ]

    def rule(numbers: Numbers, verdict: list[Step]) -> None:
        number = numbers[column]
        if number is not None:
            steps.extend([(EQUAL, 0, len(verdict), number), *verdict])

    def look(name: str, verdict: list[Step]) -> None:
        rule(LOOKED_INTO[name], verdict)

    for numbers in ALLOWED.values():
        rule(numbers, [(RETURN, 0, 0, ALLOW)])
    if files != "read":
        for numbers in CHANGE_FILES.values():
            rule(numbers, [(RETURN, 0, 0, ALLOW)])
    look("clone", [*_without(0, CLONE_NEW_ANYTHING), *_with(0, CLONE_THREAD)])
    for missing in ("clone3", "openat2"):  # their arguments are out of a filter's sight; libc then uses the older ones
        look(missing, [(RETURN, 0, 0, ERROR | ENOSYS)])
    flags = {"change": 0, "no truncation": TRUNCATE_FLAG, "read": WRITE_FLAGS}[files]
    look("open", [*_without(1, flags), (RETURN, 0, 0, ALLOW)])
    look("openat", [*_without(2, flags), (RETURN, 0, 0, ALLOW)])
    look("kill", _one_of(0, (own_pid,)))
    look("tgkill", _one_of(0, (own_pid,)))
    look("prlimit64", _one_of(0, (0, own_pid)))
    look("fcntl", _one_of(1, PLAIN_FCNTL))
    look("ioctl", _one_of(1, PLAIN_IOCTL))
    look("prctl", _one_of(0, PLAIN_PRCTL))
    # a stream pair is as good as two pipes, and asyncio needs one; a datagram socket could be sent elsewhere
    look("socketpair", [*_must_be(0, UNIX), (LOAD, 0, 0, _low(1)), (AND, 0, 0, 0xF), *_equal(STREAM), *_yes()])
    look("sendto", [*_must_be(4, 0), (LOAD, 0, 0, _low(4) + 4), *_equal(0), *_yes()])
    steps += [(LATER, 0, 1, NEWEST + 1), (RETURN, 0, 0, ERROR | ENOSYS), (RETURN, 0, 0, ERROR | EPERM)]
    return steps


def _low(argument: int) -> int:
    """Offset of the low half of a system call's argument."""
    return 16 + 8 * argument


def _yes() -> list[Step]:
    return [(RETURN, 0, 0, ALLOW)]


def _equal(value: int) -> list[Step]:
    return [(EQUAL, 1, 0, value), (RETURN, 0, 0, ERROR | EPERM)]


def _must_be(argument: int, value: int) -> list[Step]:
    return [(LOAD, 0, 0, _low(argument)), *_equal(value)]


def _one_of(argument: int, values: tuple[int, ...]) -> list[Step]:
    tests = [step for value in values for step in ((EQUAL, 0, 1, value), (RETURN, 0, 0, ALLOW))]
    return [(LOAD, 0, 0, _low(argument)), *tests, (RETURN, 0, 0, ERROR | EPERM)]


def _without(argument: int, bits: int) -> list[Step]:
    return [(LOAD, 0, 0, _low(argument)), (ANY_BIT, 0, 1, bits), (RETURN, 0, 0, ERROR | EPERM)]


def _with(argument: int, bits: int) -> list[Step]:
    return [(LOAD, 0, 0, _low(argument)), (ANY_BIT, 1, 0, bits), (RETURN, 0, 0, ERROR | EPERM), *_yes()]
