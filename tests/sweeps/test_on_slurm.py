"""Sweeps on a real SLURM: requeued, timed out, cancelled, badly configured; and the numbers of runs in one process."""

import json
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli import NO_EVAL, SMALL, check_refused, lines, run_cli, same_bytes
from tests.forks import run_forked
from tests.sweeps.slurm import LONG, ask, wait_until

STEPS = 12
RUN = ("+recipe=mola", *SMALL, NO_EVAL, "data.tasks=[tiny_grammar,tiny_sentiment]", f"trainer.max_steps={STEPS}")
SIGNAL_SECONDS = 30  # before the end of a job's time
SLURM = (
    "launcher=slurm",
    "launcher.gpus_per_node=0",
    "launcher.timeout_min=10",
    f"launcher.signal_delay_s={SIGNAL_SECONDS}",
)
PLAIN, REQUEUED, TIMED_OUT, PLAIN_TOO, BAD, CANCELLED = range(6)
RATES = ("1e-3", "2e-3", "3e-3", "4e-3", "1e30", "5e-3")  # one of them is no learning rate to train with


def submitted(folder: Path) -> list[str]:
    """The newest job of each run."""
    return [run["jobs"][-1]["id"] for run in json.loads((folder / "sweep.json").read_text())["runs"]]


def trained(run_dir: Path) -> int:
    return (run_dir / "metrics.jsonl").read_text().count('"train"') if (run_dir / "metrics.jsonl").is_file() else 0


