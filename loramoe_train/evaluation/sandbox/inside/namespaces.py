"""Own user, mount, PID, network, IPC and UTS namespaces, and in them a root that holds an interpreter and a small /tmp.

The same that bubblewrap builds, for machines that lack it.
"""

import os
import sys

from loramoe_train.evaluation.sandbox.inside.kernel import call

NEW_MOUNTS, NEW_HOSTNAME, NEW_IPC = 0x20000, 0x4000000, 0x8000000  # of unshare
NEW_USER, NEW_PIDS, NEW_NETWORK = 0x10000000, 0x20000000, 0x40000000
READ_ONLY, NO_SETUID, NO_DEVICES, CHANGE_FLAGS, BIND, RECURSIVE, PRIVATE = 1, 2, 4, 32, 4096, 16384, 1 << 18  # of mount
MOUNT_SETATTR, WHOLE_TREE, DETACH = 442, 0x8000, 2
INTERPRETER_INSIDE = "/py"  # fixed: the real place may lie below a home that nobody else may enter


def enter(user: int) -> None:
    """Become the first process of new namespaces; the caller's process waits outside and ends as this one does.

    Root keeps its user, to drop it later. Anybody else is `user` from now on, with all rights inside and none outside.
    """
    outside = os.geteuid(), os.getegid()
    spaces = NEW_MOUNTS | NEW_HOSTNAME | NEW_IPC | NEW_PIDS | NEW_NETWORK
    if outside[0] == 0:
        call("unshare", spaces)
    else:
        call("unshare", spaces | NEW_USER)
        for name, text in (
            ("setgroups", "deny"),
            ("uid_map", f"{user} {outside[0]} 1"),
            ("gid_map", f"{user} {outside[1]} 1"),
        ):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
    first = os.fork()
    if first:
        os.closerange(0, 3)
        _, status = os.waitpid(first, 0)
        os._exit(128 + os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status))


def build_root(disk_bytes: int) -> None:
    """Replace the root of this mount namespace by one that holds nothing of the user's. Ends in its /tmp.

    Mounts of the machine are only bound, read-only, never changed: below /usr, and the interpreter where it is
    elsewhere. /proc is left out: nothing here needs it.
    """
    _mount(None, "/", None, RECURSIVE | PRIVATE)
    interpreter = os.open(sys.base_prefix, os.O_PATH)  # may lie below /tmp, which is about to be covered
    new = "/tmp"
    _mount("sandbox", new, "tmpfs", NO_SETUID | NO_DEVICES, "size=64k,mode=755")
    _bind("/usr", f"{new}/usr")
    for name in ("bin", "sbin", "lib", "lib32", "lib64"):
        if os.path.islink(f"/{name}"):
            os.symlink(os.readlink(f"/{name}"), f"{new}/{name}")
        elif os.path.isdir(f"/{name}"):
            _bind(f"/{name}", f"{new}/{name}")
    os.mkdir(f"{new}/dev")
    for name in ("null", "zero", "urandom", "random"):
        os.close(os.open(f"{new}/dev/{name}", os.O_CREAT))
        _mount(f"/dev/{name}", f"{new}/dev/{name}", None, BIND)
    if not (os.path.realpath(sys.base_prefix) + "/").startswith("/usr/"):
        _bind(f"/proc/self/fd/{interpreter}", new + INTERPRETER_INSIDE)
        _move_imports(sys.base_prefix, INTERPRETER_INSIDE)
    os.close(interpreter)
    os.mkdir(f"{new}/tmp")
    _mount("sandbox", f"{new}/tmp", "tmpfs", NO_SETUID | NO_DEVICES, f"size={disk_bytes},nr_inodes=1k,mode=1777")
    os.chdir(new)
    call("pivot_root", b".", b".")
    call("umount2", b".", DETACH)
    _mount(None, "/", None, BIND | CHANGE_FLAGS | READ_ONLY | NO_SETUID | NO_DEVICES)
    os.chdir("/tmp")


def _mount(source: str | None, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
    texts = [None if text is None else text.encode() for text in (source, target, kind, data)]
    try:
        call("mount", texts[0], texts[1], texts[2], flags, texts[3])
    except OSError as error:
        raise OSError(error.errno, f"{error.strerror} at {target}") from None


def _bind(source: str, target: str) -> None:
    """A folder with all that is mounted below it, read-only and without devices."""
    os.makedirs(target)
    _mount(source, target, None, BIND | RECURSIVE)
    here, nothing = -100, (0).to_bytes(8, "little")
    flags = (READ_ONLY | NO_SETUID | NO_DEVICES).to_bytes(8, "little")
    call("syscall", MOUNT_SETATTR, here, target.encode(), WHOLE_TREE, flags + 3 * nothing, 32)


def _move_imports(old: str, new: str) -> None:
    """What has not been imported yet is found below `new` from now on."""
    packages = [
        module.__path__ for module in sys.modules.values() if isinstance(getattr(module, "__path__", None), list)
    ]
    for places in (sys.path, *packages):
        places[:] = [place.replace(old, new, 1) for place in places]
    sys.path_importer_cache.clear()


def read_interpreter_by_descriptor() -> None:
    """Where another user may not enter a folder above the interpreter: reach its libraries through open descriptors.

    To be called while it can still be entered; what lies beside the libraries stays out of reach.
    """
    for place in [place for place in sys.path if os.path.isdir(place)]:
        _move_imports(place, f"/proc/self/fd/{os.open(place, os.O_PATH)}")
