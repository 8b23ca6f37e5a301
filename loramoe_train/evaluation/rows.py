"""Rows of local benchmark files: JSON lines, plain or gzipped, read whole and checked line by line."""

import gzip
import json
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from loramoe_train import paths
from loramoe_train.errors import DataError
from loramoe_train.files import sha256

IN_PACKAGE = "package://"
HIDDEN = (None, "", [], -1)  # what stands for an answer in a test split whose answers are kept back


def data_folder(root: str) -> Path:
    """The folder that `data.root` names; `package://NAME` lies inside this package."""
    if root.startswith(IN_PACKAGE):
        return paths.PACKAGE / root.removeprefix(IN_PACKAGE)
    return Path(root).expanduser()


def find_file(folder: Path, name: str) -> Path | None:
    """`folder/name`, or the same file with or without `.gz`; None if neither is there."""
    other = name.removesuffix(".gz") if name.endswith(".gz") else f"{name}.gz"
    return next((folder / candidate for candidate in (name, other) if (folder / candidate).is_file()), None)


def read_rows(path: Path, columns: Sequence[str], *, answer: str | None = None) -> list[dict[str, Any]]:
    """The rows of a file, each with at least these columns, and with a value in the column `answer`.

    Raises:
        DataError: naming file and line, where a line is no JSON object, lacks a column or has its answer hidden, or
            where nothing is left.
    """
    rows = list(_rows(path, columns, answer))
    if not rows:
        raise DataError(f"{path} holds no rows")
    return rows


def describe_file(path: Path) -> dict[str, Any]:
    """Which rows these are: the file's name, the SHA-256 of its bytes as they lie there, and its number of rows."""
    with _open(path) as lines:
        return {"file": str(path), "sha256": sha256(path), "rows": sum(bool(line.strip()) for line in lines)}


def _rows(path: Path, columns: Sequence[str], answer: str | None) -> Iterator[dict[str, Any]]:
    with _open(path) as lines:
        try:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield _row(line, columns, answer, f"{path}:{number}")
        except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
            raise DataError(f"{path} cannot be read: {error}") from None


def _open(path: Path) -> IO[str]:
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8")
    return path.open(encoding="utf-8")


def _row(line: str, columns: Sequence[str], answer: str | None, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not valid JSON ({error.msg}, column {error.colno})") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; nested without end
        raise DataError(f"{where}: not JSON that can be read ({str(error)[:100]})") from None
    if not isinstance(row, dict):
        raise DataError(f"{where}: expected a JSON object with the columns {', '.join(columns)}")
    missing = [column for column in columns if column not in row]
    if missing:
        raise DataError(
            f"{where}: no column '{missing[0]}'; this benchmark reads {', '.join(columns)}, found {', '.join(row)}"
        )
    if answer is not None and row[answer] in HIDDEN:
        raise DataError(
            f"{where}: {answer} is {json.dumps(row[answer])}, so the answer is hidden; such rows cannot be scored, take"
            " a split whose answers are public"
        )
    return row
