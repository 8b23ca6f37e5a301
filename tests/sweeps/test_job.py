"""What a job of a sweep makes of submitit: its handler is called and not replaced, and its refusal is one line."""

import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from loramoe_train.errors import SavedOnSignal
from loramoe_train.guard import guard
from loramoe_train.schema.launcher import LauncherConfig
from loramoe_train.sweeps import job as sweep_job
from loramoe_train.sweeps import slurm
from loramoe_train.sweeps.job import SweepJob, _in_our_words
from loramoe_train.training.signals import StopSignals
from tests.cli import command_in_this_process
from tests.sweeps.made import finished

submitit = pytest.importorskip("submitit")


@pytest.fixture
def handler() -> Iterator[list[int]]:
    """Submitit's handler, which here notes that it was called."""
    called: list[int] = []
    with command_in_this_process():
        signal.signal(signal.SIGUSR2, lambda number, frame: called.append(number))
        yield called


def test_their_handler_is_called_after_ours(handler: list[int]) -> None:
    told = _in_our_words()
    with StopSignals() as signals:
        signal.raise_signal(signal.SIGUSR2)
        assert not handler and not told  # nothing is safe on the disk yet
        signals.chain()
    assert handler == told == [signal.SIGUSR2]
    signal.raise_signal(signal.SIGUSR2)  # outside the training loop, at once
    assert len(handler) == 2


def test_a_job_that_is_not_queued_again_says_so_in_one_line(handler: list[int]) -> None:
    def refuse(number: int, frame: object) -> None:
        raise submitit.core.utils.UncompletedJobError("Job not requeued because: timed-out too many times.")

    signal.signal(signal.SIGUSR2, refuse)
    _in_our_words()
    with pytest.raises(SavedOnSignal, match="stopped by SIGUSR2 and not queued again: timed-out too many times; give"):
        signal.raise_signal(signal.SIGUSR2)


