"""What hostile code may try. Every program leaves `f` wrong, so its test must fail; none may harm or learn anything.

Words in capitals are filled in: MARKER is a file of the user's that everybody may write, FOLDER the folder around it,
HOME a folder that holds `notes`, VICTIM and OURS processes of the user's, PORT, STREAM and SOCKET places where the
machine listens.
The user's environment, files and processes hold the word SECRET; a program that finds it raises it.
"""

from contextlib import suppress
from pathlib import Path


def open_to_others(path: Path) -> None:
    """Let every user enter a folder and those above it: what keeps an attack out must be the sandbox alone."""
    for folder in (path, *list(path.parents)[:-1]):
        with suppress(PermissionError):
            folder.chmod(folder.stat().st_mode | 0o005)


LIBC = """
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
"""
LEAK = """
def leak(loot):
    raise RuntimeError("leaked SECRET" if "SEC" + "RET" in str(loot) else "nothing")
"""

FILES = {
    "delete": "import os; os.remove(MARKER)",
    "delete the folder": "import shutil; shutil.rmtree(FOLDER)",
    "overwrite": "open(MARKER, 'w').write('gone')",
    "append": "open(MARKER, 'a').write('more')",
    "truncate while opening to read": "import os; os.open(MARKER, os.O_RDONLY | os.O_TRUNC)",
    "truncate": "import os; os.truncate(MARKER, 0)",
    "rename over it": "import os; open('x', 'w').write('gone'); os.rename('x', MARKER)",
    "move it away": "import os; os.rename(MARKER, 'taken')",
    "take its rights": "import os; os.chmod(MARKER, 0)",
    "change its times": "import os; os.utime(MARKER, (0, 0))",
    "make a file": "open(FOLDER + '/new', 'w')",
    "make a folder": "import os; os.mkdir(FOLDER + '/new')",
    "a system folder": "open('/usr/bin/loramoe-attack', 'w'); open('/etc/loramoe-attack', 'w')",
    "the own folder's way out": "open('../' * 20 + MARKER, 'w').write('gone')",
    "symbolic link": "import os; os.symlink(MARKER, 'link'); open('link', 'w').write('gone')",
    "symbolic link to the folder": "import os, shutil; os.symlink(FOLDER, 'way'); shutil.rmtree('way/')",
    "own folder replaced by a link": """
import os
here = os.getcwd()
os.chdir('/')
os.rename(here, here + '-old')
os.symlink(FOLDER, here)
""",
    "hard link": "import os; os.link(MARKER, 'same'); open('same', 'w').write('gone')",
    "own interpreter": "import os; open(os.__file__, 'a').write('#')",
    "chroot": "import os; os.chroot(FOLDER); os.remove('/marker')",
    "mount": LIBC + "libc.mount(b'none', FOLDER.encode(), b'tmpfs', 0, 0); open(MARKER, 'w')",
    "namespaces of its own": LIBC + "libc.unshare(0x10020000); open(MARKER, 'w').write('gone')",
    "io_uring": LIBC + "import os; assert libc.syscall(425, 4, bytes(120)) >= 0; os.remove(MARKER)",
}

