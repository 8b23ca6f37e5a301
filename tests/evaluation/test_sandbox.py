"""What honest programs find inside each level, and that the limits hold; which level is chosen: test_levels.py."""

import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from loramoe_train.errors import ConfigError
from loramoe_train.evaluation.pass_at_k import assembler, code_scoring
from loramoe_train.evaluation.sandbox import Limits, Outcome, Program, Sandbox, detect
from loramoe_train.evaluation.sandbox.probe import probe
from loramoe_train.evaluation.sandbox.types import LEVELS
from loramoe_train.evaluation.tasks import load_benchmark
from loramoe_train.paths import PACKAGE
from tests.evaluation.rows import LOCAL

QUICK = Limits(wall_seconds=8.0, cpu_seconds=1)


@pytest.fixture(params=LEVELS)
def sandbox(request: pytest.FixtureRequest) -> Sandbox:
    """Each level, where it works; says why it does not."""
    made = Sandbox(request.param, QUICK)
    complaint = probe(made)
    if complaint is not None:
        pytest.skip(f"{request.param} does not work here: {complaint}")
    return made


def ran(sandbox: Sandbox, code: str, tests: str = "") -> tuple[str, str]:
    outcome = sandbox.run(Program(code, tests))
    return outcome.verdict, outcome.message


def test_a_right_program_passes_and_a_wrong_one_fails(sandbox):
    assert ran(sandbox, "from typing import List\nimport math, collections, re\nassert math.sqrt(4) == 2") == (
        "passed",
        "",
    )
    assert ran(sandbox, "def f(): return 2", "assert f() == 3, 'no'") == ("failed", "AssertionError: no")
    assert ran(sandbox, "", "f()") == ("failed", "NameError: name 'f' is not defined")
    assert ran(sandbox, "def f(:")[0] == "failed"
    assert ran(sandbox, "def f(): raise ValueError('é')", "f()") == ("failed", "ValueError: é")
    assert ran(sandbox, "text = '\\ud800é'", "assert len(text) == 2") == ("passed", "")
    assert ran(sandbox, "text = '\ud800'")[0] == "failed"  # no Python source at all


VALUES = """
from collections import Counter, OrderedDict, defaultdict, namedtuple
import math
class Pair:
    def __init__(self, a, b): self.a, self.b = a, b
def same(x): return x
def total(pairs): return sum(p.a * p.b for p in pairs)
def pair(): return Pair(1, 2)
def sort(x): x.sort()
def grow(d): d['new'] = {1}
def count(n):
    yield from range(n)
def fail(kind): raise kind('wanted')
def counted(x): return Counter(x)
def point(): return namedtuple('Point', 'x y')(1, 2)
def convert(x, kind): return kind(x)
from fractions import Fraction
from decimal import Decimal
from collections import deque
import datetime
def exact(): return [Fraction(1, 2), Decimal('0.5'), deque([1], 3), datetime.date(2020, 2, 1),
                     datetime.datetime(2020, 2, 1, 3, 4, 5, 6), datetime.timedelta(1, 2, 3), datetime.time(1, 2)]
def views(): return [{'b': 1, 'a': 2}.keys(), {'a': 1}.items(), {'a': 3}.values()]
class Odd(Exception): pass
def odd(): raise Odd('one')
"""
VALUE_TESTS = """
for value in (None, True, 1, -7 ** 5000, 1.5, float('inf'), 'é\\ud800\\n', b'\\x00', 2j, [1, (2, {3})], {(1,): [None]},
              frozenset({1}), range(3), {}, set(), bytearray(b'x')):
    assert same(value) == value and type(same(value)) is type(value), value
assert same(float('nan')) != same(float('nan'))
assert total([Pair(1, 2), Pair(3, 4)]) == 14
assert pair().a == 1 and pair() != pair()
p = Pair(1, 2); p.b = Pair(5, 6); assert p.b.a == 5
data = [3, 1, 2]; sort(data); assert data == [1, 2, 3]
table = {}; grow(table); assert table == {'new': {1}}
assert list(count(3)) == [0, 1, 2] and sum(x for x in count(4)) == 6 and next(count(1)) == 0
assert counted('aab') == {'a': 2, 'b': 1} and point() == (1, 2)
assert convert('3', int) == 3 and convert('ab', list) == ['a', 'b']
assert math.isclose(same(0.1) * 3, 0.3)
for kind in (ValueError, KeyError, ZeroDivisionError):
    try:
        fail(kind)
    except kind as error:
        assert 'wanted' in str(error)
    else:
        raise AssertionError(kind)
half, same_half, queue, date, moment, span, hour = exact()
assert half == same_half == 0.5 and abs(half - 0.5) < 1e-9
import collections, datetime
assert queue == collections.deque([1]) and queue.maxlen == 3 and date == datetime.date(2020, 2, 1)
assert moment == datetime.datetime(2020, 2, 1, 3, 4, 5, 6) and span == datetime.timedelta(1, 2, 3)
assert hour == datetime.time(1, 2)
keys, items, entries = views()
assert keys == {'a', 'b'} and list(keys) == ['b', 'a'] and keys != ['b', 'a'] and items == {('a', 1)}
assert list(entries) == [3]
try:
    odd()
except Exception as error:
    assert 'Odd: one' in str(error)
def check(candidate):
    assert candidate(x=3) == 3
    assert [candidate(n) for n in range(3)] == [0, 1, 2]
check(same)
"""


