"""The folder of a sweep: what is refused before anything is written, and what stands in it afterwards."""

import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from loramoe_train.errors import ConfigError, LoramoeError, SweepFailed
from loramoe_train.paths import CONFIGS
from loramoe_train.rundir import claim
from loramoe_train.schema.launcher import LauncherConfig
from loramoe_train.sweeps.pool import run_pool
from loramoe_train.sweeps.status import DONE, FAILED, RUNNING, last_error, last_step, look
from loramoe_train.sweeps.sweep import Job, checked, create, discard, read_sweep
from loramoe_train.validation import validate
from tests.cli import NO_EVAL, SMALL, check_refused, losses, run_cli, same_bytes
from tests.composing import composed
from tests.forks import ROOT, Forked, run_forked
from tests.forks import command as in_command
from tests.sweeps.made import combination, finished, results, seeds

RUN = {"number": 0, "folder": "0", "overrides": [], "recipe": None, "jobs": []}
LOCAL = LauncherConfig().model_dump()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ([{"seed": 0}, {"seed": 0}], "run 1 (b) is the same as run 0 (a)"),
        ([{"subfolder": "x"}, {"subfolder": "x", "seed": 1}], "run 0 (a) and run 1 (b) would share the folder x"),
        ([{"subfolder": "x"}, {"subfolder": "x/y", "seed": 1}], "would share the folder x"),
        ([{"subfolder": "x/y"}, {"subfolder": "x", "seed": 1}], "run 0 would write into x, the folder of run 1"),
        ([{"subfolder": "../x"}, {"seed": 1}], "hydra.sweep.subdir=../x must be a folder below"),
        ([{"subfolder": ".sweep"}, {"seed": 1}], "hydra.sweep.subdir=.sweep must be a folder below"),
        ([{"run_dir": "a"}, {"run_dir": "b"}], "run_dir cannot be swept"),
        ([{"launcher": LauncherConfig(mem_gb=4)}, {"seed": 1}], "launcher and its keys cannot be swept"),
        ([{"resume": "a/checkpoint"}] * 2, "resume=a/checkpoint: a run of a sweep goes on in its own folder"),
    ],
)
def test_runs_that_do_not_go_together(changes: list[dict], words: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    runs = [combination(text, **{"subfolder": text, **change}) for text, change in zip("ab", changes, strict=True)]
    with pytest.raises(ConfigError) as refused:
        checked(runs, LOCAL)
    assert words in str(refused.value) and "\n" not in str(refused.value)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_holds_something(tmp_path: Path) -> None:
    runs = seeds(tmp_path / "sweep")
    create(*checked(runs, LOCAL))
    before = (tmp_path / "sweep" / "sweep.json").read_bytes()
    with pytest.raises(ConfigError, match="holds a sweep already; loramoe-sweep retry-failed"):
        checked(runs, LOCAL)
    assert (tmp_path / "sweep" / "sweep.json").read_bytes() == before
    other = tmp_path / "other"
    claim(other / "1", runs[1].config.model_copy(update={"run_dir": str(other / "1")}))
    with pytest.raises(ConfigError, match=r"run 1 \(seed=1\): run_dir=.*/other/1 holds another run"):
        checked(seeds(other), LOCAL)
    assert [path.name for path in other.iterdir()] == ["1"]


def test_two_that_are_started_at_once(tmp_path: Path) -> None:
    """Both have looked before either wrote: one makes the folder, the other is refused and leaves it alone."""
    one, two = (checked(seeds(tmp_path / "sweep"), LOCAL) for _ in range(2))
    create(*one)
    with pytest.raises(ConfigError, match="holds a sweep already"):
        create(*two)
    assert len(read_sweep(tmp_path / "sweep").runs) == 2


def test_what_is_written_is_what_is_read(tmp_path: Path) -> None:
    root = tmp_path / "deep" / "sweep"
    sweep, configs = checked(seeds(root), LOCAL)
    made = create(sweep, configs)
    again = read_sweep(root)
    assert again == sweep and again.varying() == ("seed",) and again.label(again.runs[1]) == "run 1 (seed=1)"
    config = again.config(again.runs[1])
    assert (config.seed, config.resume, config.run_dir) == (1, "auto", str(root / "1"))
    root.rename(tmp_path / "moved")  # runs go on where the sweep is now
    moved = read_sweep(tmp_path / "moved")
    assert moved.config(moved.runs[1]).run_dir == str(tmp_path / "moved" / "1")
    (tmp_path / "moved").rename(root)
    discard(sweep, made)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"runs": []}, "not numbered from 0"),
        ({"schema": 9}, "has schema 9; this version reads 1"),
        ({"runs": [{**RUN, "folder": "../../x"}]}, "leads out of"),
        ({"runs": [{"number": 0}]}, "it has no 'folder'"),
        ({"runs": [{**RUN, "jobs": [{"id": "--help", "log": "x"}]}]}, "--help is no job"),
        ({"parameters": {"partition": "a\nb"}}, "partition"),
        (None, "is not JSON"),
    ],
)
def test_a_damaged_record(change: dict | None, words: str, tmp_path: Path) -> None:
    finished(tmp_path, [("seed=0",)], [None])
    path = tmp_path / "sweep.json"
    path.write_text("{" if change is None else json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(LoramoeError, match=words):
        read_sweep(tmp_path)


LOG = """submitit INFO (2026-11-25 21:28:31,289) - Starting
WARNING submitit: Bypassing signal SIGCONT
loramoe: init_from=nowhere does not exist
srun: error: node: task 0: Exited with exit code 3
"""


@pytest.mark.parametrize(
    ("log", "line"),
    [
        (LOG, "init_from=nowhere does not exist"),
        (
            "loramoe: stopped by SIGTERM\nslurmstepd: error: Detected 1 oom_kill event\n",
            "slurmstepd: error: Detected 1",
        ),
        ('  File "x.py"\nValueError: no\n\n', "ValueError: no"),
        ("step 1\nsomething odd\n", "something odd"),
        ("loramoe: a\x1b[31m red line\n", r"a\x1b[31m red line"),  # no command for the terminal
        ("", ""),
    ],
)
def test_the_last_line_that_says_why(log: str, line: str, tmp_path: Path) -> None:
    (tmp_path / "log").write_text(log)
    assert last_error(tmp_path / "log").startswith(line) and bool(line) == bool(last_error(tmp_path / "log"))
    assert last_error(tmp_path / "none") == ""


def test_a_run_whose_folder_is_in_use(tmp_path: Path) -> None:
    sweep = finished(tmp_path, [("seed=0",)], [None])
    (tmp_path / "0").mkdir()
    log = '{"kind": "train", "step": 7}\n{"kind": "train", "st'
    (tmp_path / "0" / "metrics.jsonl").write_text(log)
    holds = (
        "import sys, pathlib; from loramoe_train.run_lock import alone_in\n"
        "with alone_in(pathlib.Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", holds, str(tmp_path / "0")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        (running,) = look(sweep)
        other.stdin.close()
    assert (running.state, running.step) == (RUNNING, 7) and last_step(tmp_path / "0") == 7
    assert look(sweep)[0].state == FAILED


# -- the launcher's keys -----------------------------------------------------------------------------------------------


def test_every_key_reaches_hydras_launcher() -> None:
    """By the YAML, or where lists and a computed number cannot go through it, by sweeps/slurm.py."""
    given = yaml.safe_load((CONFIGS / "launcher" / "slurm.yaml").read_text())
    mapped = {key: f"${{launcher.{key}}}" for key in given["hydra"]["launcher"]}
    assert given["hydra"]["launcher"] == mapped
    in_code = {"tasks_per_node", "setup", "additional_parameters"}
    assert mapped.keys() | in_code == LauncherConfig.model_fields.keys() - {"name"} and not mapped.keys() & in_code


@pytest.mark.parametrize(
    "values",
    [
        {"partition": "a\ncurl"},
        {"account": "a b"},
        {"partition": "$(id)"},
        {"setup": ["a\nb"]},
        {"additional_parameters": {"x\ny": 1}},
        {"additional_parameters": {"comment": "a\nb"}},
        {"partiton": "gpu"},
        {"timeout_min": 0},
    ],
)
def test_what_could_end_a_line_of_the_script_is_refused(values: dict) -> None:
    plain = composed("+recipe=mola").plain()
    with pytest.raises(ConfigError, match="launcher"):
        validate({**plain, "launcher": {**plain["launcher"], **values}})


def test_one_process_for_each_gpu() -> None:
    for gpus, tasks, processes in ((None, None, 1), (0, None, 1), (4, None, 4), (4, 2, 2)):
        assert LauncherConfig(gpus_per_node=gpus, tasks_per_node=tasks).processes == processes


# -- the command -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["sead=0,1"], ["unknown key or group 'sead'; did you mean 'seed'?"]),
        (["experts.layout=2468,zz"], ["run 1 (", "experts.layout=zz", "is no layout"]),
        (["seed=0,0"], ["is the same as run 0"]),
        (["seed=0,1", "hydra.sweep.subdir=x"], ["would share the folder x"]),
        (["launcher.gpus_per_node=3"], ["launcher.gpus_per_node=3, but this machine has 0"]),
        (["seed=range(0,0)"], ["seed=range(0,0)", "the sweep has no runs"]),
        (["launcher.nodes=2"], ["launcher.nodes=2 needs launcher=slurm"]),
    ],
)
def test_a_sweep_that_cannot_start_leaves_nothing(arguments: list[str], words: list[str], tmp_path: Path) -> None:
    done = run_forked(
        "train", "--multirun", *arguments, "run_dir=sweep", cwd=tmp_path, CUDA_VISIBLE_DEVICES="", WORLD_SIZE="1"
    )
    check_refused(done, 2, *words)
    assert not list(tmp_path.iterdir())