def give_little_time(cluster: dict[str, str], job: str) -> None:
    """A time limit, in whole minutes as SLURM has them, that leaves little more than the time to save."""
    clock = ask(cluster, "squeue", "--noheader", f"--jobs={job}", "--format=%M").strip().split(":")
    elapsed = sum(int(part) * 60**power for power, part in enumerate(reversed(clock)))
    minutes = -(-(elapsed + SIGNAL_SECONDS + 5) // 60)
    ask(cluster, "scontrol", "update", f"JobId={job}", f"TimeLimit={minutes}")


@pytest.mark.slow
def test_a_sweep_that_meets_everything(cluster: dict[str, str], tmp_path: Path) -> None:
    folder = tmp_path / "sweep"
    swept = f"trainer.lr={','.join(RATES)}"
    arguments = (*RUN, *SLURM, "launcher.array_parallelism=3", swept, f"run_dir={folder}")
    done = run_cli("sweep", "submit", *arguments, cwd=tmp_path, SLOW=f"{REQUEUED}:0.5 {TIMED_OUT}:10", **cluster)
    assert done.returncode == 0, done.stderr
    jobs = submitted(folder)
    assert len(set(jobs)) == len(RATES) and jobs[0].endswith("_0")  # one array
    ask(cluster, "scancel", jobs[CANCELLED])  # the sixth, which waits for its turn
    assert "holds a sweep already" in check_refused(
        run_cli("sweep", "submit", *arguments, cwd=tmp_path, **cluster), 2, f"retry-failed {folder}"
    )

    def status() -> str:
        return run_cli("sweep", "status", str(folder), cwd=tmp_path, **cluster).stdout

    wait_until(lambda: trained(folder / str(REQUEUED)) >= 3, status, timeout=150)
    ask(cluster, "scontrol", "requeue", jobs[REQUEUED])
    wait_until(lambda: trained(folder / str(TIMED_OUT)) >= 1, status, timeout=150)
    give_little_time(cluster, jobs[TIMED_OUT])
    # of its second start no step may be seen before the time is up again, on a slow machine
    timed_out = jobs[TIMED_OUT]
    wait_until(lambda: "Restarts=0" not in ask(cluster, "scontrol", "show", "job", timed_out), status, timeout=150)
    ask(cluster, "scontrol", "update", f"JobId={timed_out}", "TimeLimit=10")
    finished = (PLAIN, REQUEUED, TIMED_OUT, PLAIN_TOO)
    wait_until(lambda: all((folder / str(run) / "results.json").is_file() for run in finished), status, timeout=400)

    for run in finished:
        whole = tmp_path / "whole" / str(run)
        same = run_forked("train", *RUN, f"trainer.lr={RATES[run]}", f"run_dir={whole}", cwd=tmp_path)
        assert same.returncode == 0, same.stderr
        assert same_bytes(whole, folder / str(run)) and lines(whole, "train") == lines(folder / str(run), "train")
    for run, told in ((REQUEUED, "stopped by SIGTERM after step"), (TIMED_OUT, "this job is timed-out")):
        said = (folder / ".sweep" / jobs[run] / f"{jobs[run]}_0_log.err").read_text()
        assert told in said and "continuing step_0000" in said, said
        assert "Restarts=0" not in ask(cluster, "scontrol", "show", "job", jobs[run])
        assert "Traceback" not in said
        assert f"train 1/{STEPS} " not in said.partition("continuing")[2]  # it went on, and did not begin again
    assert "Restarts=0" in ask(cluster, "scontrol", "show", "job", jobs[PLAIN])

    wait_until(lambda: "running" not in status(), status, timeout=60)  # the one that cannot train has told so
    found = status()
    assert "6 runs: 4 done, 2 failed" in found and "its job never began" in found
    assert "lower trainer.lr" in found
    again = run_cli("sweep", "retry-failed", str(folder), "launcher.timeout_min=90", cwd=tmp_path, **cluster)
    assert again.returncode == 0 and again.stderr.count("starts again") == 2, again.stderr
    retried = submitted(folder)
    assert [new != old for new, old in zip(retried, jobs, strict=True)] == [r in (BAD, CANCELLED) for r in range(6)]
    wait_until(lambda: "5 done, 1 failed" in status(), status, timeout=150)
    table = run_cli("sweep", "table", str(folder), "format=csv", cwd=tmp_path, **cluster).stdout.splitlines()
    assert table[0].startswith("run,trainer.lr,state") and [line.split(",")[2] for line in table[1:]] == [
        "failed" if run == BAD else "done" for run in range(6)
    ]


@pytest.fixture(scope="module")
def two_undisturbed(two_nodes: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run in two processes that nobody disturbs."""
    folder = tmp_path_factory.mktemp("whole") / "sweep"
    log, _ = submit_two(two_nodes, folder, "launcher.tasks_per_node=2")
    wait_until(lambda: (folder / "0" / "results.json").is_file(), log, timeout=LONG)
    return folder / "0"


def submit_two(cluster: dict[str, str], folder: Path, placed: str, slow: str = "") -> tuple[Callable[[], str], str]:
    """A run in two processes; returns what gives its log, and its job."""
    given = (*RUN, *SLURM, placed, f"run_dir={folder}")
    done = run_forked("sweep", "submit", *given, cwd=folder.parent, SLOW=slow, ACCELERATE_USE_CPU="true", **cluster)
    assert done.returncode == 0, done.stderr
    (job,) = submitted(folder)
    log = folder / ".sweep" / job / f"{job}_0_log.err"
    return lambda: log.read_text() if log.is_file() else "no log", job


@pytest.mark.nightly
@pytest.mark.parametrize("placed", ["launcher.tasks_per_node=2", "launcher.nodes=2"])
def test_two_processes_a_job_that_is_told_to_save(
    placed: str, two_nodes: dict[str, str], two_undisturbed: Path, tmp_path: Path
) -> None:
    """Both ranks save, rank 0 queues the job again, and two processes end where two undisturbed ones do, wherever
    they are."""
    folder = tmp_path / "sweep"
    log, job = submit_two(two_nodes, folder, placed, slow="all:1")
    wait_until(lambda: trained(folder / "0") >= 3, log, timeout=LONG)
    ask(two_nodes, "scancel", f"--signal={signal.SIGUSR2.name}", job)
    wait_until(lambda: (folder / "0" / "results.json").is_file(), log, timeout=LONG)
    assert "this job is timed-out" in log() and "continuing step_0000" in log()
    other = (folder / ".sweep" / job / f"{job}_1_log.err").read_text()
    assert "Not checkpointing nor requeuing since I am a slave" in other and "Traceback" not in other + log()
    shown = ask(two_nodes, "scontrol", "show", "job", job)
    assert f"NumNodes={2 if 'nodes' in placed.split('=')[0] else 1}" in shown and "Restarts=1" in shown
    assert same_bytes(two_undisturbed, folder / "0")


@pytest.mark.nightly
def test_preempted_in_a_grace_time_and_cancelled_while_it_runs(cluster: dict[str, str], tmp_path: Path) -> None:
    """SIGTERM both times: the preempted run is queued again, the cancelled one is not, and says what it has."""
    folder = tmp_path / "sweep"
    preempted, cancelled = range(2)
    low = ("launcher=slurm", "launcher.gpus_per_node=0", "launcher.partition=low")  # an hour: no signal is a time limit
    given = (*RUN, *low, f"trainer.lr={','.join(RATES[:2])}", f"run_dir={folder}")
    done = run_forked("sweep", "submit", *given, cwd=tmp_path, SLOW="all:1", **cluster)
    assert done.returncode == 0, done.stderr
    jobs = submitted(folder)

    def status() -> str:
        return run_forked("sweep", "status", str(folder), cwd=tmp_path, **cluster).stdout

    wait_until(lambda: all(trained(folder / str(run)) >= 2 for run in range(2)), status, timeout=LONG)
    ask(cluster, "scancel", jobs[cancelled])
    ask(cluster, "sbatch", "--partition=high", "--exclusive", "--output=/dev/null", "--wrap=sleep 1")

    def restarted() -> bool:
        return "Restarts=1" in ask(cluster, "scontrol", "show", "job", jobs[preempted])

    wait_until(restarted, status, timeout=LONG)
    found = status()
    assert "1 failed" in found and "CANCELLED: stopped by SIGTERM after step" in found, found
    again = run_forked("sweep", "retry-failed", str(folder), cwd=tmp_path, **cluster)
    assert again.returncode == 0 and again.stderr.count("starts again") == 1, again.stderr
    wait_until(lambda: all((folder / str(run) / "results.json").is_file() for run in range(2)), status, timeout=LONG)
    assert submitted(folder)[preempted] == jobs[preempted] and submitted(folder)[cancelled] != jobs[cancelled]
    logs = [
        "".join(path.read_text() for path in sorted(folder.glob(f".sweep/*/{job}_0_log.err")))
        for job in (jobs[preempted], submitted(folder)[cancelled])
    ]
    assert "stopped by SIGTERM after step" in logs[preempted] and "this job is preempted" in logs[preempted]
    for run in range(2):
        assert "continuing step_0000" in logs[run] and "Traceback" not in logs[run], logs[run]
        whole = tmp_path / "whole" / str(run)
        same = run_forked("train", *RUN, f"trainer.lr={RATES[run]}", f"run_dir={whole}", cwd=tmp_path)
        assert same.returncode == 0, same.stderr
        assert same_bytes(whole, folder / str(run)) and lines(whole, "train") == lines(folder / str(run), "train")


def test_a_partition_that_is_not_there(cluster: dict[str, str], tmp_path: Path) -> None:
    given = ("seed=0,1", "launcher=slurm", "launcher.partition=tets", "run_dir=sweep")
    done = run_forked("sweep", "submit", *given, "launcher.gpus_per_node=0", cwd=tmp_path, **cluster)
    check_refused(done, 2, "nothing was submitted: ", "launcher.partition=tets; did you mean 'test'?")
    done = run_forked("train", "--multirun", *given, cwd=tmp_path, **cluster)
    check_refused(done, 2, "nothing was submitted: ", "launcher.gpus_per_node=1; 0 asks for none")
    assert not list(tmp_path.iterdir())
