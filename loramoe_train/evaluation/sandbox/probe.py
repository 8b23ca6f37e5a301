"""Whether a level holds on this machine: programs that try to get out, and must not."""

import os
import select
import socket
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

from loramoe_train.evaluation.sandbox.box import Sandbox
from loramoe_train.evaluation.sandbox.types import Program

# Must do no harm where nothing holds: only the marker is written to, the user's own places are asked about.
PROBE = """
import os

def opens(path, mode):
    try:
        open(path, mode).close()
    except OSError:
        return False
    return True

def lists(folder):
    try:
        return bool(os.listdir(folder))
    except OSError:
        return False

def connects(port):
    import socket
    try:
        with socket.socket() as client:
            client.settimeout(2)
            client.connect(("127.0.0.1", port))
    except OSError:
        return False
    return True

def sends(port):
    import socket
    try:
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"out", ("127.0.0.1", port))
    except OSError:
        pass

def hides(path):
    try:
        os.chmod(path, 0)
    except OSError:
        pass

def signals(process):
    try:
        os.kill(process, 0)
    except OSError:
        return False
    return True

def computes():
    import collections, json, math, random, re, typing
    return math.gcd(12, 18) == 6

def allocates(size):
    try:
        return bool(bytearray(size))
    except MemoryError:
        return False

def user():
    return os.geteuid()
"""


def probe(sandbox: Sandbox) -> str | None:
    """None if programs run in the sandbox and cannot get out; else what went wrong. A fraction of a second."""
    with tempfile.TemporaryDirectory(prefix="probe-") as folder, socket.socket() as server, _datagrams() as heard:
        os.chmod(folder, 0o777)  # isolation must do it alone
        marker = Path(folder, "marker")
        marker.write_text("untouched")
        marker.chmod(0o666)
        with suppress(OSError):  # a machine without a loopback has nothing to connect to
            server.bind(("127.0.0.1", 0))
            server.listen()
            heard.bind(server.getsockname())
        program = Program(PROBE, _tests(sandbox, str(marker), server.getsockname()[1]))
        try:
            outcome = sandbox.run(program)
        except OSError as error:
            return str(error)
        if marker.stat().st_mode & 0o777 != 0o666:
            return "a file outside lost its rights"
        if marker.read_text() != "untouched":
            return "a file outside was overwritten"
        if select.select([heard], [], [], 0)[0]:
            return "a datagram left"
        return None if outcome.verdict == "passed" else outcome.message or outcome.verdict


def _datagrams() -> socket.socket:
    return socket.socket(socket.AF_INET, socket.SOCK_DGRAM)


def _is_shown(place: str) -> bool:
    """Whether a folder is among those that Python needs, or the root, of which there is one inside as well."""
    found, shown = Path(place).resolve(), (Path("/usr"), Path(sys.base_prefix).resolve())
    return found == Path("/") or any(found.is_relative_to(folder) for folder in shown)


def _tests(sandbox: Sandbox, marker: str, port: int) -> str:
    folder = str(Path(marker).parent)
    promises = [
        (f"not opens({marker!r}, 'a')", "a file outside could be written"),
        (f"not opens({folder + '/new'!r}, 'x')", "a file outside could be made"),
        (f"not connects({port})", "the network is shared"),
        (f"sends({port}) is None", ""),
        (f"hides({marker!r}) is None", ""),
        (f"not signals({os.getpid()})", "our process could be signalled"),
        (f"not allocates({2 * sandbox.limits.memory_bytes})", "memory is not limited"),
        ("user() != 0", "still root"),
        ("computes()", "Python does not work"),
    ]
    if sandbox.level != "user":
        places = {folder, os.path.expanduser("~"), os.getcwd(), str(Path(__file__).parent)}
        promises += [(f"not opens({marker!r}, 'r')", "a file outside could be read")]
        promises += [(f"not lists({place!r})", f"{place} can be seen") for place in places if not _is_shown(place)]
        promises += [(f"not opens('/proc/{os.getpid()}/environ', 'r')", "our environment could be read")]
    return "\n".join(f"assert {condition}, {complaint!r}" for condition, complaint in promises)