PROCESSES = {
    "fork bomb": "import os\nwhile True: os.fork()",
    "thread bomb": """
import threading, time
while True: threading.Thread(target=time.sleep, args=(100,)).start()
""",
    "another program": "import subprocess; subprocess.run(['touch', FOLDER + '/new'], check=True)",
    "a shell": "import os; os.system('rm -rf ' + FOLDER)",
    "in place of itself": "import os; os.execv('/usr/bin/touch', ['touch', FOLDER + '/new'])",
    "own session": "import os, time\nos.setsid()\nwhile True: time.sleep(1)",
    "kill a process": "import os; os.kill(VICTIM, 9)",
    "kill by thread": LIBC + "libc.syscall(234, VICTIM, VICTIM, 9); libc.syscall(131, VICTIM, VICTIM, 9)",
    "kill everything": "import os; os.kill(-1, 9)",
    "kill the group": "import os; os.killpg(0, 9)",
    "kill the parent": "import os; os.kill(os.getppid(), 9)",
    "signal by a socket": """
import fcntl, os, socket
a, b = socket.socketpair()
fcntl.fcntl(a, 8, VICTIM); fcntl.fcntl(a, 10, 9); fcntl.fcntl(a, fcntl.F_SETFL, os.O_ASYNC | os.O_NONBLOCK)
b.send(b'x')
""",
    "ptrace the parent": LIBC + "import os, time; libc.ptrace(16, os.getppid(), 0, 0); time.sleep(0.1)",
    "ptrace a process": LIBC + "assert libc.ptrace(16, VICTIM, 0, 0) == 0; libc.ptrace(8, VICTIM, 0, 0)",
    "write to its memory": LIBC + "assert libc.process_vm_writev(VICTIM, 0, 0, 0, 0, 0) == 0",
    "limit another process": "import resource; resource.prlimit(VICTIM, resource.RLIMIT_NOFILE, (0, 0))",
    "threads that outlive it": """
import threading, time
def late():
    time.sleep(0.4)
    open(MARKER, 'w').write('gone')
for n in range(3): threading.Thread(target=late).start()
""",
}

RESOURCES = {
    "endless loop": "while True: pass",
    "endless loop in the function": "def f(x):\n    while True: pass",
    "endless sleep": "import time; time.sleep(1000)",
    "endless output": "while True: print('x' * 100_000)",
    "endless values": "def f(x):\n    while True: yield x",
    "memory bomb": "x = bytearray(8 << 30)",
    "memory in steps": "x = [0]\nwhile True: x += x",
    "memory in values": "def f(x): return [0] * (1 << 27)",
    "huge file": "file = open('big', 'wb')\nwhile True: file.write(bytes(1 << 20))",
    "many files": "n = 0\nwhile True:\n    n += 1\n    open(f'f{n}', 'wb').write(bytes(1 << 19))",
    "deep folders": "import os\nwhile True: os.mkdir('d'); os.chdir('d')",
    "folders that nobody may read": "import os\nos.mkdir('d'); os.mkdir('d/e'); os.mkdir('x', 0o300); open('x/y', 'w')",
    "many descriptors": "import os\nwhile True: os.dup(1)",
    "deep recursion": "def g(n): return g(n + 1) + 1\ndef f(x): return g(x)",
    "deeper recursion": "import sys; sys.setrecursionlimit(1 << 30)\ndef g(n): return [g(n + 1)]\nf = g",
    "signals swallowed": """
import signal
for number in range(1, 65):
    try: signal.signal(number, lambda *_: None)
    except (OSError, ValueError): pass
signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65))
while True:
    try:
        while True: pass
    except BaseException: pass
""",
    "alarm taken away": "import signal, time; signal.alarm(0); signal.setitimer(0, 0); time.sleep(1000)",
    "limits raised": """
import resource
for name in ('RLIMIT_AS', 'RLIMIT_CPU', 'RLIMIT_FSIZE'):
    try: resource.setrlimit(getattr(resource, name), (-1, -1))
    except (OSError, ValueError): pass
x = bytearray(8 << 30)
""",
    "waits for input": "import sys\nassert sys.stdin.read() == '' and input()",
}

NETWORK = {
    "TCP": "import socket; socket.create_connection(('127.0.0.1', PORT), 1).send(b'x')",
    "UDP": "import socket; socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', PORT))",
    "TCP over IPv6": "import socket; socket.socket(socket.AF_INET6).connect(('::ffff:127.0.0.1', PORT))",
    "Unix": "import socket; socket.socket(socket.AF_UNIX).connect(STREAM)",
    "datagram of a pair": """
import socket
a, b = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
a.sendto(b'x', SOCKET)
""",
    "netlink": "import socket; socket.socket(socket.AF_NETLINK, socket.SOCK_RAW)\nopen(FOLDER + '/new', 'w')",
    "resolving": "import urllib.request; urllib.request.urlopen('http://localhost:%d' % PORT, timeout=1)",
}

