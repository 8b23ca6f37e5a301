"""Checkpoints that are complete or not there.

    run_dir/checkpoints/step_000123/
        adapter.safetensors + manifest    what was trained, as `parts.save_adapter` writes it
        state/*.safetensors               optimizer, anchors, random generators, sums of the log
        state/trainer.json                counters, best loss, early stopping, plan of the stage
        MANIFEST.json                     size and SHA-256 of every file above; written last

Everything is written into a `.tmp` sibling, flushed to the disk and renamed. A folder without a manifest that checks is
not a checkpoint. There is no pickle anywhere, so a checkpoint from a stranger is data and nothing else.

Writing is done in a thread of its own (`writer.py`), from copies (`snapshot.py`): training goes on meanwhile.
"""

import json
import os
import re
import shutil
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from loramoe_train.errors import LoramoeError, MissingFileError, shown
from loramoe_train.files import read_json, sha256, sync, write_errors, write_json

FOLDER, MANIFEST, STATE = "checkpoints", "MANIFEST.json", "state"
ADAPTER, TRAINER = "adapter.safetensors", f"{STATE}/trainer.json"  # no checkpoint is without them
FORMAT = 1
_NAME = re.compile(r"^step_(\d+)$")


@dataclass(frozen=True)
class Checkpoint:
    """What a complete checkpoint holds besides the adapter."""

    path: Path
    state: Mapping[str, Any]  # of state/trainer.json

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The tensors of state/NAME.safetensors, on the CPU; empty if that file was not written."""
        file = self.path / STATE / f"{name}.safetensors"
        return load_file(file) if file.is_file() else {}


def step_of(path: Path) -> int:
    """`step_000123` -> 123, and -1 for any other name."""
    match = _NAME.match(path.name)
    return int(match.group(1)) if match else -1


def checkpoint_path(run_dir: Path, step: int) -> Path:
    """Where the checkpoint after `step` optimizer steps of the run is, or will be."""
    return run_dir / FOLDER / f"step_{step:06d}"


def write_checkpoint(
    run_dir: Path,
    step: int,
    *,
    save_adapter: Callable[[Path], None],
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
) -> Path:
    """Write `run_dir/checkpoints/step_STEP`, replacing one of that name only once the new one is whole.

    Args:
        tensors: file name in state/ -> its tensors; empty ones are left out.
        state: what JSON can hold.

    Raises:
        LoramoeError: it could not be written (disk full, not writable); the former checkpoints are as they were.
    """
    folder = checkpoint_path(run_dir, step)
    aside, old = folder.with_name(f"{folder.name}.tmp"), folder.with_name(f"{folder.name}.old")
    cure = "the former checkpoints are intact; make room or choose another run_dir, and continue with resume=auto"
    with write_errors(f"checkpoint {folder}", cure):
        try:
            _tidy(folder.parent)
            (aside / STATE).mkdir(parents=True)
            save_adapter(aside)
            for name, entries in tensors.items():
                if entries:
                    save_file(dict(entries), aside / STATE / f"{name}.safetensors")
            write_json(aside / TRAINER, dict(state))
            files = sorted(path for path in aside.rglob("*") if path.is_file())
            for path in files:
                sync(path)
            listing = {
                path.relative_to(aside).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256(path)}
                for path in files
            }
            write_json(aside / MANIFEST, {"format": FORMAT, "step": step, "files": listing})
            for path in [*(path for path in aside.rglob("*") if path.is_dir()), aside]:
                sync(path)
            if folder.exists():
                os.rename(folder, old)
            os.rename(aside, folder)
            sync(folder.parent)
            sync(run_dir)  # in which the folder of all checkpoints may be new
        except Exception:
            # what is half written must not keep the disk full
            shutil.rmtree(aside, ignore_errors=True)
            raise
    shutil.rmtree(old, ignore_errors=True)
    return folder


def _tidy(checkpoints: Path) -> None:
    """Remove what a crash left half written, and put back what it was about to replace."""
    if not checkpoints.is_dir():
        return
    for path in checkpoints.glob("step_*.old"):
        current = path.with_suffix("")
        if current.exists():
            shutil.rmtree(path, ignore_errors=True)
        else:
            os.rename(path, current)
    for path in checkpoints.glob("step_*.tmp"):
        shutil.rmtree(path, ignore_errors=True)


def fault(path: Path) -> str | None:
    """Why a folder is no complete checkpoint, in a few words; None if it is one. Reads every byte of it."""
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        files = manifest["files"]
        if manifest["format"] != FORMAT:
            return f"its format is {shown(manifest['format'])}, this program reads {FORMAT}"
        for name, facts in files.items():
            plain = PurePosixPath(name)
            if plain.is_absolute() or ".." in plain.parts or not _lies_inside(path, plain):
                return f"its manifest names {shown(repr(name), 100)}, which is not a plain file inside it"
            file = path / name
            if not file.is_file():
                return f"{shown(name, 100)} is missing"
            if file.stat().st_size != facts["bytes"]:
                return f"{shown(name, 100)} has {file.stat().st_size} bytes instead of {shown(facts['bytes'])}"
            if sha256(file) != facts["sha256"]:
                return f"{shown(name, 100)} does not match its checksum"
        # what would be read must have been checked
        wanted = [TRAINER, ADAPTER, *sorted(file.relative_to(path).as_posix() for file in path.rglob("*.safetensors"))]
        unlisted = [name for name in wanted if name not in files]
        if unlisted:
            return f"{shown(unlisted[0], 100)} is not in its manifest"
        # a copy may have any name
        if step_of(path.with_suffix("")) not in (-1, manifest["step"]):
            return f"its manifest is of step {shown(manifest['step'])}"
    except FileNotFoundError:
        return f"it has no {MANIFEST}"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return f"its {MANIFEST} cannot be read ({type(error).__name__})"
    return None


def _lies_inside(folder: Path, name: PurePosixPath) -> bool:
    """Whether the way to a file has no link in it."""
    try:
        return (folder / name).resolve() == folder.resolve() / name
    except (OSError, RuntimeError):  # links that lead in a circle
        return False


def find_latest(run_dir: Path, *, on_skip: Callable[[str], None] = lambda message: None) -> Path | None:
    """The newest complete checkpoint of a run folder, or None. Changes nothing on disk.

    Args:
        on_skip: told, by name, about each newer one that is incomplete or corrupted.
    """
    checkpoints = run_dir / FOLDER
    folders = _folders(checkpoints)
    # a crash between the two renames of a replacement; looking must change nothing, the run may be saving right now
    folders += [path for path in checkpoints.glob("step_*.old") if not path.with_suffix("").exists()]
    for path in sorted(folders, key=lambda path: step_of(path.with_suffix("")), reverse=True):
        reason = fault(path)
        if reason is None:
            return path
        on_skip(f"checkpoint {path} is skipped: {reason}")
    return None


def read_checkpoint(path: Path) -> Checkpoint:
    """Open a checkpoint that was named. Raises MissingFileError if it is absent, LoramoeError if it is damaged."""
    if not path.is_dir():
        raise MissingFileError(f"checkpoint {path} does not exist; give a folder such as RUN_DIR/{FOLDER}/step_000100")
    reason = fault(path)
    if reason is not None:
        raise LoramoeError(f"checkpoint {path} cannot be used: {reason}; take an older one, or resume=auto")
    return Checkpoint(path, read_json(path / TRAINER))


def rotate(run_dir: Path, *, step: int, keep: int, protected: Collection[str]) -> None:
    """Delete all but the newest `keep` checkpoints; those whose names are `protected` stay and are not counted.

    Later ones than `step`, the newest of this run, are left alone: a run continued from an older checkpoint meets
    them again, and they must not push out what it has just written.
    """
    folders = (path for path in _folders(run_dir / FOLDER) if path.name not in protected and step_of(path) <= step)
    for path in sorted(folders, key=step_of)[:-keep]:
        # the manifest goes first: a deletion that is cut short leaves nothing that looks complete
        (path / MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(path, ignore_errors=True)


def _folders(checkpoints: Path) -> list[Path]:
    return [path for path in checkpoints.glob("step_*") if step_of(path) >= 0] if checkpoints.is_dir() else []
