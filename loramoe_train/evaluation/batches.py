"""Work in batches of bounded size, the longest first; a batch that does not fit into memory is halved.

A pass costs what its longest row costs times its rows, so sorted rows waste least on padding, and a bound on their
product suits short and long rows alike. What is too large shows in the first batch.
"""

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch


class Sized(Protocol):
    @property
    def length(self) -> int:
        """Tokens of its longest row."""

    @property
    def rows(self) -> int:
        """How many rows of a pass it takes."""


T = TypeVar("T", bound=Sized)


@dataclass
class BatchSize:
    """How much goes into one pass: at most `rows` rows, and at most `tokens` tokens with padding; one item always."""

    rows: int | None = None  # None: as many as `tokens` allows
    tokens: int | None = None
    halves: bool = True  # whether a batch that is too large for the memory is tried again in halves

    def count(self, items: Sequence[Sized]) -> int:
        """How many of the first items make a batch, if the first is the longest."""
        rows = 0
        for number, item in enumerate(items):
            rows += item.rows
            too_many = self.rows is not None and rows > self.rows
            if number and (too_many or (self.tokens is not None and rows * items[0].length > self.tokens)):
                return number
        return len(items)

    def halve(self, batch: Sequence[Sized]) -> None:
        """Allow half of what this batch held from now on: those to come are no longer than it."""
        rows = sum(item.rows for item in batch)
        if self.tokens is None:
            self.rows = max(rows // 2, 1)
        else:
            self.tokens = max(rows * batch[0].length // 2, 1)


def run_in_batches(items: Sequence[T], size: BatchSize, run: Callable[[Sequence[T]], None]) -> None:
    """`run` all items, sorted by length, in batches. What `run` yields must not count before it returns.

    Raises RuntimeError (`is_out_of_memory`) where not even one item fits.
    """
    items, start = sorted(items, key=lambda item: -item.length), 0
    while start < len(items):
        batch = items[start : start + size.count(items[start:])]
        if _fits(run, batch, last_chance=len(batch) == 1 or not size.halves):
            start += len(batch)
        else:
            size.halve(batch)
            _free()


def _fits(run: Callable[[Sequence[T]], None], batch: Sequence[T], *, last_chance: bool) -> bool:
    try:
        run(batch)
    except RuntimeError as error:
        if last_chance or not is_out_of_memory(error):
            raise
        return False  # out of here, so that no frame of the traceback holds on to what was computed
    return True


def is_out_of_memory(error: RuntimeError) -> bool:
    """torch.OutOfMemoryError is one; the CPU allocator raises the plain kind."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
