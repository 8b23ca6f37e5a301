"""The folder of a sweep, which anybody can read later: what runs there are, what started them, where each one writes.

    ROOT/sweep.json            the runs: number, folder, overrides, jobs so far
    ROOT/.sweep/configs/N.yaml the config of run N, as it was when the sweep was started
    ROOT/.sweep/JOB/           logs of a job, and what submitit needs
    ROOT/N/                    the folder of run N

Jobs read their config here and compose nothing: what changes in config files meanwhile changes no run.
"""

import fcntl
import os
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from loramoe_train.errors import ConfigError, DataError, MissingFileError
from loramoe_train.files import read_json, write_bytes, write_errors, write_json
from loramoe_train.run_lock import LOCK, alone_in
from loramoe_train.rundir import check_claim, flatten, read_resolved
from loramoe_train.schema.launcher import LauncherConfig
from loramoe_train.schema.run import RunConfig
from loramoe_train.settle import settle
from loramoe_train.validation import validate

SWEEP, INNER, CONFIGS = "sweep.json", ".sweep", "configs"
SCHEMA = 1


@dataclass(frozen=True)
class Composed:
    """One combination of a sweep, before it has a folder of its own."""

    overrides: tuple[str, ...]
    config: RunConfig
    extra: dict[str, Any]  # keys of the command, not of the run
    recipe: str | None
    subfolder: str  # hydra.sweep.subdir: the run's number, unless the user says otherwise
    default_folder: str  # hydra.sweep.dir, for a sweep without run_dir


@dataclass(frozen=True)
class Job:
    """One try at a run. `log`: its stderr, below the sweep's folder."""

    id: str
    log: str


@dataclass(frozen=True)
class Run:
    number: int
    folder: str  # below the sweep's folder
    overrides: tuple[str, ...]
    recipe: str | None = None
    jobs: tuple[Job, ...] = ()


@dataclass(frozen=True)
class Sweep:
    root: Path
    cwd: str  # where it was started: relative paths in configs begin there
    parameters: dict[str, Any]  # a LauncherConfig's
    command: tuple[str, ...]
    runs: tuple[Run, ...]

    @property
    def launcher(self) -> str:
        """local or slurm."""
        return str(self.parameters["name"])

    def folder(self, run: Run) -> Path:
        return self.root / run.folder

    def varying(self) -> tuple[str, ...]:
        """The keys that are not the same in all runs, in the order given."""
        values = [self.values(run) for run in self.runs]
        return tuple(key for key in values[0] if len({each.get(key) for each in values}) > 1)

    def values(self, run: Run) -> dict[str, str]:
        """Key -> value of a run's overrides."""
        pairs = (text.lstrip("+~").partition("=") for text in run.overrides)
        return {key: value for key, _, value in pairs}

    def label(self, run: Run) -> str:
        """What sets a run apart from the others."""
        values = self.values(run)
        return f"run {run.number} ({' '.join(f'{key}={values.get(key)}' for key in self.varying()) or 'the only one'})"

    def config(self, run: Run) -> RunConfig:
        """The run's config as it was stored, with its folder below wherever the sweep is now."""
        values = read_resolved(self.root / INNER / CONFIGS / f"{run.number}.yaml")
        return validate({**values, "run_dir": str(self.folder(run).absolute()), "resume": "auto"})

    def with_jobs(self, jobs: dict[int, Job]) -> "Sweep":
        """The sweep with one more try at some runs, written to sweep.json."""
        runs = (replace(r, jobs=(*r.jobs, jobs[r.number])) if r.number in jobs else r for r in self.runs)
        sweep = replace(self, runs=tuple(runs))
        sweep.write()
        return sweep

    def write(self) -> None:
        """Write sweep.json in one piece. Raises LoramoeError when the disk refuses."""
        content = {
            "schema": SCHEMA,
            "command": self.command,
            "cwd": self.cwd,
            "parameters": self.parameters,
            "runs": [asdict(run) for run in self.runs],
        }
        with write_errors(str(self.root / SWEEP), "make room"):
            write_json(self.root / SWEEP, content)