@pytest.mark.parametrize(
    ("state", "preempted_at", "again"),
    [
        ("RUNNING", "2026-11-26T00:03:21", True),
        ("RUNNING", "None", False),  # a signal from somebody else
        ("CANCELLED", "2026-11-26T00:03:21", False),
        ("PENDING", "2026-11-26T00:03:21", False),  # SLURM has queued it already
    ],
)
def test_a_run_that_saved_in_its_grace_time_is_queued_again(
    state: str, preempted_at: str, again: bool, handler: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = f"JobId=7 JobState={state} Reason=None PreemptEligibleTime=2026-11-26T00:03:17 PreemptTime={preempted_at}"
    (tmp_path / "scontrol").write_text(f"#!/bin/sh\n[ \"$*\" = '-o show job 7_2' ] && echo '{said}'\n")
    (tmp_path / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    for name, value in (("SUBMITIT_EXECUTOR", "slurm"), ("SLURM_ARRAY_JOB_ID", "7"), ("SLURM_ARRAY_TASK_ID", "2")):
        monkeypatch.setenv(name, value)
    for name in ("SLURM_NTASKS", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)

    def train(root: Path, number: int) -> None:
        def stopped() -> None:
            raise SavedOnSignal("stopped by SIGTERM after step 3")

        guard(stopped)

    monkeypatch.setattr(sweep_job, "run_one", train)
    with pytest.raises(SystemExit) as left:
        SweepJob()(str(tmp_path), 2)
    assert left.value.code == SavedOnSignal.exit_code
    assert handler == ([signal.SIGUSR2] if again else [])


def test_a_queue_that_does_not_take_it_is_one_line(handler: list[int]) -> None:
    def fail(number: int, frame: object) -> None:
        raise subprocess.CalledProcessError(1, ["scontrol", "requeue", "7"])

    signal.signal(signal.SIGUSR2, fail)
    _in_our_words()
    with pytest.raises(SavedOnSignal, match="could not be queued again .*scontrol.*retry-failed goes on"):
        signal.raise_signal(signal.SIGUSR2)


def test_what_is_queued_again_is_the_same(tmp_path: Path) -> None:
    job = SweepJob()
    again = job.checkpoint(str(tmp_path), 3)
    again.dump(tmp_path / "job.pkl")
    read = submitit.core.utils.DelayedSubmission.load(tmp_path / "job.pkl")
    assert isinstance(read.function, SweepJob) and read.args == (str(tmp_path), 3)


def test_a_run_that_never_comes_to_a_step_is_not_queued_again_for_ever(tmp_path: Path) -> None:
    sweep = finished(tmp_path / "sweep", [("seed=0",)], [None])
    folder = sweep.folder(sweep.runs[0])
    (folder / "samples").mkdir(parents=True)

    def start(job: SweepJob, does: Callable[[], object] = lambda: None) -> SweepJob:
        """It trains, is told to leave, and is stored for the next start."""
        job.began_at = sweep_job._progress(str(sweep.root), 0)
        does()
        job.checkpoint(str(sweep.root), 0).dump(tmp_path / "job.pkl")
        return submitit.core.utils.DelayedSubmission.load(tmp_path / "job.pkl").function

    def a_step() -> None:
        with (folder / "metrics.jsonl").open("a") as log:
            log.write('{"kind": "train", "step": 7}\n')

    job = start(start(SweepJob()))
    job = start(start(start(job, a_step)))  # counted from the last that did something
    job = start(start(start(job, (folder / "samples" / "cola.tuned.json").touch)))
    assert job.idle == sweep_job.IDLE_STARTS - 1
    with pytest.raises(SavedOnSignal, match="not queued again: 3 starts in a row ended before a step was done or"):
        start(job)


def test_keys_become_lines_of_the_script(tmp_path: Path) -> None:
    launcher = LauncherConfig(
        name="slurm",
        partition="gpu",
        account="me",
        timeout_min=90,
        nodes=2,
        gpus_per_node=4,
        cpus_per_task=8,
        mem_gb=64,
        array_parallelism=3,
        signal_delay_s=200,
        setup=["module load cuda"],
        additional_parameters={"mail-type": "END"},
    )
    executor = submitit.SlurmExecutor.__new__(submitit.SlurmExecutor)  # its own check wants srun on this machine
    submitit.core.core.PicklingExecutor.__init__(executor, tmp_path)
    executor.python = "python"
    auto = submitit.AutoExecutor.__new__(submitit.AutoExecutor)
    auto._executor, auto.cluster, auto._deprecated_args = executor, "slurm", {}
    auto._internal_update_parameters(name="loramoe-x", **slurm.parameters(launcher))
    lines = executor._make_submission_file_text("run", "uid").splitlines()
    wanted = ["partition=gpu", "account=me", "time=90", "nodes=2", "gpus-per-node=4", "ntasks-per-node=4"]
    wanted += ["cpus-per-task=8", "mem=64GB", "signal=USR2@200", "mail-type=END", "requeue", "open-mode=append"]
    assert [option for option in wanted if f"#SBATCH --{option}" not in lines] == []
    assert lines.index("module load cuda") < lines.index("export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK")
    assert lines.index("module load cuda") < next(n for n, line in enumerate(lines) if line.startswith("srun "))
    assert executor.parameters["array_parallelism"] == 3


def test_what_only_hydras_launcher_knows_is_an_option_of_sbatch() -> None:
    ours = LauncherConfig(name="slurm", partition="gpu", setup=["a"])
    hydras = {"partition": "other", "comment": "mine", "tasks_per_node": 1, "name": "loramoe", "setup": ["b"]}
    found = slurm.merged(ours, hydras)
    assert (found.partition, found.setup, found.additional_parameters) == ("other", ["a", "b"], {"comment": "mine"})
    assert found.tasks_per_node is None and found.name == "slurm"