def test_values_cross_between_code_and_tests():
    """The tests see what they would in one process: containers, objects, generators, errors, changes in place."""
    assert ran(detect(), VALUES, VALUE_TESTS) == ("passed", "")


def test_tests_may_be_about_a_function_that_is_called_like_a_builtin():
    hides = "def sum(a, b): return a + b + 1"
    assert ran(detect(), hides, "assert sum(10, 15) == 26") == ("passed", "")
    assert ran(detect(), hides + "\ndef f(x): return x", "assert f(sum([1, 2])) == 3") == ("passed", "")


def test_endless_loop_and_endless_sleep_end(sandbox):
    assert ran(sandbox, "while True: pass") == ("timeout", "stopped after 1 s of CPU time")
    short = replace(sandbox, limits=replace(QUICK, wall_seconds=1.5))
    started = time.monotonic()
    assert ran(short, "import time; time.sleep(60)") == ("timeout", "stopped after 1.5 s")
    assert time.monotonic() - started < 10


def test_threads_do_not_keep_it_alive(sandbox):
    outcome = sandbox.run(
        Program("import threading, time\nthreading.Thread(target=time.sleep, args=(60,)).start()", "")
    )
    assert outcome.verdict == "passed" and outcome.seconds < 6


def test_a_private_folder_can_be_used_and_is_gone_for_the_next_program(sandbox):
    write = "open('left', 'w').write('x')"
    if sandbox.level == "user":
        assert ran(sandbox, write)[0] == "failed"
        return
    assert ran(sandbox, write + "\nassert open('left').read() == 'x'") == ("passed", "")
    assert ran(sandbox, "import os; assert not os.path.exists('left')") == ("passed", "")


def test_it_ends_with_us_even_if_we_are_killed(sandbox):
    program = (
        "from loramoe_train.evaluation.sandbox import *\n"
        f"Sandbox({sandbox.level!r}, Limits(wall_seconds=60)).run(Program('import time; time.sleep(60)', ''))"
    )
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent)}
    ours = subprocess.Popen([sys.executable, "-c", program], env=environment, start_new_session=True)
    deadline = time.monotonic() + 20
    while not _below(ours.pid, depth=2) and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(0.7)  # until each of them has asked to end with its parent
    below = _below(ours.pid, depth=2) | _below(ours.pid, depth=1)
    assert len(below) >= 2
    ours.kill()
    ours.wait()
    while any(Path(f"/proc/{process}/cmdline").exists() for process in below) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(Path(f"/proc/{process}/cmdline").exists() for process in below)


def _below(process: int, depth: int) -> set[int]:
    """Children, or their children."""
    found = {process}
    for _ in range(depth):
        children = [Path(f"/proc/{one}/task").glob("*/children") for one in found]
        found = {int(number) for paths in children for path in paths for number in path.read_text().split()}
    return found


def test_what_asyncio_needs_is_there(sandbox):
    code = "import asyncio\nasync def g(): return 2\ndef f(): return asyncio.run(g())"
    assert ran(sandbox, code, "assert f() == 2") == ("passed", "")


def test_nobody_runs_it(sandbox):
    code = "import os\ndef users(): return os.getuid(), os.geteuid(), os.getgroups()"
    assert ran(sandbox, code, f"assert not {{0, {os.getuid()}}} & set(users()[:2])")[0] == (
        "passed" if os.getuid() == 0 or sandbox.level in ("bubblewrap", "namespaces") else "failed"
    )
    assert ran(sandbox, "import os\nos.setuid(0)")[0] == "failed"