def counted(runs: Sequence[object]) -> str:
    """`1 run`, `2 runs`."""
    return f"{len(runs)} run{'' if len(runs) == 1 else 's'}"


def shown(overrides: Sequence[str]) -> str:
    return " ".join(overrides)


def checked(composed: Sequence[Composed], parameters: dict[str, Any]) -> tuple[Sweep, list[RunConfig]]:
    """A sweep and its runs' configs, as far as they can be checked without a weight. Writes nothing.

    Raises ConfigError for the first run that could not do what it says, for runs that would share a folder or are the
    same, and for a folder that holds something already. What a run reads is looked for where it runs.
    """
    first = composed[0]
    root = Path(first.config.run_dir or first.default_folder)
    if len({run.config.run_dir for run in composed}) > 1:
        raise ConfigError("run_dir cannot be swept: it is the folder of the sweep, in which every run gets its own")
    if any(run.config.launcher != first.config.launcher for run in composed):
        raise ConfigError("launcher and its keys cannot be swept: all runs of a sweep are started in the same way")
    if first.config.resume not in (None, "auto"):
        raise ConfigError(
            f"resume={first.config.resume}: a run of a sweep goes on in its own folder by itself; leave resume out"
        )
    if (root / SWEEP).exists() or (root / INNER).exists():
        raise ConfigError(
            f"run_dir={root} holds a sweep already; loramoe-sweep retry-failed {root} goes on with it, another run_dir"
            " starts a new one"
        )
    _check_folders(composed)
    seen: dict[str, Composed] = {}
    configs = []
    for number, run in enumerate(composed):
        here = f"run {number} ({shown(run.overrides)})"
        config = run.config.model_copy(update={"run_dir": str((root / run.subfolder).absolute()), "resume": None})
        try:
            settle(config, check_files=False)
            check_claim(Path(str(config.run_dir)), config)
        except (MissingFileError, DataError):
            pass  # it may be there where the run will be
        except ConfigError as error:
            raise ConfigError(f"{here}: {error}") from error
        same = seen.setdefault(str(sorted(flatten(run.config.plain()).items())), run)
        if same is not run:
            raise ConfigError(
                f"{here} is the same as run {composed.index(same)} ({shown(same.overrides)}); give each combination"
                " once"
            )
        configs.append(config.model_copy(update={"resume": "auto"}))
    return replace(runs_of(composed), root=root, parameters=parameters), configs


def runs_of(composed: Sequence[Composed]) -> Sweep:
    """The runs by number, nothing checked and no folder yet."""
    runs = (Run(n, str(PurePosixPath(r.subfolder)), r.overrides, r.recipe) for n, r in enumerate(composed))
    return Sweep(Path(), os.getcwd(), composed[0].config.launcher.model_dump(), tuple(sys.argv), tuple(runs))


def _check_folders(composed: Sequence[Composed]) -> None:
    taken: dict[PurePosixPath, int] = {}
    for number, run in enumerate(composed):
        place = PurePosixPath(run.subfolder)
        if place.is_absolute() or ".." in place.parts or not place.parts or place.parts[0] in (SWEEP, INNER):
            raise ConfigError(f"hydra.sweep.subdir={run.subfolder} must be a folder below that of the sweep")
        for other in (place, *place.parents):
            if other in taken:
                raise ConfigError(
                    f"run {taken[other]} ({shown(composed[taken[other]].overrides)}) and run {number}"
                    f" ({shown(run.overrides)}) would share the folder {other}; hydra.sweep.subdir must tell runs"
                    " apart, as its default, the run's number, does"
                )
        taken[place] = number
    for place, number in taken.items():
        inside = next((other for other in place.parents if other in taken), None)
        if inside is not None:
            raise ConfigError(f"run {number} would write into {inside}, the folder of run {taken[inside]}")