def test_slurm_for_one_run(tmp_path: Path) -> None:
    """It would run here, on the login node."""
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    done = run_forked("train", "launcher=slurm", "run_dir=run", cwd=tmp_path)
    check_refused(done, 2, "launcher=slurm starts the runs of a sweep; add --multirun")
    assert not list(tmp_path.iterdir())


def test_no_sweep_from_several_processes(tmp_path: Path) -> None:
    done = run_forked("train", "--multirun", "seed=0,1", cwd=tmp_path, WORLD_SIZE="2")
    check_refused(done, 2, "--multirun under a launcher of several processes", "launcher.tasks_per_node")


def test_a_machine_without_slurm(tmp_path: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    for name in ("train", "sweep"):
        first = "--multirun" if name == "train" else "submit"
        done = run_forked(name, first, "launcher=slurm", "seed=0,1", "run_dir=sweep", cwd=tmp_path, PATH=str(tmp_path))
        check_refused(done, 2, "launcher=slurm: there is no sbatch on this machine", "launcher=local")
    assert not list(tmp_path.iterdir())


def test_runs_of_this_machine_that_fail(tmp_path: Path) -> None:
    """Each in a process of its own; why is told, and again after another try, in the background."""
    done = run_forked("train", "--multirun", "init_from=nowhere", "seed=0,1", "run_dir=sweep", cwd=tmp_path)
    why = "init_from=nowhere does not exist"
    check_refused(done, 6, "2 of 2 runs failed, first run 0 (seed=0)", why, "loramoe-sweep retry-failed sweep")
    assert not (tmp_path / "sweep" / "0").exists()
    again = run_forked("sweep", "retry-failed", "sweep", cwd=tmp_path)
    assert again.returncode == 0 and "2 runs in the background" in again.stderr
    sweep = read_sweep(tmp_path / "sweep")
    assert [[job.id for job in run.jobs] for run in sweep.runs] == [["local-1", "local-2"]] * 2
    told = run_forked("sweep", "status", "sweep", cwd=tmp_path)
    while "running" in told.stdout or "waiting" in told.stdout:
        told = run_forked("sweep", "status", "sweep", cwd=tmp_path)
    assert "2 runs: 2 failed" in told.stdout and told.stdout.count(why) == 2


def test_lines_of_a_job_are_typed_or_refused(tmp_path: Path) -> None:
    """By a config file of somebody else, and by a sweep of somebody else that is started again."""
    (tmp_path / "mine" / "launcher").mkdir(parents=True)
    (tmp_path / "mine" / "launcher" / "theirs.yaml").write_text("name: local\nsetup: [touch marker]\n")
    given = ("--multirun", "--config-dir", "mine", "launcher=theirs", "seed=0,1", "run_dir=sweep")
    # the last key is refused as well, but later: whoever lets the file pass shall not train
    done = run_forked("train", *given, "trainer.lr=-1", cwd=tmp_path)
    check_refused(done, 2, "launcher.setup may only be set on the command line", "launcher.setup=[touch marker]")
    sweep, configs = checked(seeds(tmp_path / "theirs"), {**LOCAL, "setup": ["touch marker"]})
    create(sweep, configs)
    done = run_forked("sweep", "retry-failed", "theirs", cwd=tmp_path)
    check_refused(done, 2, "launcher.setup may only be set on the command line")
    assert {path.name for path in tmp_path.iterdir()} == {"mine", "theirs"}


def test_a_run_that_ends_while_it_is_looked_at_has_not_failed(tmp_path: Path, monkeypatch) -> None:
    sweep = finished(tmp_path / "sweep", [("seed=0",)], [None])

    def ends(folder: Path) -> bool:
        if folder == sweep.folder(sweep.runs[0]):
            folder.mkdir()
            (folder / "results.json").write_text(json.dumps(results({"gsm8k": 0.5})))
        return False

    monkeypatch.setattr("loramoe_train.sweeps.status.is_locked", ends)
    (status,) = look(sweep)
    assert status.state == DONE and status.results["scores"]["gsm8k"]["tuned"] == 0.5


def test_a_finished_run_is_left_alone(tmp_path: Path) -> None:
    """A job that is queued again after its results were written has nothing to do."""
    from loramoe_train.sweeps.job import run_one
    from tests.cli import command_in_this_process

    sweep, configs = checked(seeds(tmp_path / "sweep"), LOCAL)
    create(sweep, configs)
    (tmp_path / "sweep" / "1").mkdir()
    path = tmp_path / "sweep" / "1" / "results.json"
    path.write_text(json.dumps(results({"gsm8k": 0.5})))
    before = path.read_bytes()
    with command_in_this_process():
        run_one(tmp_path / "sweep", 1)
    assert path.read_bytes() == before and len(list(path.parent.iterdir())) == 1


def test_a_pool_that_cannot_start_a_run_says_why(tmp_path: Path) -> None:
    sweep, configs = checked(seeds(tmp_path / "sweep"), LOCAL)
    create(sweep, configs)
    sweep = replace(
        sweep, runs=tuple(replace(run, jobs=(Job("local-1", ".sweep/local-1/0.log"),)) for run in sweep.runs)
    )
    (tmp_path / "sweep" / ".sweep" / "local-1").write_text("a file where logs should be")
    with pytest.raises(SweepFailed, match="cannot be started .*local-1: File exists.*retry-failed .*sweep goes on"):
        run_pool(sweep, [0, 1])


@pytest.mark.nightly
def test_a_pool_that_is_told_to_stop(tmp_path: Path) -> None:
    """Its runs save; started again, in the background, they end where a run that nobody touched does."""
    run = ("+recipe=mola", *SMALL, NO_EVAL, "data.tasks=[tiny_grammar,tiny_sentiment]", "trainer.max_steps=60")
    given = ("train", ("--multirun", *run, "seed=0,1", "launcher.array_parallelism=2", "run_dir=sweep"))
    logs = [tmp_path / "sweep" / number / "metrics.jsonl" for number in "01"]
    with Forked(tmp_path / "said", in_command, *given, cwd=tmp_path, OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT)) as pool:
        pool.wait_until(lambda: all(log.is_file() and '"train"' in log.read_text() for log in logs))
        pool.send(signal.SIGTERM)
        assert pool.wait() == 75 and "stopped by SIGTERM; loramoe-sweep retry-failed sweep goes on" in pool.stderr
    assert all(each.why.startswith("stopped by SIGTERM after step") for each in look(read_sweep(tmp_path / "sweep")))
    again = run_cli("sweep", "retry-failed", "sweep", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    deadline = time.monotonic() + 300
    while any(each.state != DONE for each in look(read_sweep(tmp_path / "sweep"))):
        assert time.monotonic() < deadline
        time.sleep(0.5)
    for seed in (0, 1):
        whole = run_forked("train", *run, f"seed={seed}", f"run_dir=whole/{seed}", cwd=tmp_path)
        assert whole.returncode == 0 and same_bytes(tmp_path / "whole" / str(seed), tmp_path / "sweep" / str(seed))


@pytest.mark.nightly
def test_two_processes_for_each_run(tmp_path: Path) -> None:
    run = ("+recipe=mola", *SMALL, NO_EVAL, "data.tasks=[tiny_grammar,tiny_sentiment]", "trainer.max_steps=2")
    more = ("launcher.tasks_per_node=2", "run_dir=sweep")
    done = run_cli("train", "--multirun", *run, "seed=0", *more, cwd=tmp_path, ACCELERATE_USE_CPU="true")
    assert done.returncode == 0, done.stderr
    one = run_forked("train", *run, "seed=0", "run_dir=one", cwd=tmp_path)
    assert one.returncode == 0, one.stderr
    ours, theirs = losses(tmp_path / "sweep" / "0"), losses(tmp_path / "one")
    assert len(ours) == 2 and ours == pytest.approx(theirs, rel=1e-4)  # float32 sums in another order
    assert not same_bytes(tmp_path / "sweep" / "0", tmp_path / "one")
