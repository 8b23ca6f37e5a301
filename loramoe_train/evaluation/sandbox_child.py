"""The inside of the sandbox: gives up every right that it still has, then runs one program. Standard library only.

`sandbox.py` passes this file's text to `python -I -S -c`; it is never imported by the package. Standard input holds a
line of settings (JSON), then the program. A program counts as run to its end only if the secret of the settings arrives
on the result descriptor: an exit code could be had with `os._exit(0)`. The secret is a hurdle, not a wall, for the
program shares this process: what protects the user is the isolation; all that a hunt for the secret gains is a score.
"""

import json
import os
import resource
import sys
import traceback

settings = json.loads(sys.stdin.buffer.readline())
program = sys.stdin.buffer.read().decode("utf-8", "replace")


def seal_files(interpreter: str) -> None:
    """In our own mount namespace: all files read-only, the writable places hidden, the interpreter still readable.

    The interpreter may live below a home that only its owner may enter, so it is bound to a place in the new /tmp.
    """
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)

    def mount(source: str, target: str, kind: str, flags: int, data: str = "") -> None:
        arguments = (source.encode(), target.encode(), kind.encode(), ctypes.c_ulong(flags), data.encode())
        if libc.mount(*arguments) != 0:
            raise OSError(ctypes.get_errno(), f"mount on {target}")

    nosuid_nodev, bind, recursive, private, read_only, remount = 2 | 4, 4096, 16384, 1 << 18, 1, 32
    mount("none", "/", "", recursive | private)
    # every file system below, one after the other: MS_REC does not reach flags
    with open("/proc/self/mounts", encoding="utf-8", errors="surrogateescape") as lines:
        points = [line.split()[1].encode().decode("unicode_escape") for line in lines]
    source = os.open(interpreter, os.O_PATH)
    for point in points:
        if point != "/proc" and not point.startswith(("/proc/", "/dev/pts")):
            mount("none", point, "", bind | remount | read_only | nosuid_nodev * (not point.startswith("/dev")))
    for hidden in ("/run", "/var/run", "/var/tmp", "/dev/shm", "/mnt", "/media", "/tmp"):
        if os.path.isdir(hidden) and not os.path.islink(hidden):
            mount("none", hidden, "tmpfs", nosuid_nodev, f"size={settings['disk_bytes']},mode=1777")
    os.mkdir("/tmp/python")
    mount(f"/proc/self/fd/{source}", "/tmp/python", "", bind | recursive)
    mount("none", "/tmp/python", "", bind | remount | read_only | nosuid_nodev)
    os.close(source)
    os.mkdir("/tmp/work", 0o777)
    os.chmod("/tmp/work", 0o777)
    os.chdir("/tmp/work")
    packages = [
        module.__path__ for module in sys.modules.values() if isinstance(getattr(module, "__path__", None), list)
    ]
    for places in (sys.path, *packages):
        places[:] = [place.replace(interpreter, "/tmp/python", 1) for place in places]
    sys.path_importer_cache.clear()


def drop_rights() -> None:
    if settings["seal"]:
        seal_files(settings["interpreter"])
    if settings["user"] is not None:
        os.setgroups([])
        os.setresgid(settings["user"], settings["user"], settings["user"])
        os.setresuid(settings["user"], settings["user"], settings["user"])
    for name, value in settings["limits"].items():
        # one second between the signal and the end, so that the caller can tell a spent CPU limit from other deaths
        resource.setrlimit(getattr(resource, name), (value, value + (name == "RLIMIT_CPU")))
    os.closerange(3, settings["result"])
    os.closerange(settings["result"] + 1, 4096)


def block_network() -> None:
    """Where no namespace does it: takes the modules away. Only a hurdle, so this level has to be asked for."""
    for name in ("_socket", "socket", "_ssl", "ctypes", "_ctypes", "subprocess", "_posixsubprocess"):
        sys.modules[name] = None  # type: ignore[assignment]


def run() -> None:
    # out of reach of `import __main__`: a program that wants it has to walk the frames
    result, secret = settings["result"], settings.pop("secret").encode()
    drop_rights()
    if settings["block_modules"]:
        block_network()
    try:
        exec(compile(program, "<candidate>", "exec"), {"__name__": "candidate"})
    except BaseException as failure:  # SystemExit too: leaving early is not passing
        sys.stderr.write("\n" + traceback.format_exception_only(failure)[-1])
        sys.stderr.flush()
        os._exit(1)
    os.write(result, secret)
    os._exit(0)  # threads and exit handlers of the program get no more time


run()
