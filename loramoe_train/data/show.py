"""`loramoe-data`: what the model will really see, and how long and how often."""

from collections.abc import Sequence
from typing import Any
from unicodedata import category

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from loramoe_train.data.build import build_mixture
from loramoe_train.data.mixture import Mixture
from loramoe_train.data.tokens import Example
from loramoe_train.schema.data import DataConfig

MEASURED = 2_000  # rows per task whose lengths are measured, at equal distances
SUPERVISED, PROMPT = "bold green", "dim"


def show_data(
    config: DataConfig,
    tokenizer: Any,
    n: int = 2,
    ids: bool = False,
    console: Console | None = None,
    *,
    seed: int = 0,
    max_positions: int | None = None,
    total: int | None = None,
) -> None:
    """Print n processed examples of each task, token lengths, and how often each task is drawn.

    Args:
        config: the data group with its task definitions filled in.
        n: examples of each task, from the beginning of its rows.
        ids: print each token with its id instead of running text.
        total: samples of the stage (strategy `schedule` needs it); default: one epoch.

    Raises ConfigError, MissingFileError, DataError, as training on this data would.
    """
    console = console or Console()
    mixture = build_mixture(config, tokenizer, seed=seed, max_positions=max_positions)
    for task, data in enumerate(mixture.tasks):
        console.rule(f"{escape(data.name)}  (domain {escape(data.domain)}, {len(data):,} rows)")
        for row in range(min(n, len(data))):
            example = mixture.example(task, row)
            console.print(Text(f"{example.name}  {data.rows.where(row)}  {_tokens(example)}", style="italic"))
            console.print(coloured(example, tokenizer, ids=ids), soft_wrap=True)
            console.print()
    console.print(f"[{SUPERVISED}]this colour carries loss[/], [{PROMPT}]this is only read[/]")
    console.print(length_table(mixture))
    console.print(sampling_table(mixture, config, total=total))
    for note in mixture.notes:
        console.print(Text(f"note: {note}"))


def coloured(example: Example, tokenizer: Any, *, ids: bool) -> Text:
    """The example's text, the part that carries loss in colour; with `ids` token by token, each with its number."""
    text = Text()
    if ids:
        for number, supervised in zip(example.ids.tolist(), example.supervised.tolist(), strict=True):
            token = tokenizer.decode([number])
            text.append(f"{token!r}:{number} ", style=SUPERVISED if supervised else PROMPT)
        return text
    # decoded by stretches: one token need not be a whole character
    edges = [0, *(np.flatnonzero(np.diff(example.supervised)) + 1).tolist(), len(example)]
    for begin, end in zip(edges[:-1], edges[1:], strict=True):
        stretch = tokenizer.decode(example.ids[begin:end].tolist(), clean_up_tokenization_spaces=False)
        text.append(_harmless(stretch), style=SUPERVISED if example.supervised[begin] else PROMPT)
    return text


def _harmless(text: str) -> str:
    """Control characters spelled out, but for tabs and line breaks: a terminal would obey what a row says."""
    return "".join(c if category(c) != "Cc" or c in "\t\n" else c.encode("unicode_escape").decode() for c in text)


def length_table(mixture: Mixture) -> Table:
    """Token lengths per task, over at most MEASURED rows of each."""
    columns = ("task", "rows", "measured", "mean", "median", "p95", "max", "loss", "truncated")
    table = _table("tokens per example", columns)
    for task, data in enumerate(mixture.tasks):
        measured = min(len(data), MEASURED)
        examples = [mixture.example(task, index * len(data) // measured) for index in range(measured)]
        lengths = np.array([len(example) for example in examples])
        share = sum(int(example.supervised.sum()) for example in examples) / lengths.sum()
        cut = sum(example.truncated for example in examples)
        numbers = (lengths.mean(), np.median(lengths), np.percentile(lengths, 95), lengths.max())
        table.add_row(
            escape(data.name),
            f"{len(data):,}",
            f"{measured:,}",
            *(f"{number:.0f}" for number in numbers),
            f"{share:.0%}",
            f"{cut:,}",
        )
    return table


def sampling_table(mixture: Mixture, config: DataConfig, *, total: int | None = None) -> Table:
    """How often each task is drawn in one epoch (as many samples as the mixture has rows), or in `total` samples."""
    drawn = total or sum(mixture.sizes.values())
    plan = mixture.plan(config.sampling, total=drawn)
    counts, repeats = plan.counts(drawn), plan.repeats(drawn)
    title = f"sampling: {config.sampling.strategy}, {drawn:,} samples"
    table = _table(title, ("task", "domain", "rows", "share", "samples", "passes"))
    for data in mixture.tasks:
        name = data.name
        shares = f"{counts[name] / drawn:.1%}"
        cells = (escape(name), escape(data.domain), f"{len(data):,}", shares)
        table.add_row(*cells, f"{counts[name]:,}", f"{repeats[name]:.2f}")
    return table


def _table(title: str, columns: Sequence[str]) -> Table:
    table = Table(title=title, box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in columns:
        table.add_column(column, justify="left" if column in ("task", "domain") else "right", no_wrap=True)
    return table


def _tokens(example: Example) -> str:
    cut = ", cut to fit" if example.truncated else ""
    return f"{len(example)} tokens, {int(example.supervised.sum())} with loss{cut}"
