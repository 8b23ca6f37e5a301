"""Model-written code is contained on every level that this machine offers, and refused where there is none."""

import json
import os
import shutil
import socket
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from loramoe_train.errors import ConfigError
from loramoe_train.evaluation import sandbox
from loramoe_train.evaluation.pass_at_k import assembler, code_scoring
from loramoe_train.evaluation.sandbox import Limits, Program, Sandbox, detect
from loramoe_train.evaluation.tasks import load_benchmark
from tests.evaluation.rows import LOCAL

QUICK = Limits(wall_seconds=6.0, cpu_seconds=1)


@pytest.fixture(params=["bubblewrap", "namespaces"])
def box(request: pytest.FixtureRequest) -> Sandbox:
    """Each of the two full levels, where it works; says why it does not."""
    made = Sandbox(request.param, QUICK)
    if request.param not in sandbox._levels(False):
        pytest.skip(f"{request.param}: needs {'bwrap' if request.param == 'bubblewrap' else 'root and unshare'}")
    complaint = sandbox._probe(made)
    if complaint is not None:
        pytest.skip(f"{request.param} does not work here: {complaint}")
    return made


def test_a_right_program_passes_and_a_wrong_one_fails(box):
    right = box.run("from typing import List\nimport math, collections, re\nassert math.sqrt(4) == 2")
    assert (right.verdict, right.message) == ("passed", "")
    wrong = box.run("assert 1 + 1 == 3, 'no'")
    assert (wrong.verdict, wrong.message) == ("failed", "AssertionError: no")
    assert box.run("def f(:").verdict == "failed"
    assert box.run("'é'.encode('utf-16'); assert len('é') == 1").verdict == "passed"


@pytest.mark.parametrize(
    "program",
    [
        "import __main__, os; os.write(__main__.settings['result'], __main__.settings['secret'].encode()); os._exit(0)",
        "raise SystemExit(0)",
        "import os; os._exit(0)",
        "import os; os.kill(os.getpid(), 9)",
        "import sys; sys.exit()",
    ],
)
def test_leaving_early_is_not_passing(box, program):
    if "kill" in program and box.level == "namespaces":
        pytest.skip("the first process of a PID namespace cannot kill itself, so this program runs to its end")
    assert box.run(program).verdict in {"failed", "died"}


def test_endless_loop_and_endless_sleep_end(box):
    short = replace(box, limits=replace(QUICK, wall_seconds=2.5))
    started = time.monotonic()
    assert short.run("while True: pass").verdict == "timeout"
    assert short.run("import time; time.sleep(60)").verdict == "timeout"
    assert time.monotonic() - started < 15


def test_threads_do_not_keep_it_alive(box):
    program = "import threading, time\nthreading.Thread(target=time.sleep, args=(60,)).start()"
    outcome = box.run(program)
    assert outcome.verdict == "passed" and outcome.seconds < 5


def test_files_outside_are_out_of_reach(box, tmp_path):
    """A marker of the user's: deleting, overwriting and replacing it all change nothing."""
    marker = tmp_path / "thesis.txt"
    marker.write_text("three years of work")
    for folder in (tmp_path, *list(tmp_path.parents)[:-1]):
        folder.chmod(folder.stat().st_mode | 0o005)  # reachable by name for everybody: isolation must do it alone
    marker.chmod(0o666)
    home = Path.home() / ".loramoe-sandbox-test"
    program = f"""
import os, shutil
for attack in (
    lambda: os.remove({str(marker)!r}),
    lambda: open({str(marker)!r}, "w").write("gone"),
    lambda: shutil.rmtree({str(tmp_path)!r}),
    lambda: os.rename({str(marker)!r}, "/tmp/x"),
    lambda: open({str(home)!r}, "w"),
    lambda: open("/usr/bin/loramoe-sandbox-test", "w"),
    lambda: open("/etc/loramoe-sandbox-test", "w"),
    lambda: os.symlink("/etc", "/usr/x"),
):
    try:
        attack()
    except OSError:
        continue
    raise AssertionError("one attack went through")
open("mine.txt", "w").write("allowed")
assert open("mine.txt").read() == "allowed"
"""
    outcome = box.run(program)
    assert (outcome.verdict, outcome.message) == ("passed", "")
    assert marker.read_text() == "three years of work"
    assert not home.exists() and not Path("/usr/bin/loramoe-sandbox-test").exists()


