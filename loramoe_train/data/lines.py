"""Rows of a JSON-lines file, exactly as written, at the cost of eight bytes of memory per row.

The file is mapped and read once to find (and check) its lines; afterwards any row is one slice and one `json.loads`.
Why not `datasets` here: its JSON reader gives a column one type, so that 1 beside 2.5 becomes 1.0, "2020-01-01" becomes
a timestamp and a missing field becomes null, all of which would be rendered into the training text; and it does not
know line numbers. Parquet files and hub data sets, which are typed already, go through `datasets` (source.py).
"""

import gzip
import hashlib
import json
import mmap
import shutil
import tempfile
import zlib
from array import array
from pathlib import Path
from typing import Any

from loramoe_train.errors import DataError

Row = dict[str, Any]
BOM = b"\xef\xbb\xbf"


class JsonLines:
    """`rows[i]` is the i-th object of the file, `where(i)` its `file:line`. Blank lines, CRLF and a BOM are allowed.

    Raises DataError, naming file and line, for a line that is not one JSON object in UTF-8.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._map = _mapped(path)
        self._starts, self._lines = array("q"), array("q")
        self._index()

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> Row:
        start = self._starts[index]
        stop = self._map.find(b"\n", start)
        return json.loads(self._map[start : len(self._map) if stop < 0 else stop])

    def where(self, index: int) -> str:
        return f"{self.path}:{self._lines[index]}"

    def digest(self) -> str:
        return hashlib.sha256(self._map).hexdigest()

    def _index(self) -> None:
        start = len(BOM) if self._map[: len(BOM)] == BOM else 0
        number = 0
        while start < len(self._map):
            stop = self._map.find(b"\n", start)
            stop = len(self._map) if stop < 0 else stop
            number += 1
            line = self._map[start:stop]
            if line.strip():
                _check_line(line, f"{self.path}:{number}")
                self._starts.append(start)
                self._lines.append(number)
            start = stop + 1


class JsonArray:
    """Rows of a `.json` file that holds one list of objects; the whole list is kept in memory."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            content = bytes(_mapped(path))
            rows = json.loads(content.decode("utf-8-sig"))
        except UnicodeDecodeError as error:
            raise DataError(f"{path}: byte {error.start} is not UTF-8; save the file as UTF-8") from error
        except json.JSONDecodeError as error:
            raise DataError(f"{path}:{error.lineno}: not valid JSON ({error.msg}, column {error.colno})") from error
        self._rows: list[Row] = rows
        self._digest = hashlib.sha256(content).hexdigest()
        for index, row in enumerate(rows):
            if not isinstance(row, dict):
                raise DataError(f"{self.where(index)}: is {_kind(row)}; each item must be an object with the columns")

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
        head = bytes(_mapped(path)[:4096]).removeprefix(BOM).lstrip()
        if head.startswith(b"["):
            return JsonArray(path)
    return JsonLines(path)


def _check_line(line: bytes, where: str) -> None:
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: byte {error.start + 1} of the line is not UTF-8; save the file as UTF-8") from error
    except json.JSONDecodeError as error:
        raise DataError(
            f"{where}: not a JSON object ({error.msg}, column {error.colno}); one object per line"
        ) from error
    except RecursionError as error:
        raise DataError(f"{where}: not a JSON object that can be read (nested too deeply)") from error
    if not isinstance(row, dict):
        raise DataError(f"{where}: is {_kind(row)}; each line must be a JSON object with the columns")


def _kind(value: object) -> str:
    names = {list: "a list", str: "a string", bool: "a boolean", int: "a number", float: "a number", type(None): "null"}
    return names.get(type(value), type(value).__name__)


def _mapped(path: Path) -> mmap.mmap | bytes:
    """The bytes of a file without holding them in memory; a gzipped file is unpacked into an unnamed temporary file."""
    try:
        if path.suffix != ".gz":
            with path.open("rb") as file:
                return _map_file(file)
        with gzip.open(path, "rb") as packed, tempfile.TemporaryFile() as unpacked:
            shutil.copyfileobj(packed, unpacked, 1 << 20)
            unpacked.flush()
            return _map_file(unpacked)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path}: not a complete gzip file ({error}); make or fetch it again") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error


def _map_file(file: Any) -> mmap.mmap | bytes:
    file.seek(0, 2)
    if file.tell() == 0:
        return b""  # an empty file cannot be mapped
    return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
