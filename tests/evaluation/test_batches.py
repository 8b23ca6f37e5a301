"""What goes into one pass, and what happens where the memory does not suffice."""

from dataclasses import dataclass

import pytest
import torch

from loramoe_train.evaluation.batches import BatchSize, run_in_batches


@dataclass(frozen=True)
class Item:
    length: int
    rows: int = 1


def batches(lengths, size, run=lambda batch: None, rows=1):
    seen = []

    def note(batch):
        run(batch)
        seen.append([item.length for item in batch])

    run_in_batches([Item(length, rows) for length in lengths], size, note)
    return seen


def test_a_pass_holds_a_number_of_rows_or_of_tokens_the_longest_first():
    lengths = [3, 9, 1, 4, 2, 8]
    assert batches(lengths, BatchSize(rows=4)) == [[9, 8, 4, 3], [2, 1]]
    assert batches(lengths, BatchSize(tokens=12)) == [[9], [8], [4, 3, 2], [1]]
    assert batches(lengths, BatchSize(tokens=2)) == [[9], [8], [4], [3], [2], [1]]  # one item always
    assert batches(lengths, BatchSize(rows=4), rows=2) == [[9, 8], [4, 3], [2, 1]]
    assert batches([], BatchSize(rows=4)) == []


def full(tokens):
    """A device that holds a pass of that many tokens."""

    def run(batch):
        if len(batch) * batch[0].length > tokens:
            raise torch.OutOfMemoryError("out of memory")

    return run


@pytest.mark.parametrize("size", [BatchSize(rows=8), BatchSize(tokens=100)])
def test_a_batch_that_does_not_fit_is_halved_and_nothing_is_lost(size):
    lengths = [10, 9, 8, 7, 6, 5, 4, 3]
    seen = batches(lengths, size, full(25))
    assert [length for batch in seen for length in batch] == lengths
    assert all(len(batch) * batch[0] <= 25 for batch in seen) and len(seen) < len(lengths)
    assert len(batches(lengths, size, full(25))) == len(seen)  # what was learnt stays


def test_what_never_fits_is_an_error():
    with pytest.raises(torch.OutOfMemoryError):
        batches([10, 5], BatchSize(tokens=100), full(7))
    with pytest.raises(torch.OutOfMemoryError):  # processes that share a model out go in step
        batches([10, 5], BatchSize(tokens=100, halves=False), full(12))


def test_other_errors_come_out_at_once():
    calls = []

    def run(batch):
        calls.append(batch)
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes"):
        batches([10, 5], BatchSize(tokens=100), run)
    assert len(calls) == 1
