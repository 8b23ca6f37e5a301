"""A file of tokenised rows: flat arrays, mapped when read, with a checksum; written whole or not at all.

Layout: HEADER, then the six arrays of `Shard` in their order, little-endian, nothing between them. Legend: n rows, t
tokens of all rows together.
"""

import os
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

import numpy as np

SUFFIX = ".tokens"
HEADER = struct.Struct("<16s q q I 4x")  # name of the format, n, t, checksum of what follows
FORMAT = b"loramoe-tokens-1"
KINDS = ("<i8", "<i8", "<i8", "<i4", "?", "?")

Found = tuple[np.ndarray, np.ndarray, bool]  # ids (T,) int32, supervised (T,) bool, truncated, of one row


@dataclass(frozen=True, eq=False)
class Shard:
    """Row `rows[i]` has the tokens [starts[i], starts[i] + lengths[i])."""

    rows: np.ndarray  # (n,) int64, numbers of the rows in their file, ascending
    starts: np.ndarray  # (n,) int64
    lengths: np.ndarray  # (n,) int64
    ids: np.ndarray  # (t,) int32
    supervised: np.ndarray  # (t,) bool
    truncated: np.ndarray  # (n,) bool

    def find(self, row: int) -> Found | None:
        """Copies of what is stored for a row."""
        place = int(np.searchsorted(self.rows, row))
        if place == len(self.rows) or self.rows[place] != row:
            return None
        span = slice(int(self.starts[place]), int(self.starts[place] + self.lengths[place]))
        return np.array(self.ids[span]), np.array(self.supervised[span]), bool(self.truncated[place])


def as_shard(found: dict[int, Found]) -> Shard:
    """At least one row, as a shard in memory."""
    rows = sorted(found)
    ids, supervised, truncated = zip(*(found[row] for row in rows), strict=True)
    lengths = np.array([len(row) for row in ids], dtype=np.int64)
    starts = np.cumsum(lengths) - lengths
    cut = np.array(truncated, dtype=bool)
    return Shard(np.array(rows, dtype=np.int64), starts, lengths, np.concatenate(ids), np.concatenate(supervised), cut)


def read_shard(path: Path) -> Shard | None:
    """The mapped arrays of a file, or None if it is not a whole shard."""
    try:
        content = np.memmap(path, dtype=np.uint8, mode="r")
        name, n, t, checksum = HEADER.unpack(content[: HEADER.size].tobytes())
    except (OSError, ValueError, struct.error):
        return None
    body = content[HEADER.size :]
    if name != FORMAT or n < 0 or t < 0 or len(body) != 25 * n + 5 * t or zlib.crc32(body) != checksum:
        return None
    arrays, place = [], 0
    for kind, count in zip(KINDS, (n, n, n, t, t, n), strict=True):
        stop = place + count * np.dtype(kind).itemsize
        arrays.append(body[place:stop].view(kind))
        place = stop
    return Shard(*arrays)


def write_shard(folder: Path, parts: Sequence[Shard]) -> Path:
    """A new file with the rows of all parts (of a row that several have, the first). Raises OSError.

    Only the index is held in memory; the tokens go from the parts to the file.
    """
    rows, kept = np.unique(np.concatenate([part.rows for part in parts]), return_index=True)
    shifts = np.cumsum([0, *(len(part.ids) for part in parts)])[:-1]
    starts = np.concatenate([part.starts + shift for part, shift in zip(parts, shifts, strict=True)])
    lengths = np.concatenate([part.lengths for part in parts])
    truncated = np.concatenate([part.truncated for part in parts])
    tokens = [part.ids for part in parts] + [part.supervised for part in parts]
    arrays = [rows, starts[kept], lengths[kept], *tokens, truncated[kept]]
    flat = [np.ascontiguousarray(array).view(np.uint8) for array in arrays]
    checksum = 0
    for array in flat:
        checksum = zlib.crc32(array, checksum)
    path = folder / f"{uuid4().hex}{SUFFIX}"
    aside = path.with_suffix(".tmp")
    try:
        with aside.open("wb") as file:
            file.write(HEADER.pack(FORMAT, len(rows), sum(len(part.ids) for part in parts), checksum))
            for array in flat:
                file.write(array)
        os.replace(aside, path)  # not flushed to the disk first: what a crash cuts short fails its checksum
    finally:
        aside.unlink(missing_ok=True)
    return path
