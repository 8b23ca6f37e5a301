"""DataConfig -> Mixture."""

from pathlib import Path
from typing import Any

from loramoe_train.data.cache import TokenCache, cache_folder, cache_key, tokenizer_digest
from loramoe_train.data.mixture import Mixture, TaskData
from loramoe_train.data.source import Selected, has_split, open_rows
from loramoe_train.data.templates import Renderer
from loramoe_train.data.tokens import Encoder
from loramoe_train.errors import ConfigError, nearest
from loramoe_train.schema.data import DataConfig, Split, TaskConfig


def build_mixture(
    config: DataConfig,
    tokenizer: Any,
    *,
    seed: int = 0,
    split: Split = "train",
    max_positions: int | None = None,
    check: bool = True,
) -> Mixture:
    """The tasks of `config` for one split, every row rendered once (unless `check` is false), tokenised when needed.

    A task without a validation split gives the last rows of its train split to validation: `split="train"` leaves them
    out, `split="validation"` holds them, and both say so in `notes`. Every task of the config keeps its index, also one
    without validation rows. `seed` enters the orders of `Mixture.plan`.

    Raises ConfigError (unknown task, `max_length` above `max_positions`, unusable `cache_dir`), MissingFileError,
    DataError.
    """
    if max_positions is not None and config.max_length > max_positions:
        raise ConfigError(
            f"data.max_length={config.max_length} exceeds the model's {max_positions} positions; "
            f"use at most {max_positions}"
        )
    encoder = Encoder(tokenizer, max_length=config.max_length, supervise=config.supervise)
    folder, digest = cache_folder(config.cache_dir), tokenizer_digest(tokenizer)
    tasks, notes = [], []
    for name in config.tasks:
        definition = task_definition(config, name)
        rows, used, note = task_rows(config, name, split)
        notes += note
        domain = definition.domain or name
        cache = _open_cache(config, definition, rows, tokenizer, folder, digest)
        tasks.append(TaskData(name, domain, used, rows, Renderer(name, definition, tokenizer), cache))
    if check:
        for task in tasks:
            task.check()
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else encoder.eos
    return Mixture(tasks, encoder, seed=seed, pad_id=pad_id, notes=notes)


def build_validation(
    config: DataConfig, tokenizer: Any, mixture: Mixture, *, batch_size: int
) -> tuple[dict[str, list[Any]], tuple[str, ...]]:
    """({task: its MixedBatches of at most `batch_size` examples}, notes): what the evaluation loss is measured on.

    `mixture` is the training mixture of the same config; task and domain ids are the same in both.
    """
    from loramoe_train.data.stage import validation_batches  # imports torch, which planning can do without

    validation = build_mixture(config, tokenizer, seed=mixture.seed, split="validation")
    assert validation.task_names == mixture.task_names and validation.domain_names == mixture.domain_names
    return validation_batches(validation, batch_size=batch_size)


def _open_cache(
    config: DataConfig, task: TaskConfig, rows: Selected, tokenizer: Any, folder: Path | None, digest: str | None
) -> TokenCache | None:
    if folder is None or digest is None or not len(rows):
        return None
    key = cache_key(
        rows=rows.digest(),
        task=task,
        tokenizer=digest,
        chat_template=tokenizer.chat_template,
        max_length=config.max_length,
        supervise=config.supervise,
    )
    return TokenCache(folder / key)


def task_definition(config: DataConfig, name: str) -> TaskConfig:
    """The definition of a task. Raises ConfigError with the nearest name when there is none."""
    if name not in config.definitions:
        raise ConfigError(f"data.tasks: no task is called '{name}'{nearest(name, config.definitions)}")
    return config.definitions[name]


def task_rows(config: DataConfig, name: str, split: Split) -> tuple[Selected, Split, list[str]]:
    """(rows, the split that they were read from, notes) of one task; needs no tokenizer. See `build_mixture`."""
    source = task_definition(config, name).source
    held_out = config.validation_examples > 0 and not has_split(source, "validation", config.root)
    if split == "train":
        rows = open_rows(name, source, "train", config.root)
        notes = []
        if held_out:
            kept = _held_out(rows, config)
            rows = rows.select(range(len(rows) - kept))
            notes = [f"{name} has no validation split: the last {kept} of its train rows are held out for it"]
        return _limited(rows, config, name), "train", notes
    if split == "validation":
        if config.validation_examples == 0:
            return Selected(_Nothing(), []), "validation", []
        if held_out:
            rows = open_rows(name, source, "train", config.root)
            kept = _held_out(rows, config)
            notes = [f"{name} has no validation split: measured on the last {kept} of its train rows"]
            return rows.select(range(len(rows) - kept, len(rows))), "train", notes
        rows = open_rows(name, source, "validation", config.root)
        return _spread(_limited(rows, config, name), config.validation_examples), "validation", []
    return _limited(open_rows(name, source, split, config.root), config, name), split, []


def _held_out(rows: Selected, config: DataConfig) -> int:
    """Rows that a task without validation split gives away: never more than a tenth, for small tasks need theirs."""
    return min(config.validation_examples, len(rows) // 10)


def _limited(rows: Selected, config: DataConfig, task: str) -> Selected:
    """At most `max_examples` rows, at equal distances."""
    limits = config.max_examples
    limit = limits.get(task) if isinstance(limits, dict) else limits
    return rows if limit is None else _spread(rows, limit)


def _spread(rows: Selected, count: int) -> Selected:
    """`count` rows at equal distances: files are often sorted by topic or label."""
    count = min(count, len(rows))
    return rows.select([index * len(rows) // count for index in range(count)])


class _Nothing:
    def __len__(self) -> int:
        return 0

    def __getitem__(self, index: int) -> dict[str, Any]:
        raise IndexError(index)

    def where(self, index: int) -> str:
        raise IndexError(index)