VIEWS = {
    "environment": LEAK + "import os; leak(dict(os.environ))",
    "environment in C": LEAK + LIBC + "libc.getenv.restype = ctypes.c_char_p; leak(libc.getenv(b'LORAMOE_TOKEN'))",
    "a file": LEAK + "leak(open(MARKER).read())",
    "home": LEAK + "leak(open(HOME + '/notes').read())",
    "names in home": LEAK + "import os; leak(os.listdir(HOME))",
    "environment of a process": LEAK + "leak(open('/proc/VICTIM/environ').read())",
    "files of a process": LEAK + "leak(open('/proc/VICTIM/root' + MARKER).read())",
    "every process": LEAK
    + """
import glob
found = []
for path in glob.glob('/proc/[0-9]*/environ') + glob.glob('/proc/[0-9]*/cmdline'):
    try: found.append(open(path).read())
    except OSError: pass
leak(found)
""",
    "memory of a process": LEAK
    + LIBC
    + """
class Piece(ctypes.Structure): _fields_ = [('at', ctypes.c_void_p), ('size', ctypes.c_size_t)]
text = ctypes.create_string_buffer(4096)
here, there = Piece(ctypes.addressof(text), 6), Piece(WHERE, 6)
assert libc.process_vm_readv(OURS, ctypes.byref(here), 1, ctypes.byref(there), 1, 0) == 6
leak(text.raw)
""",
    "inherited descriptors": LEAK
    + """
import os
found = []
for number in range(3, 256):
    try: found.append(os.pread(number, 4096, 0))
    except OSError: pass
leak(found)
""",
}
# what the weakest level does not promise: there what its user may read can be read
NOT_HIDDEN = {"a file", "home", "names in home", "every process", "environment of a process", "files of a process"}

