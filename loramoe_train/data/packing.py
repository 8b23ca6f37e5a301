"""Which examples share a row, and which rows a forward pass: as little padding as the tokens of a step allow.

Both look at one optimizer step alone, so a step can be made without the ones before it and keeps its mix of tasks.
Padding is what a row lacks to the longest row of its forward pass. Attention costs the square of a row's length, for
the mask of a packed row is dense; so packed rows are made equally long, and no longer than little padding asks for.
"""

import heapq
from collections.abc import Sequence

import numpy as np

from loramoe_train.data.tokens import Example

# Tokens of a row whose dense attention costs as much as its linear layers: about six times the model's width.
DENSE_ATTENTION = 8192
EXACT = 128  # rows up to which the best cut is searched (that many squared, times the chunks)


def pack(examples: Sequence[Example], max_length: int) -> list[list[Example]]:
    """Rows of at most `max_length` tokens, about equally long; as many as make padding and attention cheapest."""
    assert all(len(example) <= max_length for example in examples), "the encoder cuts examples to max_length"
    total = sum(map(len, examples))
    number = total // max(map(len, examples))  # more rows than this cannot be full
    rows, width = _balanced(examples, number)
    while width > max_length:  # examples near the limit leave gaps that nothing fits into
        number += 1
        rows, width = _balanced(examples, number)
    best, least = rows, _cost(number, width)
    while number > 1:
        number = min(number - 1, number * 3 // 4)
        rows, width = _balanced(examples, number)
        if width > max_length:
            break
        if _cost(number, width) < least:
            best, least = rows, _cost(number, width)
    return best


def _cost(rows: int, width: int) -> int:
    return rows * width * (DENSE_ATTENTION + width)


def _balanced(examples: Sequence[Example], number: int) -> tuple[list[list[Example]], int]:
    """(`number` rows, tokens of the longest): the longest example first, always to the shortest row (Graham 1969)."""
    rows: list[list[Example]] = [[] for _ in range(number)]
    shortest = [(0, row) for row in range(number)]
    for example in sorted(examples, key=len, reverse=True):
        tokens, row = shortest[0]
        rows[row].append(example)
        heapq.heapreplace(shortest, (tokens + len(example), row))
    return rows, max(tokens for tokens, _ in shortest)


def cut(lengths: Sequence[int], chunks: int, *, ranks: int = 1, budget: int) -> list[int]:
    """Where to end each of `chunks` stretches of rows sorted by length, so that the padded tokens are the fewest.

    Every stretch is dealt to `ranks`, one row after the other, so it has a row for each and no rank gets more than
    `budget` tokens, padding included. Cutting by number of rows must be allowed by the budget.
    """
    count = len(lengths)
    if chunks == 1:
        return [count]
    if count == chunks * ranks:  # no choice
        return list(range(ranks, count + 1, ranks))
    if count > EXACT:
        half = chunks // 2
        middle = count * half // chunks
        first = cut(lengths[:middle], half, ranks=ranks, budget=budget)
        rest = cut(lengths[middle:], chunks - half, ranks=ranks, budget=budget)
        return first + [middle + end for end in rest]
    place = np.arange(count + 1)
    size = place[None, :] - place[:, None]  # rows from begin (first axis) to end (second axis)
    width = np.concatenate([[0], np.asarray(lengths, dtype=np.int64)])[None, :]
    allowed = (size >= ranks) & (-(-size // ranks) * width <= budget)
    never = np.iinfo(np.int64).max // 4
    cost = np.where(allowed, size * width, never)
    best, begins = cost[0], []
    for _ in range(chunks - 1):
        total = best[:, None] + cost
        begins.append(total.argmin(axis=0))
        best = np.minimum(total.min(axis=0), never)
    assert best[count] < never, "cutting by number of rows is within the budget"
    ends = [count]
    for begin in reversed(begins):
        ends.append(int(begin[ends[-1]]))
    return ends[::-1]
