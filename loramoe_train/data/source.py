"""Where the rows of a task come from: a file below `data.root`, or a data set of the hub.

`open_rows` gives an indexable view that does not hold the rows in memory (mapped lines, or Arrow through `datasets`),
filtered by `source.keep`, that knows for each row where it stands, so that every later error can say file and line.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from loramoe_train.data.lines import Row, read_json
from loramoe_train.data.templates import Predicate
from loramoe_train.errors import ConfigError, DataError, MissingFileError, nearest
from loramoe_train.paths import ASSETS
from loramoe_train.schema.data import SourceConfig

PACKAGE_SCHEME = "package://"
JSON_SUFFIXES = (".json", ".jsonl", ".json.gz", ".jsonl.gz")
SUFFIXES = (*JSON_SUFFIXES, ".parquet")


class Rows(Protocol):
    """Rows that can be asked for in any order."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Row: ...

    def where(self, index: int) -> str:
        """`file:line`, or what comes nearest to it, for messages."""
        ...

    def digest(self) -> str:
        """Of all rows: another digest where any row may be another."""
        ...


class ArrowRows:
    """Rows of a `datasets.Dataset`, as they are stored. Nothing is decoded, however deep it lies: no template needs an
    image, and decoding one may open whatever file or address a row names."""

    def __init__(self, dataset: Any, name: str) -> None:
        self._dataset, self._name, self._fingerprint = dataset.with_format("arrow"), name, dataset._fingerprint

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> Row:
        from pyarrow import ArrowException

        try:
            (row,) = self._dataset[int(index)].to_pylist()
        except (ArrowException, ValueError, OverflowError, UnicodeDecodeError) as error:  # e.g. a date of year 30000
            raise DataError(f"{self.where(index)}: holds a value that cannot be read ({_first_line(error)})") from error
        return row

    def where(self, index: int) -> str:
        return f"{self._name} (row {index + 1})"

    def digest(self) -> str:
        return f"datasets:{self._fingerprint}"  # of its files (path, time, size) and of what was done to it


class Selected:
    """Some rows of others, in the given order; `origin[i]` is the number of the row in its file, from 0."""

    def __init__(self, rows: Rows, origin: Sequence[int]) -> None:
        self._rows, self.origin = rows, np.asarray(origin, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.origin)

    def __getitem__(self, index: int) -> Row:
        return self._rows[int(self.origin[index])]

    def where(self, index: int) -> str:
        return self._rows.where(int(self.origin[index]))

    def digest(self) -> str:
        """Of the file, whichever of its rows are selected."""
        return self._rows.digest()

    def select(self, index: Sequence[int]) -> "Selected":
        return Selected(self._rows, self.origin[np.asarray(index, dtype=np.int64)])


def has_split(source: SourceConfig, split: str, root: str | None) -> bool:
    """Whether the task declares this split in the place that it would be read from."""
    return split in (source.files if _is_local(source, split, root) else source.splits)


def local_file(source: SourceConfig, split: str, root: str | None) -> Path | None:
    """The file that `open_rows` would read (`x.jsonl` stands for `x.jsonl.gz` too), or None when it asks the hub."""
    if not _is_local(source, split, root) or split not in source.files:
        return None
    path = Path(source.files[split]).expanduser()
    if not path.is_absolute() and root is not None:
        path = resolve_root(root) / path
    packed = path.with_name(path.name + ".gz")
    plain = path.with_suffix("") if path.suffix == ".gz" else packed
    return next((candidate for candidate in (path, packed, plain) if candidate.is_file()), path)


def resolve_root(root: str) -> Path:
    """`data.root` as a folder; `package://x` is folder x inside the installed package."""
    if root.startswith(PACKAGE_SCHEME):
        return ASSETS.parent / root.removeprefix(PACKAGE_SCHEME)
    return Path(root).expanduser()


def open_rows(task: str, source: SourceConfig, split: str, root: str | None) -> Selected:
    """The rows of `task` for `split` that `source.keep` keeps.

    Raises MissingFileError for an absent file or a data set that cannot be had offline, DataError for malformed rows or
    none, ConfigError for a split that the task does not have or a broken `keep`.
    """
    if not has_split(source, split, root):
        raise ConfigError(_no_split(task, source, split, root))
    path = local_file(source, split, root)
    if path is not None and root is None and not path.is_absolute():
        raise ConfigError(f"data.root is null; set it to the folder that holds {source.files[split]} of task {task}")
    rows = _open_hub(task, source, split) if path is None else _open_file(task, source, split, path)
    place = source.hub if path is None else path
    if len(rows) == 0:
        raise DataError(f"{place}: has no rows (task {task}, split {split})")
    if source.keep is None:
        return Selected(rows, np.arange(len(rows)))
    keep = Predicate(source.keep, key=f"data.definitions.{task}.source.keep")
    kept = np.fromiter((i for i in range(len(rows)) if keep(rows[i], rows.where(i))), dtype=np.int64)
    if not len(kept):
        raise DataError(f"{place}: none of its {len(rows)} rows passes source.keep={source.keep!r} of task {task}")
    return Selected(rows, kept)