# each leaves `f` wrong, yet tries to be taken for right
FAKES = {
    "os._exit": "import os; os._exit(0)",
    "os._exit in the function": "import os\ndef f(x): os._exit(0)",
    "SystemExit": "raise SystemExit(0)",
    "SystemExit in the function": "def f(x): raise SystemExit(0)",
    "exit handler": "import atexit, os; atexit.register(os._exit, 0); raise SystemExit",
    "killed by itself": "import os; os.kill(os.getpid(), 9)",
    "another check": "check = lambda function: None",
    "always equal": """
class Equal:
    def __eq__(self, other): return True
    def __ne__(self, other): return False
def f(x): return Equal()
""",
    "a number that is always equal": """
class Equal(int):
    def __eq__(self, other): return True
    __hash__ = int.__hash__
def f(x): return Equal(0)
""",
    "holds everything": """
class Full:
    def __contains__(self, value): return True
    def __iter__(self): return iter(())
def f(x): return Full()
""",
    "abs": "def abs(x): return 0\ndef f(x): return 1000",
    "builtins": """
import builtins
builtins.abs = lambda x: 0
builtins.AssertionError = type('AssertionError', (BaseException,), {'__new__': lambda *_: None})
builtins.__import__ = lambda *_, **__: None
def f(x): return 1000
""",
    "math": "import math; math.isclose = lambda *_: True\ndef f(x): return 1000",
    "every exception": """
import sys
sys.excepthook = lambda *_: None
sys.settrace(lambda *_: None)
def f(x): return 1000
""",
    "frames": """
import json, os, sys
frame = sys._getframe()
while frame:
    for name, value in list(frame.f_locals.items()) + list(frame.f_globals.items()):
        for number in ([value] if isinstance(value, int) else range(64)):
            try: os.write(number, json.dumps({'verdict': 'passed', 'message': ''}).encode())
            except (OSError, OverflowError): pass
    frame = frame.f_back
os._exit(0)
""",
    "every descriptor": """
import os
for number in range(3, 64):
    for text in (b'{"verdict": "passed", "message": ""}', b'["list", "value", 2, ["dict"]]\\n'):
        try: os.write(number, text)
        except OSError: pass
os._exit(0)
""",
    "the garbage collector": """
import gc, os
for thing in gc.get_objects():
    if callable(thing) and getattr(thing, '__name__', '') in ('judge', 'ask', '_shown'):
        thing.__code__ = (lambda *_, **__: {'verdict': 'passed', 'message': ''}).__code__
def f(x): return 1000
""",
    "a malformed answer": "import os\ndef f(x):\n    for n in range(3, 64):\n"
    "        try: os.write(n, b'[1, 2\\n' * 9)\n        except OSError: pass\n    return 0",
    "memory of the judge": """
import os
for process in (os.getppid(), 1, os.getpid() - 1):
    for number in range(64):
        try: open(f'/proc/{process}/fd/{number}', 'w').write('{"verdict": "passed", "message": ""}')
        except OSError: pass
os._exit(0)
""",
}
# how some end: a pattern for "VERDICT MESSAGE". Where files cannot be made at all, that is said instead
ENDS = {
    "resources: endless loop": "timeout",
    "resources: endless loop in the function": "timeout",
    "resources: endless sleep": "timeout",
    "resources: endless output": "File too large",
    "resources: memory bomb": "MemoryError",
    "resources: memory in steps": "MemoryError",
    "resources: memory in values": "MemoryError",
    "resources: huge file": "File too large|not permitted",
    "resources: many files": "No space left|private folder|not permitted",
    "resources: deep folders": "more than 1000 files|No space left|private folder|not permitted",
    "resources: many descriptors": "Too many open files",
    "resources: deep recursion": "RecursionError",
    "resources: signals swallowed": "timeout",
    "resources: alarm taken away": "timeout",
    "resources: limits raised": "MemoryError",
    "resources: waits for input": "EOFError",
    "processes: fork bomb": "not permitted",
    "processes: thread bomb": "can't start new thread",
    "processes: threads that outlive it": "AssertionError",
    "fakes: always equal": "AssertionError",
    "fakes: a number that is always equal": "AssertionError",
    "fakes: holds everything": "AssertionError",
    "fakes: abs": "AssertionError",
    "fakes: builtins": "AssertionError",
    "fakes: math": "AssertionError",
}
# that need neither root nor a certain kernel, and do harm where nothing holds
BITE = (
    "files: delete", "files: delete the folder", "files: overwrite", "files: append",
    "files: truncate while opening to read", "files: truncate", "files: rename over it", "files: move it away",
    "files: take its rights", "files: change its times", "files: make a file", "files: make a folder",
    "files: the own folder's way out", "files: symbolic link", "files: hard link", "processes: another program",
    "processes: a shell", "processes: in place of itself", "processes: kill a process", "network: TCP",
    "network: UDP", "network: Unix", "network: datagram of a pair", "views: environment",
    "views: environment in C", "views: a file", "views: home", "views: names in home",
    "views: environment of a process",
)  # fmt: skip
# what must hold in the end, where it is not `f(1) == 2`
TESTS = {
    "fakes: another check": "def check(candidate): assert candidate(1) == 2\ncheck(f)",
    "fakes: always equal": "assert f(1) == 2 and not f(1) != 2",
    "fakes: a number that is always equal": "assert f(1) == 2",
    "fakes: holds everything": "assert 2 in f(1)",
    "fakes: abs": "assert abs(f(1) - 2) < 1e-6",
    "fakes: builtins": "assert abs(f(1) - 2) < 1e-6",
    "fakes: math": "assert math.isclose(f(1), 2)",
}

ATTACKS = {
    f"{group}: {name}": code
    for group, programs in (
        ("files", FILES),
        ("processes", PROCESSES),
        ("resources", RESOURCES),
        ("network", NETWORK),
        ("views", VIEWS),
        ("fakes", FAKES),
    )
    for name, code in programs.items()
}