def test_programs_run_in_parallel_and_in_order_and_are_told_of_as_they_end():
    programs = [Program(f"import time; time.sleep({1.2 - n / 5})", f"assert {n} % 2 == 0, {n}") for n in range(6)]
    alive: list[int] = []
    stop = threading.Event()

    def watch() -> None:
        while not stop.wait(0.02):
            alive.append(threading.active_count())

    told: list[tuple[int, Outcome]] = []
    watcher = threading.Thread(target=watch)
    watcher.start()
    outcomes = Sandbox(detect().level, QUICK, workers=6).run_all(programs, lambda *pair: told.append(pair))
    stop.set()
    watcher.join()
    assert [outcome.message for outcome in outcomes[1::2]] == [f"AssertionError: {n}" for n in (1, 3, 5)]
    assert [outcome.verdict for outcome in outcomes] == ["passed", "failed"] * 3
    assert max(alive) >= 6
    assert dict(told) == dict(enumerate(outcomes)) and told[0][0] > told[-1][0]


def test_what_hears_of_an_outcome_may_end_it_all():
    def full(index: int, outcome: Outcome) -> None:
        raise OSError("disk full")

    programs = [Program("import time; time.sleep(0.2)", "")] * 40
    started = time.monotonic()
    with pytest.raises(OSError, match="disk full"):
        Sandbox(detect().level, QUICK, workers=2).run_all(programs, full)
    assert time.monotonic() - started < 6


def run_problems(sandbox: Sandbox, problems: list[dict[str, Any]], bodies: list[str]) -> list[float]:
    """pass@1 of each problem through the entries that the harness gives to lm-eval."""
    benchmark = load_benchmark("humaneval")
    entries = code_scoring(sandbox.run_all, assemble=assembler(benchmark.code, benchmark.task["doc_to_target"]))
    (step,) = entries["filter_list"][0]["filter"]
    executed = step["filter_fn"]([[body] for body in bodies], problems)
    return [entries["process_results"](doc, [found])["pass@1"] for doc, found in zip(problems, executed, strict=True)]


def test_canonical_solutions_pass_and_empty_ones_fail(sandbox):
    problems = LOCAL["humaneval"]
    assert run_problems(sandbox, problems, [row["canonical_solution"] for row in problems]) == [1.0, 1.0]
    assert run_problems(sandbox, problems, ["", "    return a * b\n"]) == [0.0, 0.0]


@pytest.mark.real
@pytest.mark.slow
def test_all_canonical_solutions_of_humaneval_pass_and_all_empty_ones_fail(shared_dir):
    path = shared_dir / "data" / "openai_humaneval" / "test.jsonl"
    problems = [json.loads(line) for line in path.read_text().splitlines()]
    try:
        strongest = detect()
    except ConfigError as error:
        pytest.skip(str(error))
    assert len(problems) == 164
    solved = run_problems(strongest, problems, [row["canonical_solution"] for row in problems])
    assert [row["task_id"] for row, score in zip(problems, solved, strict=True) if score != 1.0] == []
    assert sum(run_problems(strongest, problems, [""] * 164)) == 0.0


# canonical solutions of MBPP that need more CPU time than the default 5 s
SLOW_SOLUTIONS = {123}


@pytest.mark.real
@pytest.mark.nightly
@pytest.mark.parametrize("level", LEVELS)
def test_canonical_solutions_pass_on_every_level(level, shared_dir):
    made = Sandbox(level)
    complaint = probe(made)
    if complaint is not None:
        pytest.skip(f"{level} does not work here: {complaint}")
    names, programs = [], []
    for line in (shared_dir / "data" / "openai_humaneval" / "test.jsonl").read_text().splitlines():
        row = json.loads(line)
        names.append(row["task_id"])
        programs.append(
            Program(row["prompt"] + row["canonical_solution"], f"{row['test']}\ncheck({row['entry_point']})")
        )
    for split in ("train", "validation", "test", "prompt"):
        for line in (shared_dir / "data" / "mbpp" / f"{split}.jsonl").read_text().splitlines():
            row = json.loads(line)
            names.append(row["task_id"])
            programs.append(Program(row["code"], "\n".join([row["test_setup_code"], *row["test_list"]])))
    assert len(programs) == 164 + 974
    outcomes = dict(zip(names, made.run_all(programs), strict=True))
    failed = {name: outcome for name, outcome in outcomes.items() if outcome.verdict != "passed"}
    assert failed.keys() <= SLOW_SOLUTIONS, failed
