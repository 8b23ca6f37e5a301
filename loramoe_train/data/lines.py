"""Rows of a JSON-lines file, exactly as written, at the cost of sixteen bytes of memory per row.

The file is read once to find (and check) its lines; afterwards any row is one read at its place and one `json.loads`.
It is not mapped: pages of a mapping stay with the process that touched them, and a file that somebody shortens
meanwhile would kill it.
Why not `datasets` here: its JSON reader gives a column one type, so that 1 beside 2.5 becomes 1.0, "2020-01-01" becomes
a timestamp and a missing field becomes null, all of which would be rendered into the training text; and it does not
know line numbers. Parquet files and hub data sets, which are typed already, go through `datasets` (source.py).
"""

import gzip
import hashlib
import json
import os
import shutil
import tempfile
import zlib
from array import array
from pathlib import Path
from typing import Any, BinaryIO

from loramoe_train.errors import DataError

Row = dict[str, Any]
BOM = b"\xef\xbb\xbf"
MAX_LINE = 1 << 28  # bytes; whoever writes a whole data set into one line hears so before it is in memory
# Far below the interpreter's limit, which counts the callers too: what can be read here can be read and rendered later.
MAX_DEPTH = 100


class JsonLines:
    """`rows[i]` is the i-th object of the file, `where(i)` its `file:line`. Blank lines, CRLF and a BOM are allowed.

    Raises DataError, naming file and line, for a line that is not one JSON object in UTF-8, and for a row that is not
    there any more when it is asked for.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = _opened(path)
        self._starts, self._lines = array("q"), array("q")
        try:
            self._index()
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> Row:
        if not 0 <= index < len(self._starts):
            raise IndexError(index)
        start = self._starts[index]
        stop = self._starts[index + 1] if index + 1 < len(self._starts) else self._size
        try:
            row = json.loads(_read(self._file, start, stop - start).partition(b"\n")[0])
        except (OSError, ValueError) as error:
            raise DataError(f"{self.where(index)}: the file was changed while it was in use") from error
        if not isinstance(row, dict):
            raise DataError(f"{self.where(index)}: the file was changed while it was in use")
        return row

    def where(self, index: int) -> str:
        return f"{self.path}:{self._lines[index]}"

    def digest(self) -> str:
        self._file.seek(0)
        return hashlib.file_digest(self._file, "sha256").hexdigest()

    def _index(self) -> None:
        self._size, number = 0, 0
        while line := self._file.readline(MAX_LINE):
            number += 1
            start, where = self._size, f"{self.path}:{number}"
            self._size += len(line)
            if start == 0 and line.startswith(BOM):
                start, line = len(BOM), line[len(BOM) :]
            if len(line) >= MAX_LINE:
                raise DataError(f"{where}: the line is longer than {MAX_LINE >> 20} MiB; one object per line")
            if line.strip():
                _check_line(line, where)
                self._starts.append(start)
                self._lines.append(number)


class JsonArray:
    """Rows of a `.json` file that holds one list of objects; the whole list is kept in memory."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with _opened(path) as file:
            content = file.read()
        try:
            rows = _parse(content.decode("utf-8-sig"))
        except UnicodeDecodeError as error:
            raise DataError(f"{path}: byte {error.start} is not UTF-8; save the file as UTF-8") from error
        except json.JSONDecodeError as error:
            raise DataError(f"{path}:{error.lineno}: not valid JSON ({error.msg}, column {error.colno})") from error
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}: not valid JSON ({_reason(error)})") from error
        self._rows: list[Row] = rows
        self._digest = hashlib.sha256(content).hexdigest()
        for index, row in enumerate(rows):
            if not isinstance(row, dict):
                raise DataError(f"{self.where(index)}: is {_kind(row)}; each item must be an object with the columns")
            if depth_exceeds(row, MAX_DEPTH):
                raise DataError(f"{self.where(index)}: is nested too deeply, more than {MAX_DEPTH} levels")

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Row:
        return self._rows[index]

    def where(self, index: int) -> str:
        return f"{self.path} (item {index + 1})"

    def digest(self) -> str:
        return self._digest


def read_json(path: Path) -> JsonLines | JsonArray:
    """Rows of a json, jsonl or gzipped jsonl file; a `.json` file may hold a list or lines. Raises DataError."""
    if path.name.endswith((".json", ".json.gz")):
        with _opened(path) as file:
            head = file.read(4096).removeprefix(BOM).lstrip()
        if head.startswith(b"["):
            return JsonArray(path)
    return JsonLines(path)


def _check_line(line: bytes, where: str) -> None:
    try:
        row = _parse(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: byte {error.start + 1} of the line is not UTF-8; save the file as UTF-8") from error
    except json.JSONDecodeError as error:
        raise DataError(
            f"{where}: not a JSON object ({error.msg}, column {error.colno}); one object per line"
        ) from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not a JSON object that can be read ({_reason(error)})") from error
    if not isinstance(row, dict):
        raise DataError(f"{where}: is {_kind(row)}; each line must be a JSON object with the columns")
    # counting brackets is quicker than walking, and they are few in almost every row
    if line.count(b"[") + line.count(b"{") > MAX_DEPTH and depth_exceeds(row, MAX_DEPTH):
        raise DataError(f"{where}: is nested too deeply, more than {MAX_DEPTH} levels")


def _parse(text: str) -> Any:
    """`json.loads`, but a key that stands twice in one object is an error: the first value would be lost."""
    return json.loads(text, object_pairs_hook=_distinct)


def _distinct(pairs: list[tuple[str, Any]]) -> Row:
    row = dict(pairs)
    if len(row) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key '{twice}' stands twice in one object")
    return row


def _reason(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "nested too deeply"
    return "a number of too many digits" if "integer string conversion" in str(error) else str(error)


def depth_exceeds(value: Any, limit: int) -> bool:
    """Whether lists and objects lie inside each other more than `limit` times; without recursion."""
    level = [value]
    for _ in range(limit):
        level = [
            entry
            for holder in level
            if isinstance(holder, list | dict)
            for entry in (holder.values() if isinstance(holder, dict) else holder)
        ]
        if not level:
            return False
    return any(isinstance(entry, list | dict) for entry in level)


def _kind(value: object) -> str:
    names = {list: "a list", str: "a string", bool: "a boolean", int: "a number", float: "a number", type(None): "null"}
    return names.get(type(value), type(value).__name__)


def _opened(path: Path) -> BinaryIO:
    """The bytes of a file, to be read at any place; a gzipped file is unpacked into an unnamed temporary file."""
    try:
        if path.suffix != ".gz":
            return path.open("rb")
        unpacked = tempfile.TemporaryFile()
        try:
            with gzip.open(path, "rb") as packed:
                shutil.copyfileobj(packed, unpacked, 1 << 20)
            unpacked.flush()
            unpacked.seek(0)
        except BaseException:
            unpacked.close()
            raise
        return unpacked  # type: ignore[return-value]
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path}: not a complete gzip file ({error}); make or fetch it again") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error


def _read(file: BinaryIO, start: int, length: int) -> bytes:
    """Bytes at a place. Forked workers share an open file's position, so it is not moved where the system can do that
    (Windows cannot, nor can it fork)."""
    if hasattr(os, "pread"):
        return os.pread(file.fileno(), length, start)
    file.seek(start)
    return file.read(length)
