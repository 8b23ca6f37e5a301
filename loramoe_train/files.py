"""Files that are whole or absent: written beside their place, flushed to disk, then renamed. No torch in here."""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from loramoe_train.errors import DataError, LoramoeError, MissingFileError


def sha256(path: Path) -> str:
    """Hex digest of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Flush a file, or a folder's list of names, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_bytes(path: Path, content: bytes) -> None:
    """Replace `path` by `content` in one step: a reader, or a crash, sees the old file or the new one."""
    aside = path.with_name(f"{path.name}.tmp")
    try:
        with aside.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
    sync(path.parent)


def write_json(path: Path, content: Any) -> None:
    """`content` as indented JSON; NaN is refused, because other readers of JSON refuse it too."""
    write_bytes(path, (json.dumps(content, indent=1, allow_nan=False) + "\n").encode())


@contextmanager
def write_errors(what: str, cure: str) -> Iterator[None]:
    """What the disk refuses, safetensors' own error for it among them, as one line.

    Raises LoramoeError: WHAT could not be written (REASON); CURE.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        reason = reason.rpartition("I/O error: ")[2].partition(" (os error")[0]  # as safetensors has it
        raise LoramoeError(f"{what} could not be written ({reason}); {cure}") from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises DataError naming file and line when it is damaged, MissingFileError when unreadable."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise MissingFileError(f"cannot read {path}: {error.strerror}") from error
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{error.lineno} is not JSON: {error.msg}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not text: {error.reason} at byte {error.start}") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, thousands of brackets
        raise DataError(f"{path} is not JSON that can be read: {str(error).splitlines()[0]}") from error
    if not isinstance(value, dict):
        raise DataError(f"{path} holds a {type(value).__name__}, not a JSON object")
    return value
