"""SLURM: a sweep as one job array through submitit, and what the queue says about its jobs."""

import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from loramoe_train.errors import ConfigError, LoramoeError, nearest, printable
from loramoe_train.schema.launcher import LauncherConfig
from loramoe_train.sweeps.job import SweepJob
from loramoe_train.sweeps.sweep import INNER, Job, Sweep

# What submitit's AutoExecutor takes as it is; all else it wants by the name of the cluster's kind
SHARED = ("timeout_min", "mem_gb", "nodes", "cpus_per_task", "gpus_per_node", "tasks_per_node")
# Options of sbatch that Hydra's launcher has a key for and we have none
ONLY_HYDRAS = ("comment", "cpus_per_gpu", "gpus_per_task", "mem_per_gpu", "mem_per_cpu")
ASK_SECONDS = 60
WAITING = ("PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT", "RESV_DEL_HOLD")
RUNNING = ("RUNNING", "CONFIGURING", "COMPLETING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT", "RESIZING")


def check_slurm() -> None:
    """Raise ConfigError where no job can be submitted from this machine."""
    for program in ("sbatch", "srun", "squeue"):
        if shutil.which(program) is None:
            raise ConfigError(
                f"launcher=slurm: there is no {program} on this machine; give the command on a login node of the"
                " cluster, or use launcher=local"
            )


def merged(launcher: LauncherConfig, hydras: Mapping[str, Any]) -> LauncherConfig:
    """Our keys, with those of hydra.launcher over them: by default the same, for slurm.yaml sets those from ours.

    What only Hydra's launcher has a key for is an option of sbatch.
    """
    given = {key: value for key, value in hydras.items() if value is not None}
    own = {key: value for key, value in given.items() if key in LauncherConfig.model_fields and key != "name"}
    options = {key: given[key] for key in ONLY_HYDRAS if key in given}
    setup = [*launcher.setup, *own.pop("setup", ())]
    options |= {**launcher.additional_parameters, **own.pop("additional_parameters", {})}
    if own.get("tasks_per_node") == 1:  # Hydra's default
        del own["tasks_per_node"]
    try:
        return LauncherConfig(**{**launcher.model_dump(), **own, "setup": setup, "additional_parameters": options})
    except ValidationError as error:
        first = error.errors()[0]
        raise ConfigError(f"hydra.launcher.{'.'.join(map(str, first['loc']))}: {first['msg']}") from error


def parameters(launcher: LauncherConfig) -> dict[str, Any]:
    """What submitit is given."""
    values = launcher.model_dump(exclude={"name", "max_num_timeout"}, exclude_none=True)
    values["tasks_per_node"] = launcher.processes
    if not launcher.gpus_per_node:
        values.pop("gpus_per_node", None)
    if "cpus_per_task" in values:
        # since 22.05 srun does not inherit it from sbatch
        values["setup"].append("export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK")
    values["additional_parameters"] = {"requeue": True, **values["additional_parameters"]}
    return {key if key in SHARED else f"slurm_{key}": value for key, value in values.items()}


def submit(sweep: Sweep, numbers: Sequence[int]) -> dict[int, Job]:
    """Submit runs as one array, which needs nobody to wait for it. Raises ConfigError with SLURM's own reason."""
    check_slurm()
    try:
        import submitit
    except ImportError as error:
        raise ConfigError("launcher=slurm needs submitit; install loramoe-train[slurm]") from error
    from submitit.core.utils import FailedSubmissionError, UncompletedJobError
    from submitit.helpers import clean_env, environment_variables

    launcher, root = LauncherConfig(**sweep.parameters), sweep.root.absolute()
    if "%" in str(root) or not str(root).isprintable():
        raise ConfigError(f"run_dir={root}: SLURM reads % in the name of a log as a job's number; give another folder")
    name, most = re.sub(r"[^\w.-]", "_", f"loramoe-{root.name}"), launcher.max_num_timeout
    try:
        executor = submitit.AutoExecutor(folder=root / INNER / "%j", cluster="slurm", slurm_max_num_timeout=most)
        executor.update_parameters(name=name, **parameters(launcher))
        kept = {k: v for k, v in os.environ.items() if k == "SLURM_CONF" or k.startswith("SBATCH_")}  # the user's own
        with clean_env(), environment_variables(**kept):  # without those of a job that this command may run in itself
            jobs = executor.map_array(SweepJob(), [str(root)] * len(numbers), list(numbers))
    except (UncompletedJobError, FailedSubmissionError, subprocess.SubprocessError, OSError) as error:
        raise ConfigError(f"launcher=slurm: nothing was submitted: {_reason(error)}{_hint(error, launcher)}") from error
    except (NameError, ValueError, AssertionError) as error:  # as submitit refuses a parameter
        raise ConfigError(f"hydra.launcher: {str(error).splitlines()[0]}") from error
    ids = [str(job.job_id) for job in jobs]
    return {n: Job(i, f"{INNER}/{i}/{i}_0_log.err") for n, i in zip(numbers, ids, strict=True)}


def cancel(jobs: Iterable[Job]) -> None:
    """Ask SLURM to forget jobs; what it says does not matter any more."""
    _ask("scancel", *sorted({job.id.partition("_")[0] for job in jobs}), failing="")


def _reason(error: BaseException) -> str:
    """sbatch's own words, which stand in the middle of what submitit says."""
    lines = re.findall(r"sbatch: error: (.+)", str(error))
    return printable("; ".join(dict.fromkeys(lines)) or (str(error).strip() or type(error).__name__).splitlines()[-1])


def _hint(error: BaseException, launcher: LauncherConfig) -> str:
    if "gres" in str(error) and launcher.gpus_per_node:
        return f" (launcher.gpus_per_node={launcher.gpus_per_node}; 0 asks for none)"
    if "partition" not in str(error) or launcher.partition is None:
        return ""
    known = {name.rstrip("*") for name in _ask("sinfo", "--noheader", "--format=%P", failing="").split()}
    return f" (launcher.partition={launcher.partition}{nearest(launcher.partition, known)})"


def queue(ids: Iterable[str]) -> dict[str, str]:
    """Job id -> state, of those that SLURM still knows. Raises LoramoeError when SLURM cannot be asked."""
    wanted = set(ids)
    states: dict[str, str] = {}
    masters = sorted({job.partition("_")[0] for job in wanted}, key=int)
    if not masters:
        return {}
    if shutil.which("squeue") is None:
        raise LoramoeError("this machine has no squeue, so it cannot be told which jobs still run; ask on the cluster")
    # squeue calls a single job that it has forgotten an error, and one of several not
    lines = _ask("squeue", "--noheader", "--states=all", "--array", "--format=%i|%T", f"--jobs={','.join(masters)}")
    for line in lines.splitlines():
        job, _, state = line.strip().partition("|")
        states[job] = state
    missing = wanted - states.keys()
    if missing and shutil.which("sacct"):
        jobs = ",".join(sorted({job.partition("_")[0] for job in missing}))
        for line in _ask("sacct", "-n", "-P", "-X", f"--jobs={jobs}", "--format=JobID,State", failing="").splitlines():
            job, _, state = line.partition("|")
            if job in missing and state:
                states[job] = state.split()[0]
    return {job: state for job, state in states.items() if job in wanted}


def _ask(*command: str, failing: str | None = None) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=ASK_SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise LoramoeError(f"{command[0]} does not answer ({error})") from error
    if done.returncode and "Invalid job id" not in done.stderr:
        if failing is not None:
            return failing
        raise LoramoeError(f"{command[0]} failed: {(done.stderr.strip() or 'no reason').splitlines()[-1]}")
    return done.stdout
