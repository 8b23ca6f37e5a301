"""Landlock: the files that this process and its children may still open. Needs no rights; Linux 5.13 and later."""

import ctypes
import os
import struct

from loramoe_train.evaluation.sandbox.inside.kernel import call, libc, no_new_rights

CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446  # the same numbers on every architecture
EXECUTE, WRITE, READ, LIST = 1, 2, 4, 8
REMOVE = 16 | 32  # folders, files
MAKE = 128 | 256 | 4096  # folders, files, symbolic links
RENAME, TRUNCATE = 1 << 13, 1 << 14
# rights that exist since an interface version: all of them are taken away where no rule gives them back
RIGHTS = ((1, (1 << 13) - 1), (2, RENAME), (3, TRUNCATE), (5, 1 << 15))
BIND_AND_CONNECT = 3  # of TCP; since version 4
ABSTRACT_SOCKETS_AND_SIGNALS = 3  # outside this process's own domain; since version 6


def version() -> int:
    """Of the kernel's interface; 0 where there is none."""
    return max(0, int(libc.syscall(ctypes.c_long(CREATE_RULESET), None, ctypes.c_long(0), ctypes.c_long(1))))


def restrict(readable: list[str], writable: list[str]) -> None:
    """From now on only what lies below `readable` can be opened, and only below `writable` can files be made.

    Raises OSError where the kernel has no Landlock.
    """
    found = version()
    if not found:
        raise OSError("this kernel has no Landlock")
    handled = 0
    for since, rights in RIGHTS:
        handled |= rights if since <= found else 0
    attributes = struct.pack("=Q", handled)
    if found >= 4:
        attributes += struct.pack("=Q", BIND_AND_CONNECT)
    if found >= 6:
        attributes += struct.pack("=Q", ABSTRACT_SOCKETS_AND_SIGNALS)
    rules = call("syscall", CREATE_RULESET, attributes, len(attributes), 0)
    of_folders = EXECUTE | READ | LIST
    for places, rights in ((readable, of_folders), (writable, READ | LIST | WRITE | REMOVE | MAKE | RENAME | TRUNCATE)):
        for place in places:
            _allow(rules, place, rights & handled)
    no_new_rights()
    call("syscall", RESTRICT_SELF, rules, 0)
    os.close(rules)


def _allow(rules: int, place: str, rights: int) -> None:
    try:
        folder = os.open(place, os.O_PATH)
    except FileNotFoundError:
        return
    if not os.path.isdir(place):
        rights &= READ | WRITE | EXECUTE
    below = struct.pack("=Qi", rights, folder)
    call("syscall", ADD_RULE, rules, 1, below, 0)
    os.close(folder)
