"""Where a table's runs are: ROOT/sweep-1, ROOT/sweep-2, ... are sweeps; a run's folder says which cell it belongs to.

    ROOT/sweep-N/BASE/METHOD/TRAIN[/VARIANT]/SEED

A later call with more seeds or rows adds a sweep with what is missing; nothing that is there is written again.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from loramoe_train.errors import ConfigError, DataError, SweepFailed
from loramoe_train.reproduce.loads import last_record, share
from loramoe_train.reproduce.runs import Wanted, same_run
from loramoe_train.rundir import RESULTS, flatten
from loramoe_train.schema.launcher import LauncherConfig
from loramoe_train.sweeps.start import again, start
from loramoe_train.sweeps.status import DONE, FAILED, RunStatus, look
from loramoe_train.sweeps.sweep import CONFIGS, INNER, Composed, Sweep, counted, read_sweep
from loramoe_train.trust import refuse_untyped

Say = Callable[[str], None]
VARIANT = re.compile(r"^lr-[0-9]+(\.[0-9]+)?(e[+-]?[0-9]+)?$")  # what a method's best run is chosen among
# may differ between what a run was and what it would be now: where it is, how it reports and is started
FREE = (
    "run_dir", "resume", "resume_changes", "offline", "launcher", "data.root", "model.path", "trainer.checkpoint_every",
    "trainer.keep", "trainer.log_every", "trainer.trackers", "trainer.num_workers", "trainer.watch", "eval.base",
    "eval.again", "eval.save_samples", "eval.batch_size", "eval.generation_batch_size",
)  # fmt: skip


@dataclass(frozen=True)
class Found:
    """A run of a table on disk."""

    base: str
    method: str
    train: str
    variant: str
    seed: int
    sweep: Sweep
    status: RunStatus

    @property
    def key(self) -> str:
        return self.status.run.folder

    @property
    def path(self) -> Path:
        return self.sweep.folder(self.status.run)

    @property
    def id(self) -> str:
        """The run below the table's folder."""
        return f"{self.sweep.root.name}/{self.key}"

    @property
    def done(self) -> bool:
        return self.status.state == DONE

    def load(self, task: str | None, take: str) -> float:
        """See `loads.share`; in per cent. Raises DataError."""
        return share(self._record, task, take)

    @cached_property
    def _record(self) -> dict[str, Any]:
        return last_record(self.path)

    def training_data(self) -> dict[str, Any]:
        """The group `data` of its config, flat, without the place of the files. Raises DataError."""
        path = self.sweep.root / INNER / CONFIGS / f"{self.status.run.number}.yaml"
        try:
            # libyaml's loader, where it is there: hundreds of configs are read for a table
            values = yaml.load(path.read_text(encoding="utf-8"), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
            return {key: value for key, value in flatten(values["data"], "data").items() if key != "data.root"}
        except (OSError, ValueError, TypeError, KeyError, yaml.YAMLError, RecursionError) as error:
            raise DataError(f"{path} is no config of a run: {str(error).splitlines()[0]}") from error


def sweeps(root: Path) -> list[Sweep]:
    """Raises DataError for a folder that holds something else, and for what is no folder."""
    if root.exists() and not root.is_dir():
        raise DataError(f"run_dir={root} is a file; give a folder")
    places = [path for path in root.glob("sweep-*") if path.is_dir()] if root.is_dir() else []
    try:
        ordered = sorted(places, key=lambda path: int(path.name.removeprefix("sweep-")))
    except ValueError as error:
        raise DataError(f"{root} holds a folder sweep-... that is not numbered; move it elsewhere") from error
    return [read_sweep(path) for path in ordered]


def find(root: Path, note: Say = lambda line: None) -> list[Found]:
    """All runs of a table, each once: where several sweeps have it, the one with results, else the newest."""
    found: dict[str, Found] = {}
    for sweep in sweeps(root):
        for status in look(sweep, note):
            run = _placed(sweep, status)
            if run.key not in found or not found[run.key].done:
                found[run.key] = run
    return list(found.values())


def _placed(sweep: Sweep, status: RunStatus) -> Found:
    parts = PurePosixPath(status.run.folder).parts
    if len(parts) not in (4, 5) or not parts[-1].isdigit() or (len(parts) == 5 and not VARIANT.match(parts[3])):
        raise DataError(f"{sweep.root} is no sweep of a table: its run {status.run.number} is in {status.run.folder}")
    return Found(*parts[:3], parts[3] if len(parts) == 5 else "", int(parts[-1]), sweep, status)


def complete(
    root: Path, runs: Sequence[Wanted], *, wait: bool | None, say: Say, typed: Sequence[str] = ()
) -> SweepFailed | None:
    """Start what is missing, and once more what failed. Returns what is to be told after the table is shown.

    `wait`: for the end of the runs; None: for local ones. `typed`: what the command line says of the runs. Raises, with
    nothing started, ConfigError where a run that is there was made otherwise than it would be now, and DataError where
    its results are damaged.
    """
    there = {run.key: run for run in find(root, say)}
    for run in runs:
        if run.folder in there:
            _check_same(there[run.folder], run)
            refuse_untyped({"launcher": there[run.folder].sweep.parameters}, typed)  # the folder may be somebody else's
    failed = [there[run.folder] for run in runs if run.folder in there and there[run.folder].status.state == FAILED]
    for run in failed:
        if (run.path / RESULTS).is_file():
            raise DataError(f"{run.status.why}: remove that file, and the same command makes it again")
    missing = [run for run in runs if run.folder not in there]
    done = sum(run.folder in there and there[run.folder].done for run in runs)
    under_way = len(runs) - done - len(failed) - len(missing)
    told = f", {under_way} running or waiting" if under_way else ""
    say(f"{counted(runs)}: {done} done{told}, {len(failed)} failed, {len(missing)} to start")
    wait = runs[0].config.launcher.name == "local" if wait is None else wait
    problem = None
    for job in _jobs(root, failed, missing, runs[0].config.launcher, wait, say):
        try:
            job()
        except SweepFailed as error:
            problem = error
    return problem


def _jobs(
    root: Path, failed: Sequence[Found], missing: Sequence[Wanted], launcher: LauncherConfig, wait: bool, say: Say
) -> Iterator[Callable[[], object]]:
    by_sweep: dict[Path, list[Found]] = {}
    for run in failed:
        by_sweep.setdefault(run.sweep.root, []).append(run)
    for members in by_sweep.values():
        numbers, sweep = [run.status.run.number for run in members], members[0].sweep
        if sweep.launcher == launcher.name:
            sweep = replace(sweep, parameters=launcher.model_dump())  # more time, perhaps, or another partition
        else:
            say(f"{sweep.root} goes on with launcher={sweep.launcher}, as it was started")
        yield lambda sweep=sweep, numbers=numbers: again(sweep, numbers, wait=wait, say=say)
    if missing:
        taken = [int(sweep.root.name.removeprefix("sweep-")) for sweep in sweeps(root)]
        place = str(root / f"sweep-{max(taken, default=0) + 1}")
        composed = [
            Composed(run.overrides, run.config.model_copy(update={"run_dir": place}), {}, run.recipe, run.folder, place)
            for run in missing
        ]
        yield lambda: start(composed, {}, wait=wait, say=say)


def _check_same(there: Found, now: Wanted) -> None:
    stored = there.sweep.config(there.status.run)
    keys = same_run(stored, now.config, FREE)
    if keys:
        values = [_at(config.plain(), keys[0]) for config in (stored, now.config)]
        more = f", and {len(keys) - 1} more keys" if len(keys) > 1 else ""
        cure = "give the old values, or another run_dir"
        if all(key.startswith("eval.") for key in keys):  # what is trained may stay
            cure += f"; loramoe-eval {there.path} with such keys scores what is trained, for this table too"
        raise ConfigError(
            f"{there.path} was made with {keys[0]}={values[0]}, and now it would be {values[1]}{more}; {cure}"
        )


def _at(values: object, key: str) -> object:
    for part in key.split("."):
        values = values.get(part) if isinstance(values, dict) else None
    return values
