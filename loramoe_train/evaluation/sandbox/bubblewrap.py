"""The command line of bubblewrap: a root with a read-only /usr and interpreter, and a small private /tmp. No /proc."""

import os
import sys
from pathlib import Path

from loramoe_train.evaluation.sandbox.inside.namespaces import INTERPRETER_INSIDE


def bubblewrap(disk_bytes: int, user: int) -> list[str]:
    """What stands before the command to run. As root, the child keeps the right to become another user."""
    command = ["bwrap", "--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts", "--unshare-cgroup-try"]
    command += ["--die-with-parent", "--new-session", "--hostname", "sandbox", "--cap-drop", "ALL"]
    if os.geteuid() == 0:
        # the child itself becomes another user: `--uid` as root would leave RLIMIT_NPROC without effect
        command += ["--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
    else:
        command += ["--unshare-user", "--uid", str(user), "--gid", str(user)]
    command += ["--ro-bind", "/usr", "/usr"]
    for name in ("/bin", "/sbin", "/lib", "/lib32", "/lib64"):
        if os.path.islink(name):
            command += ["--symlink", os.readlink(name), name]
        else:
            command += ["--ro-bind-try", name, name]
    command += ["--ro-bind-try", "/etc/ld.so.cache", "/etc/ld.so.cache", "--dev", "/dev"]
    if not _below_usr(sys.base_prefix):
        command += ["--ro-bind", sys.base_prefix, INTERPRETER_INSIDE]
        command += ["--setenv", "LD_LIBRARY_PATH", f"{INTERPRETER_INSIDE}/lib"]
    command += ["--perms", "1777", "--size", str(disk_bytes), "--tmpfs", "/tmp", "--chdir", "/tmp"]
    return command + ["--remount-ro", "/dev", "--remount-ro", "/"]


def interpreter_inside(python: str) -> str:
    """Where an interpreter lies inside."""
    if _below_usr(sys.base_prefix):
        return python
    return str(Path(INTERPRETER_INSIDE, Path(python).relative_to(Path(sys.base_prefix).resolve())))


def _below_usr(folder: str) -> bool:
    return Path(folder).resolve().is_relative_to("/usr")
