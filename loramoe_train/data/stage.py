"""The batches of one stage: plan samples -> this rank's micro-batches of each optimizer step.

Every rank looks at the whole step (lengths decide who gets what, and tokenising is cheap beside training), so no rank
needs to hear from another, and any step can be made without the ones before it.
"""

import multiprocessing
import os
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from loramoe_train.data.batch import MixedBatch
from loramoe_train.data.collate import collate, collate_packed
from loramoe_train.data.mixture import Mixture
from loramoe_train.data.packing import cut, pack
from loramoe_train.data.sampling import SamplePlan
from loramoe_train.data.tokens import Example
from loramoe_train.errors import ConfigError, LoramoeError

Row = list[Example]  # one row of a batch: one example, or several packed ones


class MixtureStage:
    """`training.parts.StageData` over a mixture and a plan.

    Step s takes samples [s * batch_size, (s + 1) * batch_size) of the plan. They are sorted by length (stable) and cut
    into as few micro-batches as `micro_batch_size` rows in each would take; where to cut is chosen for little padding,
    so short rows come in greater number and long ones in smaller, but no micro-batch has more tokens, padding included,
    than `micro_batch_size` rows of the step's longest. Every stretch of lengths is dealt out to all ranks, so that they
    wait little for each other. With packing the samples first share rows of about equal length (see `packing.pack`),
    and a micro-batch has at most the tokens of `micro_batch_size` rows of `max_length`. A step keeps the planned mix of
    tasks; a micro-batch of similar lengths may lean to one task, so auxiliary losses should take their statistics over
    the step.

    Args:
        batch_size: examples per step over all ranks.
        micro_batch_size: rows per forward pass and rank, on average and as far as tokens go (see above).
        packing, max_length: several examples per row of at most so many tokens.
        num_workers: worker processes that prepare later steps meanwhile; the batches are the same.
        multiple: pad rows to a multiple of so many tokens.
    """

    def __init__(
        self,
        mixture: Mixture,
        plan: SamplePlan,
        *,
        batch_size: int,
        micro_batch_size: int,
        packing: bool = False,
        max_length: int | None = None,
        num_workers: int = 0,
        multiple: int = 1,
    ) -> None:
        if packing and max_length is None:
            raise ConfigError("data.packing=true needs data.max_length, the number of tokens of a row")
        self.mixture, self.plan = mixture, plan
        self._batch_size, self._micro_batch_size = batch_size, micro_batch_size
        self._row_tokens = max_length if packing else None
        self._num_workers, self._multiple = num_workers, multiple

    def steps(self, *, start: int, stop: int, rank: int = 0, world_size: int = 1) -> Iterator[list[MixedBatch]]:
        """For each step of [start, stop), the micro-batches of `rank`; their number is the same on every rank.

        Raises ConfigError when the batch cannot be shared among the ranks, DataError for a row that cannot be used.
        """
        check_batch_size(self._batch_size, self._micro_batch_size, world_size)
        made = _Steps(self, start, stop, rank, world_size)
        # No thread that prepares the next step while this one is computed: it takes the interpreter's lock from whoever
        # launches the operations, and was measured on a CPU to cost what it saves (0.99 to 1.02 of the time without).
        if self._num_workers == 0:
            return (self._deliver(made[index]) for index in range(len(made)))
        return self._in_workers(made)

    def examples(self, step: int) -> list[Example]:
        """The examples of a step, in plan order."""
        first = step * self._batch_size
        return [self.mixture.example(*sample) for sample in self.plan.slice(first, first + self._batch_size)]

    def micro_batches(self, examples: list[Example], *, rank: int, world_size: int) -> list[MixedBatch]:
        """This rank's share of a step's examples."""
        return [self._batch(rows[rank::world_size]) for rows in self._stretches(examples, world_size)]

    def _stretches(self, examples: list[Example], world_size: int) -> list[list[Row]]:
        """The step's rows from short to long; rank r's c-th micro-batch has every world_size-th row of stretch c."""
        if self._row_tokens is None:
            rows = [[example] for example in examples]
            number = num_chunks(len(rows), self._micro_batch_size, world_size)
            budget = self._micro_batch_size * max(map(len, examples))
        else:
            rows = pack(examples, self._row_tokens)
            budget = self._micro_batch_size * self._row_tokens
            width = max(map(_tokens, rows))
            number = num_chunks(len(rows), budget // width, world_size)
            rows = _split_rows(rows, number)
        rows.sort(key=_tokens)
        ends = cut([_tokens(row) for row in rows], number // world_size, ranks=world_size, budget=budget)
        return [rows[begin:end] for begin, end in zip([0, *ends[:-1]], ends, strict=True)]

    def _batch(self, rows: list[Row]) -> MixedBatch:
        pad_id, multiple = self.mixture.pad_id, self._multiple
        if self._row_tokens is not None:
            return collate_packed(rows, pad_id=pad_id, multiple=multiple)
        return collate([row[0] for row in rows], pad_id=pad_id, multiple=multiple)

    def _in_workers(self, made: "_Steps") -> Iterator[list[MixedBatch]]:
        if "fork" not in multiprocessing.get_all_start_methods():
            raise ConfigError(f"trainer.num_workers={self._num_workers}: this system cannot fork processes; use 0")
        loader = DataLoader(
            made,
            batch_size=None,
            num_workers=self._num_workers,
            multiprocessing_context="fork",  # mapped files, templates and memo are shared, not sent
            worker_init_fn=self._begin_worker,
            collate_fn=_as_is,
            # without its own generator a loader draws from the global one and so changes dropout
            generator=torch.Generator().manual_seed(0),
        )
        return (self._deliver(result) for result in loader)

    def _begin_worker(self, worker: int) -> None:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # else the tokenizers library warns about the fork
        self.mixture.begin_worker()

    def _deliver(self, result: "_Result") -> list[MixedBatch]:
        batches, truncated, error = result
        self.mixture.note_truncated(truncated)
        if error is not None:
            raise error
        return batches


_Result = tuple[list[MixedBatch], list[Example], LoramoeError | None]  # micro-batches, truncated examples, failure


class _Steps(Dataset):
    """The steps as a data set, so that torch's workers can make them."""

    def __init__(self, stage: MixtureStage, start: int, stop: int, rank: int, world_size: int) -> None:
        self._stage, self._start, self._stop = stage, start, stop
        self._rank, self._world_size = rank, world_size

    def __len__(self) -> int:
        return max(self._stop - self._start, 0)

    def __getitem__(self, index: int) -> _Result:
        try:
            examples = self._stage.examples(self._start + index)
            batches = self._stage.micro_batches(examples, rank=self._rank, world_size=self._world_size)
        except LoramoeError as error:
            # handed over as a value: a worker's exception would arrive with a traceback in its message
            return [], [], error
        return batches, [example for example in examples if example.truncated], None


def validation_batches(
    mixture: Mixture, *, batch_size: int, multiple: int = 1
) -> tuple[dict[str, list[MixedBatch]], tuple[str, ...]]:
    """({task: its batches, sorted by length}, notes) of a mixture built with `split="validation"`.

    Task and domain ids equal those of the training mixture of the same config; a task without rows is left out.
    """
    batches: dict[str, list[MixedBatch]] = {}
    for task, data in enumerate(mixture.tasks):
        if len(data) == 0:
            continue
        examples = sorted((mixture.example(task, row) for row in range(len(data))), key=len)
        cut = [examples[first : first + batch_size] for first in range(0, len(examples), batch_size)]
        batches[data.name] = [collate(part, pad_id=mixture.pad_id, multiple=multiple) for part in cut]
    return batches, mixture.notes


def num_chunks(rows: int, micro_batch_size: int, world_size: int) -> int:
    """Micro-batches of at most `micro_batch_size` rows in all, the fewest that give every rank as many."""
    return -(-rows // (micro_batch_size * world_size)) * world_size


def check_batch_size(batch_size: int, micro_batch_size: int, world_size: int) -> None:
    """Raises ConfigError unless every rank can get as many micro-batches with an example in each."""
    if batch_size < world_size:
        raise ConfigError(
            f"trainer.batch_size={batch_size} is less than one example for each of {world_size} processes; "
            f"use at least {world_size}"
        )
    if num_chunks(batch_size, micro_batch_size, world_size) > batch_size:
        below = batch_size - batch_size % world_size
        raise ConfigError(
            f"trainer.batch_size={batch_size} cannot give {world_size} processes equally many micro-batches of one "
            f"example; use {below} or {below + world_size}, or trainer.micro_batch_size=2"
        )


def _split_rows(rows: list[Row], number: int) -> list[Row]:
    """Halve the fullest packed rows until there are `number`, so that no micro-batch is empty."""
    rows = list(rows)
    while len(rows) < number:
        fullest = max(range(len(rows)), key=lambda r: (len(rows[r]), -r))
        row = rows.pop(fullest)
        rows += [row[: len(row) // 2], row[len(row) // 2 :]]
    return rows


def _tokens(row: Row) -> int:
    return sum(len(example) for example in row)


def _as_is(result: Any) -> Any:
    return result
