"""Runs model-written Python in a child process that can harm nothing: the strongest isolation there is, or refusal.

| level | files | network | how |
|---|---|---|---|
| bubblewrap | its own root: a read-only /usr and interpreter, a small private /tmp | none | `bwrap` |
| namespaces | the same | none | the child itself, as root or in a user namespace |
| seccomp | read: /usr and the interpreter; write: a private folder | none | Landlock and a filter of system calls |
| user | read: what its user may read; write: none | none | the filter alone; only when it is named |

Every level limits wall clock, CPU time, memory, threads, open files, file size and captured output, and has the filter
of system calls where the machine's architecture is known (x86_64, aarch64). A level is used only after a probe in it
has failed to get out (`probe.py`). Linux only.

| file | |
|---|---|
| `levels.py` | chooses the level |
| `box.py` | starts, watches and ends a child |
| `bubblewrap.py` | its command line |
| `inside/` | what runs in the child: gives up its rights, runs the code in one process and the tests in another |
"""

from loramoe_train.evaluation.sandbox.box import OnOutcome, Sandbox
from loramoe_train.evaluation.sandbox.levels import detect
from loramoe_train.evaluation.sandbox.types import Level, Limits, Outcome, Program

__all__ = ["Level", "Limits", "OnOutcome", "Outcome", "Program", "Sandbox", "detect"]
