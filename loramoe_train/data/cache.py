"""Tokenised examples on disk: what one run has encoded the next one reads, mapped, without the tokenizer.

A folder holds rows of one file under one key, a digest of all that turns a row into tokens: the file's bytes, the
task's templates, the tokenizer, the maximal length, and the code that does it (so nobody has to remember a version).
Nothing is encoded for the cache's sake: a row is added when a run has encoded it anyway, so the first step comes as
soon as without a cache however long the file is, and a run that draws a tenth of a file stores a tenth. The folder
also remembers for which rows every template has been rendered without complaint, so that this is not done again.

Rows are written in shards of a few thousand under names that no two processes share; so any number of processes may
read and write a folder at the same time. A shard that is damaged is passed over, and its rows are encoded again. Any
folder may be deleted at any time.
"""

import hashlib
import json
import os
import weakref
from contextlib import suppress
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

from loramoe_train.data import templates, tokens
from loramoe_train.data.shards import SUFFIX, Found, Shard, as_shard, read_shard, write_shard
from loramoe_train.errors import ConfigError
from loramoe_train.schema.data import TaskConfig

SHARD_ROWS = 4096  # rows that a process collects before it writes them
MAX_SHARDS = 8  # more are merged into one when the folder is opened


class TokenCache:
    """The rows of one key. What is added is written when there is enough of it, and when the process ends.

    A disk that is full or gone only means that nothing more is stored.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._shards: dict[Path, Shard] = {}
        self._added: dict[int, Found] = {}
        with suppress(OSError):
            _read_new(folder, self._shards)
            if len(self._shards) > MAX_SHARDS:
                self._merge()
        weakref.finalize(self, _write_added, folder, self._shards, self._added)

    def get(self, row: int) -> Found | None:
        """What is stored for the row with this number in its file."""
        found = (shard.find(row) for shard in self._shards.values())
        return next((hit for hit in found if hit is not None), None)

    def add(self, row: int, found: Found) -> None:
        self._added[row] = found
        if len(self._added) >= SHARD_ROWS:
            self.flush()

    def flush(self) -> None:
        """Write what was added and is not there by now."""
        _write_added(self._folder, self._shards, self._added)

    def forget_added(self) -> None:
        """For a forked process: what was added before belongs to its parent, who writes it."""
        self._added.clear()

    def has_checked(self, rows: np.ndarray) -> bool:
        """Whether exactly these rows have been rendered without an error before."""
        return self._stamp(rows).is_file()

    def note_checked(self, rows: np.ndarray) -> None:
        with suppress(OSError):
            self._folder.mkdir(parents=True, exist_ok=True)
            self._stamp(rows).touch()

    def _stamp(self, rows: np.ndarray) -> Path:
        return self._folder / f"checked-{hashlib.sha256(rows.tobytes()).hexdigest()[:32]}"

    def _merge(self) -> None:
        old = dict(self._shards)
        path = write_shard(self._folder, list(old.values()))
        merged = read_shard(path)
        if merged is None:  # a disk that forgets at once: keep what there was
            return
        self._shards.clear()
        self._shards[path] = merged
        for path in old:
            path.unlink(missing_ok=True)  # who has it open goes on reading it


def _read_new(folder: Path, shards: dict[Path, Shard]) -> None:
    """Add the shards that are not known yet."""
    for path in sorted(folder.glob(f"*{SUFFIX}")):
        shard = None if path in shards else read_shard(path)
        if shard is not None:
            shards[path] = shard


def _write_added(folder: Path, shards: dict[Path, Shard], added: dict[int, Found]) -> None:
    """A function, not a method: it also runs when the cache object is gone."""
    if not added:
        return
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        _read_new(folder, shards)  # other processes may have written the same rows meanwhile
        new = {row: added[row] for row in added if all(shard.find(row) is None for shard in shards.values())}
        if new:
            write_shard(folder, [as_shard(new)])
            _read_new(folder, shards)
    added.clear()


def cache_folder(setting: str | None) -> Path | None:
    """The folder that `data.cache_dir` means, made if need be; None where there is, or can be, no cache.

    Raises ConfigError when a folder that was asked for by name cannot be made or written.
    """
    if setting is None:
        return None
    home = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    folder = home / "loramoe" / "tokens" if setting == "auto" else Path(setting).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        reason = "" if os.access(folder, os.W_OK | os.X_OK) else "no permission to write there"
    except OSError as error:
        reason = error.strerror or str(error)
    if reason and setting != "auto":
        raise ConfigError(f"data.cache_dir={setting} cannot be used: {reason}; give a folder, or null for no cache")
    return None if reason else folder


def cache_key(
    *, rows: str, task: TaskConfig, tokenizer: str, chat_template: Any, max_length: int, supervise: str
) -> str:
    """The name of a folder; `rows` is a digest of the file's content, `tokenizer` one of `tokenizer_digest`."""
    texts = {"format": task.format, "prompt": task.prompt, "answer": task.answer, "columns": task.columns}
    # some chat templates print today's date
    day = str(date.today()) if task.format == "messages" and "strftime_now" in str(chat_template) else None
    code = [hashlib.sha256(Path(str(module.__file__)).read_bytes()).hexdigest() for module in (templates, tokens)]
    return _digest([rows, texts, tokenizer, day, max_length, supervise, code])[:32]


def tokenizer_digest(tokenizer: Any) -> str | None:
    """A digest of what a tokenizer does to text, or None where only Python code of its own could tell."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or not type(tokenizer).__module__.startswith("transformers."):
        return None
    import jinja2
    import tokenizers
    import transformers

    # the state begins with truncation and padding, which every call sets anew
    _, _, rules = backend.to_str().partition('"added_tokens"')
    own = [type(tokenizer).__name__, rules, tokenizer.special_tokens_map, tokenizer.chat_template]
    options = getattr(tokenizer, "split_special_tokens", None)
    return _digest([*own, options, *(library.__version__ for library in (jinja2, tokenizers, transformers))])


def _digest(facts: Any) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()
