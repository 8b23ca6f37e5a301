"""The process that runs the tests. Foreign code never runs in it: it only asks, and gets plain values.

What the code did to builtins, to `assert`, to frames or to the exit code is therefore without effect here: a test
passes if the values that it asked for are right.
"""

import ast
import builtins
import importlib
import os
import signal
from typing import Any

from loramoe_train.evaluation.sandbox.inside.values import MUTABLE, dumps, loads

# modules that tests use through an import of the code's; the judge takes its own
MODULES = frozenset(
    "bisect cmath collections copy datetime decimal fractions functools heapq itertools math operator random re"
    " statistics string sys typing".split()
)


class Gone(BaseException):
    """The foreign code's process has ended. No Exception, so that a test that expects errors does not expect this."""


class Full(BaseException):
    """The private folder holds too much."""


class ForeignError(Exception):
    """The code raised something that is no built-in exception."""


class Link:
    """Asks the other process, and waits for the answer."""

    def __init__(self, questions: int, answers: int) -> None:
        self.questions, self.answers = questions, os.fdopen(answers, "rb")
        self.gone = False
        self.references: dict[int, Reference] = {}

    def ask(self, operation: str, target: Any, *arguments: Any, **named: Any) -> Any:
        data = dumps([operation, target, arguments, named], _number).encode() + b"\n"
        try:
            while data:
                data = data[os.write(self.questions, data) :]
            line = self.answers.readline()
        except BrokenPipeError:
            line = b""
        if not line.endswith(b"\n"):
            self.gone = True
            raise Gone
        kind, *parts = loads(line, self._reference, _module)
        if kind == "error":
            raise _error(*parts)
        result, changed = parts
        for index, content in changed.items():
            _replace(arguments[int(index)], content)
        return result

    def _reference(self, number: int) -> "Reference":
        return self.references.setdefault(number, Reference(self, number))


class Reference:
    """Stands for an object that the foreign code's process keeps. Equal to nothing but itself; `in` goes through it."""

    _link: Link
    _number: int

    def __init__(self, link: Link, number: int) -> None:
        self.__dict__.update(_link=link, _number=number)

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return self._link.ask("call", self, *arguments, **named)

    def __getattr__(self, name: str) -> Any:
        return self._link.ask("attribute", self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._link.ask("set", self, name, value)

    def __getitem__(self, key: Any) -> Any:
        return self._link.ask("item", self, key)

    def __iter__(self) -> Any:
        return self._link.ask("iter", self)

    def __next__(self) -> Any:
        return self._link.ask("next", self)

    def __len__(self) -> int:
        return int(self._link.ask("len", self))

    def __bool__(self) -> bool:
        return bool(self._link.ask("bool", self))

    def __int__(self) -> int:
        return int(self._link.ask("int", self))

    def __float__(self) -> float:
        return float(self._link.ask("float", self))

    def __str__(self) -> str:
        return str(self._link.ask("str", self))

    def __repr__(self) -> str:
        return str(self._link.ask("repr", self))


class Names(dict[str, Any]):
    """The tests' global names. One that they do not define themselves is the code's.

    Builtins are the judge's own, or the code could redefine `abs` to please; only tests that use no name but those of
    builtins are about a function that is called like one, as MBPP's `sum(10, 15) == 6`.
    """

    def __init__(self, link: Link, tests: str) -> None:
        super().__init__(__name__="tests", __builtins__=builtins)
        self._link, self._hides_builtins = link, _used_names(tests) <= set(dir(builtins))

    def __missing__(self, name: str) -> Any:
        if hasattr(builtins, name) and not self._hides_builtins:
            return getattr(builtins, name)
        return self._link.ask("name", name)  # KeyError where there is none, as from a dict


def judge(link: Link, process: int, program: dict[str, str], cpu_seconds: int) -> dict[str, str]:
    """Verdict and message, as `types.Outcome` has them."""
    try:
        link.ask("run", program["code"])
        exec(compile(program["tests"], "<tests>", "exec"), Names(link, program["tests"]))
    except BaseException as failure:
        if not link.gone:
            return {"verdict": "failed", "message": _shown(failure)}
    if not link.gone:
        return {"verdict": "passed", "message": ""}
    _, status, used = os.wait4(process, 0)
    if not os.WIFSIGNALED(status):
        return {"verdict": "failed", "message": f"left with exit code {os.WEXITSTATUS(status)} before the tests ended"}
    number = os.WTERMSIG(status)
    if number == signal.SIGXCPU or (number == signal.SIGKILL and used.ru_utime + used.ru_stime >= cpu_seconds):
        return {"verdict": "timeout", "message": f"stopped after {cpu_seconds} s of CPU time"}
    return {"verdict": "died", "message": f"killed by signal {number} ({signal.strsignal(number)})"}


def _used_names(tests: str) -> set[str]:
    tree = list(ast.walk(ast.parse(tests)))
    names = [node for node in tree if isinstance(node, ast.Name)]
    made = {node.id for node in names if not isinstance(node.ctx, ast.Load)}
    made |= {node.arg for node in tree if isinstance(node, ast.arg)}
    made |= {node.name for node in tree if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    for node in tree:
        if isinstance(node, ast.Import | ast.ImportFrom):
            made |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
    return {node.id for node in names if isinstance(node.ctx, ast.Load)} - made


def _number(value: Any) -> int:
    if isinstance(value, Reference):
        return value._number
    raise TypeError(f"a {type(value).__name__} of the tests cannot be given to the code")


def _module(name: str) -> Any:
    if name not in MODULES:
        raise NameError(f"module {name!r} of the code is not for tests to use")
    return importlib.import_module(name)


def _error(kind: str, message: str) -> Exception:
    made = getattr(builtins, kind, None)
    if isinstance(made, type) and issubclass(made, Exception):
        try:
            return made(message)
        except TypeError:  # one that takes more, such as UnicodeDecodeError
            pass
    return ForeignError(f"{kind}: {message}")


def _shown(failure: BaseException) -> str:
    if isinstance(failure, ForeignError | Full):
        return str(failure)
    return f"{type(failure).__name__}: {failure}".removesuffix(": ")


def _replace(mutable: Any, content: Any) -> None:
    """What the code did to a list, dict or set of the tests in place."""
    assert isinstance(mutable, MUTABLE) and type(mutable) is type(content)
    if isinstance(mutable, list | bytearray):
        mutable[:] = content
    else:
        mutable.clear()
        mutable.update(content)