def _is_local(source: SourceConfig, split: str, root: str | None) -> bool:
    """A task with files is local when there is a root, or when the file needs none; a task without files never is."""
    if not source.files:
        return False
    if root is not None or source.hub is None:
        return True
    named = source.files.get(split)
    return named is not None and Path(named).expanduser().is_absolute()


def _no_split(task: str, source: SourceConfig, split: str, root: str | None) -> str:
    local = _is_local(source, split, root)
    known = source.files if local else source.splits
    if not source.files and source.hub is None:
        return f"data.definitions.{task}.source names neither hub nor files; give one of them"
    what = f"files (data.root={root})" if local else f"splits of {source.hub}"
    has = ", ".join(known) or "none"
    hint = f"; without data.root it is read from {source.hub}" if local and split in source.splits else ""
    return f"data.definitions.{task}.source has no '{split}' among its {what}; it has {has}{hint}"


def _open_file(task: str, source: SourceConfig, split: str, path: Path) -> Rows:
    if not path.is_file():
        raise MissingFileError(_missing(task, source, split, path))
    if path.name.endswith(JSON_SUFFIXES):
        return read_json(path)
    if path.suffix != ".parquet":
        raise ConfigError(
            f"data.definitions.{task}.source.files.{split}={source.files[split]}: unknown kind of file; "
            f"give one of {', '.join(SUFFIXES)}"
        )
    return _open_parquet(path)


def _missing(task: str, source: SourceConfig, split: str, path: Path) -> str:
    if path.is_dir():
        return f"{path} (task {task}, split {split}) is a folder, not a file; name the file in source.files.{split}"
    siblings = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    near = nearest(path.name, siblings) if siblings else ""
    fetch = f", or data.root=null to load {source.hub} from the hub" if source.hub and split in source.splits else ""
    where = "" if path.parent.is_dir() else f" (the folder {path.parent} does not exist)"
    return (
        f"{path} is missing{where}: task {task}, split {split}{near}; "
        f"set data.root to the folder that holds {source.files[split]}{fetch}"
    )


def _open_parquet(path: Path) -> Rows:
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError
    from pyarrow import ArrowException

    try:
        return ArrowRows(_quietly(load_dataset, "parquet", data_files=str(path), split="train"), str(path))
    except (ArrowException, DatasetGenerationError, ValueError, OSError) as error:
        cause = error.__cause__ or error
        raise DataError(f"{path}: not a readable parquet file ({_first_line(cause)})") from error


def _open_hub(task: str, source: SourceConfig, split: str) -> Rows:
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError

    name = source.hub if source.config is None else f"{source.hub}/{source.config}"
    hub_split = source.splits[split]  # type: ignore[index]
    wanted = source.files.get(split, f"{task}/{split}.jsonl")  # type: ignore[call-overload]
    try:
        dataset = _quietly(load_dataset, source.hub, source.config, split=hub_split)
    except (DatasetNotFoundError, OSError) as error:  # ConnectionError, FileNotFoundError and offline mode are OSErrors
        raise MissingFileError(
            f"data set {name}, split {hub_split} (task {task}) is not in the local cache and could not be fetched "
            f"({_first_line(error)}); on a machine with network run "
            f"`{_fetch_command(source)}`, or set data.root to a folder with {wanted}"
        ) from error
    except (ValueError, RuntimeError) as error:  # unknown configuration or split, or a data set that is a script
        key = f"data.definitions.{task}.source"
        raise ConfigError(f"{key}: {name}, split {hub_split} cannot be loaded ({_first_line(error)})") from error
    except DatasetGenerationError as error:
        raise DataError(
            f"data set {name} (task {task}) cannot be read ({_first_line(error.__cause__ or error)})"
        ) from error
    return ArrowRows(dataset, f"{name}:{hub_split}")


def _fetch_command(source: SourceConfig) -> str:
    # not `hf download`: offline, `datasets` looks for what it has prepared itself, not for downloaded files
    arguments = ", ".join(repr(part) for part in (source.hub, source.config) if part is not None)
    return f'python -c "from datasets import load_dataset; load_dataset({arguments})"'


def _quietly(call: Any, *arguments: Any, **options: Any) -> Any:
    """Run a `datasets` call without its progress bars, and leave its setting as it was."""
    from datasets.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        return call(*arguments, **options)
    finally:
        if shown:
            logging.enable_progress_bar()


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:200]