def test_nothing_is_left_for_the_next_program(box):
    assert box.run("open('/tmp/left', 'w').write('x')").verdict == "passed"
    assert box.run("import os; assert not os.path.exists('/tmp/left')").verdict == "passed"
    assert not Path("/tmp/left").exists()


def test_environment_and_descriptors_are_not_inherited(box, monkeypatch, tmp_path):
    monkeypatch.setenv("SECRET_TOKEN", "hf_123")
    with open(tmp_path / "open", "w") as held:
        os.set_inheritable(held.fileno(), True)
        program = f"""
import os
assert "SECRET_TOKEN" not in os.environ
paths = [f"/proc/self/fd/{{number}}" for number in os.listdir("/proc/self/fd")]
seen = [os.readlink(path) for path in paths if os.path.islink(path)]
assert seen and not any({str(tmp_path)!r} in name for name in seen), seen
"""
        assert box.run(program).verdict == "passed"


def test_the_network_is_out_of_reach(box):
    """A listener on this machine's loopback is reached from here, not from inside."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        socket.create_connection(("127.0.0.1", port), timeout=2).close()
        program = f"import socket\nsocket.create_connection(('127.0.0.1', {port}), timeout=2)"
        assert box.run(program).verdict == "failed"
        abstract = "import socket\ns = socket.socket(socket.AF_UNIX)\ns.connect('\\0loramoe-test')"
        with socket.socket(socket.AF_UNIX) as other:
            other.bind("\0loramoe-test")
            other.listen()
            assert box.run(abstract).verdict == "failed"


def test_fork_bomb_is_contained(box):
    program = "import os\nwhile True:\n    os.fork()"
    started = time.monotonic()
    assert box.run(program).verdict != "passed"
    assert time.monotonic() - started < 15
    assert box.run("assert True").verdict == "passed"


def test_processes_are_counted(box):
    program = """
import os, time
made = 0
try:
    while made < 100:
        if os.fork() == 0:
            time.sleep(2)
            os._exit(0)
        made += 1
except OSError:
    pass
