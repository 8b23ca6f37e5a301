"""The folder of a run: who may write into it, and what a later start finds there."""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml

from loramoe_train.errors import ConfigError, DataError, MissingFileError, nearest
from loramoe_train.files import write_bytes
from loramoe_train.schema.run import RunConfig, defaults
from loramoe_train.trust import refuse_outside_links

RESOLVED, RESULTS = "config.resolved.yaml", "results.json"
OUTPUTS = ("adapter.safetensors", "adapter.json", "metrics.jsonl", "checkpoints", RESULTS)  # besides RESOLVED
KEYS_IN_MESSAGE = 4
# of one run on one machine; no business of an adapter's manifest
PLACES = ("run_dir", "resume", "resume_changes", "init_from")
# What may change when a run continues: where it is, how it reports, and what happens after training.
FREE = (
    "run_dir",
    "resume",
    "resume_changes",
    "offline",
    "eval",
    "launcher",
    "data.root",
    "trainer.checkpoint_every",
    "trainer.keep",
    "trainer.log_every",
    "trainer.trackers",
    "trainer.num_workers",
    "trainer.parallel",
    "trainer.watch",
    "model.path",
)


def default_run_dir() -> str:
    """outputs/DATE_TIME below the current folder."""
    return f"outputs/{datetime.now():%Y-%m-%d_%H-%M-%S}"


def check_places(config: RunConfig) -> None:
    """Raise for a place that a run cannot use, before anything heavy is imported and without writing anything.

    Raises ConfigError for the run folder (see `claim`), MissingFileError for what is to be read and is not there.
    """
    if config.run_dir is not None:
        check_claim(Path(config.run_dir), config)
    named = [("init_from", config.init_from), ("resume", None if config.resume == "auto" else config.resume)]
    for key, path in [*named, *(("experts.adapters", path) for path in config.experts.adapters)]:
        if path is not None and not Path(path).exists():
            what = "checkpoint (give a folder, or resume=auto)" if key == "resume" else "folder"
            raise MissingFileError(f"{key}={path} does not exist: there is no such {what}")
    if config.resume not in (None, "auto"):
        _check_same_as_checkpoint(Path(config.resume), config)


def check_claim(run_dir: Path, config: RunConfig) -> None:
    """Raise ConfigError where `claim` would refuse the folder. Writes nothing."""
    place = next(path for path in (run_dir, *run_dir.absolute().parents) if path.exists())
    if not place.is_dir():
        raise ConfigError(f"run_dir={run_dir} cannot be written: {place} is a file; give a folder")
    if not os.access(place, os.W_OK | os.X_OK):
        raise ConfigError(f"run_dir={run_dir} cannot be written: no permission to write into {place}")
    refuse_outside_links(run_dir)
    if (run_dir / RESOLVED).is_file():
        if config.resume is None:
            raise ConfigError(
                f"run_dir={run_dir} holds another run; resume=auto continues it, another run_dir starts a new one"
            )
        return _refuse_changes(read_resolved(run_dir / RESOLVED), config, run_dir)
    for name in OUTPUTS:
        if (run_dir / name).exists():
            raise ConfigError(
                f"run_dir={run_dir} holds {name} but no {RESOLVED}, so it is no run; give another run_dir"
            )


def claim(run_dir: Path, config: RunConfig) -> bool:
    """Make the folder this run's own and write the resolved config into it; whether it was free before.

    Raises ConfigError when it cannot be written, holds another run, or holds this run under a config that differs in
    something that would change the result.
    """
    check_claim(run_dir, config)
    stored = run_dir / RESOLVED
    fresh = not stored.exists()
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        write_bytes(stored, yaml.safe_dump(config.plain(), sort_keys=False, allow_unicode=True).encode())
    except OSError as error:
        raise ConfigError(f"run_dir={run_dir} cannot be written: {error.strerror}") from error
    return fresh


@contextmanager
def released_on_failure(run_dir: Path, *, fresh: bool) -> Iterator[None]:
    """Give a folder back that was claimed for a run which cannot start, so that the corrected command may use it."""
    try:
        yield
    except BaseException:
        if fresh:
            (run_dir / RESOLVED).unlink(missing_ok=True)  # the folder goes with its lock, if nothing else is in it
        raise


def _check_same_as_checkpoint(path: Path, config: RunConfig) -> None:
    """A checkpoint that is named stores the config of its run; what is damaged is told later, when it is read whole."""
    try:
        stored = json.loads((path / "adapter.json").read_text(encoding="utf-8"))["config"]
    except (OSError, ValueError, KeyError, TypeError):
        return
    if isinstance(stored, dict):
        _refuse_changes({**stored, "init_from": config.init_from}, config, path)  # which adapters do not store


def _refuse_changes(stored: dict[str, Any], config: RunConfig, where: Path) -> None:
    before, now = flatten(stored), flatten(config.plain())
    for name in config.resume_changes:
        if not any(_within(key, name) for key in before.keys() | now.keys()):
            raise ConfigError(f"resume_changes names '{name}', which is no key{nearest(name, now)}")
    # a run of an older version stored no value for what is new, and did what the default does
    before = {**{key: value for key, value in flatten(defaults()).items() if key in now}, **before}
    differing = [key for key in sorted(before.keys() | now.keys()) if before.get(key) != now.get(key)]
    changed = [key for key in differing if not any(_within(key, name) for name in (*FREE, *config.resume_changes))]
    if changed:
        shown = [f"{key}={now.get(key)} (it was {before.get(key)})" for key in changed[:KEYS_IN_MESSAGE]]
        more = f" and {len(changed) - KEYS_IN_MESSAGE} more" if len(changed) > KEYS_IN_MESSAGE else ""
        raise ConfigError(
            f"resume={config.resume} continues the run in {where}, which was started otherwise: {', '.join(shown)}"
            f"{more}; use the old values, or start anew in another run_dir with init_from={where}; to go on all the"
            f" same, with another result, name the keys: resume_changes=[{','.join(changed)}]"
        )


def _within(key: str, name: str) -> bool:
    return key == name or key.startswith(f"{name}.")


def flatten(values: Any, prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}; lists stay whole, as JSON."""
    if not isinstance(values, dict):
        return {prefix: json.dumps(values) if isinstance(values, list) else values}
    found: dict[str, Any] = {}
    for key, value in values.items():
        found.update(flatten(value, f"{prefix}.{key}" if prefix else str(key)))
    return found


def read_resolved(path: Path) -> dict[str, Any]:
    """The resolved config of a run folder, as plain values."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        raise DataError(f"{path} cannot be read: {str(error).splitlines()[0]}") from error
    if not isinstance(values, dict):
        raise DataError(f"{path} is no resolved config")
    return values


def newest_checkpoint(run_dir: Path, config: RunConfig, say: Callable[[str], None]) -> Path | None:
    """Where `resume` says to continue: the newest complete checkpoint of the folder, a named one, or nowhere."""
    from loramoe_train.training.checkpoint import find_latest

    if config.resume is None:
        return None
    if config.resume == "auto":
        return find_latest(run_dir, on_skip=say)
    return Path(config.resume)