def create(sweep: Sweep, configs: Sequence[RunConfig]) -> list[Path]:
    """Write the sweep's folder; returns the folders that were made for it, the innermost first.

    Raises ConfigError when somebody else has just written it, or it cannot be written.
    """
    inner = sweep.root / INNER
    made = [folder for folder in (sweep.root, *sweep.root.parents) if not folder.exists()]
    try:
        sweep.root.mkdir(parents=True, exist_ok=True)
        inner.mkdir()  # who makes it, owns the sweep
        (inner / CONFIGS).mkdir()
        for number, config in enumerate(configs):
            text = yaml.safe_dump(config.plain(), sort_keys=False, allow_unicode=True)
            write_bytes(inner / CONFIGS / f"{number}.yaml", text.encode())
    except FileExistsError as error:
        raise ConfigError(f"run_dir={sweep.root} holds a sweep already; give another run_dir") from error
    except OSError as error:
        raise ConfigError(f"run_dir={sweep.root} cannot be written: {error.strerror}") from error
    sweep.write()
    return made


def discard(sweep: Sweep, made: Sequence[Path]) -> None:
    """Take back what `create` wrote, for a sweep of which nothing was started."""
    (sweep.root / SWEEP).unlink(missing_ok=True)
    shutil.rmtree(sweep.root / INNER, ignore_errors=True)
    with suppress(OSError):  # somebody has put something there meanwhile
        for folder in made:
            folder.rmdir()


def read_sweep(root: Path) -> Sweep:
    """The sweep in a folder. Raises MissingFileError or DataError, in one line."""
    if not (root / SWEEP).is_file():
        raise MissingFileError(f"{root} holds no {SWEEP}, so it is no sweep; loramoe-train --multirun makes one")
    content = read_json(root / SWEEP)
    try:
        if content["schema"] != SCHEMA:
            raise DataError(f"{root / SWEEP} has schema {content['schema']}; this version reads {SCHEMA}")
        runs = tuple(
            Run(
                int(run["number"]),
                _below(run["folder"]),
                tuple(map(str, run["overrides"])),
                run["recipe"],
                tuple(Job(_job_id(job["id"]), _below(job["log"])) for job in run["jobs"]),
            )
            for run in content["runs"]
        )
        if not runs or [run.number for run in runs] != list(range(len(runs))):
            raise ValueError("its runs are not numbered from 0")
        parameters = LauncherConfig(**content["parameters"]).model_dump()
        return Sweep(root, str(content["cwd"]), parameters, tuple(map(str, content["command"])), runs)
    except (KeyError, TypeError, ValueError) as error:
        reason = f"it has no {error}" if isinstance(error, KeyError) else str(error)
        raise DataError(f"{root / SWEEP} is not the record of a sweep: {reason}") from error


def _job_id(text: Any) -> str:
    if not re.fullmatch(r"(local-)?\d+(_\d+)?", str(text)):
        raise ValueError(f"{text} is no job")
    return str(text)


def _below(place: Any) -> str:
    path = PurePosixPath(str(place))
    if path.is_absolute() or ".." in path.parts:
        raise ValueError(f"{place} leads out of the folder")
    return str(path)


@contextmanager
def alone_with(sweep: Sweep) -> Iterator[None]:
    """One process at a time starts runs of a sweep."""
    try:
        lock = alone_in(sweep.root / INNER)
        lock.__enter__()
    except ConfigError as error:
        raise ConfigError(
            f"runs of {sweep.root} are being started by another process ({error}); wait for it, or stop it"
        ) from error
    try:
        yield
    finally:
        lock.__exit__(None, None, None)


def is_locked(folder: Path) -> bool:
    """Whether a process on a machine that shares our locks works in a folder (see run_lock.py).

    Never ask for a folder that this very process works in: that would give its lock away.
    """
    try:
        handle = os.open(folder / LOCK, os.O_RDONLY | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        fcntl.lockf(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(handle)
    return False