assert made < 20, made
"""
    outcome = box.run(program)
    assert (outcome.verdict, outcome.message) == ("passed", "")


@pytest.mark.parametrize("program", ["x = bytearray(4 << 30)", "x = [0]\nwhile True: x += x"])
def test_memory_is_limited(box, program):
    assert box.run(program).message.startswith("MemoryError")


def test_disk_is_limited(box):
    assert "File too large" in box.run("open('big', 'w').write('x' * (2 << 20))").message
    many = "for n in range(200):\n    open(f'f{n}', 'w').write('x' * (1 << 19))"
    assert "No space left" in box.run(many).message


def test_output_flood_is_capped(box):
    outcome = box.run("import sys\nwhile True: sys.stdout.write('x' * 100000)")
    assert outcome.verdict in {"failed", "timeout"} and len(outcome.message) <= 300


def test_other_processes_are_out_of_sight(box):
    program = f"import os\nassert not os.path.exists('/proc/{os.getpid()}/environ') or os.getpid() == {os.getpid()}\n"
    program += f"try:\n    os.kill({os.getppid()}, 0)\nexcept OSError:\n    pass\nelse:\n    raise AssertionError\n"
    assert box.run(program).verdict == "passed"


def test_nobody_runs_it(box):
    assert (
        box.run(
            "import os\nassert os.getuid() == os.geteuid() == 65534\nassert os.getgroups() in ([], [65534])"
        ).verdict
        == "passed"
    )
    if os.geteuid() == 0:
        assert box.run("import os\nos.setuid(0)").verdict == "failed"


def test_programs_run_in_parallel_and_in_order(box):
    programs = [Program("import time; time.sleep(0.4)", f"assert {n} % 2 == 0, {n}") for n in range(6)]
    alive: list[int] = []
    stop = threading.Event()

    def watch() -> None:
        while not stop.wait(0.02):
            alive.append(threading.active_count())

    watcher = threading.Thread(target=watch)
    watcher.start()
    outcomes = box.run_all(programs, workers=3)
    stop.set()
    watcher.join()
    assert [outcome.verdict for outcome in outcomes] == ["passed", "failed"] * 3
    assert [outcome.message for outcome in outcomes[1::2]] == [
        "AssertionError: 1",
        "AssertionError: 3",
        "AssertionError: 5",
    ]
    assert max(alive) >= 3


def run_problems(box: Sandbox, problems: list[dict[str, Any]], bodies: list[str]) -> list[float]:
    """pass@1 of each problem through the entries that the harness gives to lm-eval."""
    benchmark = load_benchmark("humaneval")
    entries = code_scoring(box.run_all, assemble=assembler(benchmark.code, benchmark.task["doc_to_target"]))
    (step,) = entries["filter_list"][0]["filter"]
    executed = step["filter_fn"]([[body] for body in bodies], problems)
    return [entries["process_results"](doc, [found])["pass@1"] for doc, found in zip(problems, executed, strict=True)]


def test_canonical_solutions_pass_and_empty_ones_fail(box):
    problems = LOCAL["humaneval"]
    assert run_problems(box, problems, [row["canonical_solution"] for row in problems]) == [1.0, 1.0]
    assert run_problems(box, problems, ["", "    return a * b\n"]) == [0.0, 0.0]


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


def test_without_any_isolation_it_is_refused(monkeypatch):
    detect.cache_clear()
    monkeypatch.setattr(shutil, "which", lambda name: None)
    try:
        with pytest.raises(ConfigError, match="nothing on this machine can contain.*install bubblewrap") as caught:
            detect()
        assert "\n" not in str(caught.value)
    finally:
        detect.cache_clear()


def test_without_bubblewrap_and_root_it_is_refused(monkeypatch):
    detect.cache_clear()
    real = shutil.which
    monkeypatch.setattr(shutil, "which", lambda name: None if name == "bwrap" else real(name))
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    try:
        assert sandbox._levels(False) == sandbox._levels(True) == []
        with pytest.raises(ConfigError, match="install bubblewrap"):
            detect(allow_weak=True)
    finally:
        detect.cache_clear()


def test_a_level_that_does_not_hold_is_refused(monkeypatch):
    """A `bwrap` that isolates nothing must be found out by the probe."""
    detect.cache_clear()
    monkeypatch.setattr(sandbox, "_levels", lambda allow_weak: ["bubblewrap"])
    monkeypatch.setattr(sandbox, "_bubblewrap", lambda limits: [])
    monkeypatch.setattr(sandbox, "_interpreter_inside", lambda python: python)
    try:
        with pytest.raises(ConfigError, match=r"tried bubblewrap \("):
            detect()
    finally:
        detect.cache_clear()


def test_the_probe_harms_nothing_where_nothing_holds(monkeypatch, tmp_path):
    """A plain child process of the same user: found out, and no file of the user's is changed or left behind."""
    home = tmp_path / "home"
    home.mkdir()
    (home / "notes").write_text("mine")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setattr(sandbox, "_bubblewrap", lambda limits: [])
    monkeypatch.setattr(sandbox, "_interpreter_inside", lambda python: python)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)  # so that the child keeps the user that runs the tests
    before = sandbox.CHILD.read_bytes()
    assert "a file outside could be written" in str(sandbox._probe(Sandbox("bubblewrap", QUICK)))
    assert [path.name for path in home.iterdir()] == ["notes"] and (home / "notes").read_text() == "mine"
    assert sandbox.CHILD.read_bytes() == before


def test_weak_level_only_when_asked_for(monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert "user" not in sandbox._levels(False)
    if sys.platform.startswith("linux"):
        assert sandbox._levels(True)[-1] == "user"
