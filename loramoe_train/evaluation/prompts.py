"""Where the prompts of a batch of likelihood requests end, which lm-eval does not tell the model that it calls.

It calls with the rows `(prompt + answer)[:-1]`, zeros behind them, in an order and grouping of its own; so a row is
recognised by its tokens. Legend: B rows, S positions, N = B * S.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from loramoe_train.routing.types import Tokens


class KnownPrompts:
    """What is known about the requests that are about to be run."""

    def __init__(self, requests: Sequence[Any], max_length: int) -> None:
        """`requests`: lm-eval's (texts, prompt ids, answer ids); rows are cut on the left to `max_length` tokens."""
        self._known: dict[tuple[int, ...], tuple[int, int]] = {}  # row -> (tokens of its prompt, of all)
        for _, prompt, answer in requests:
            row = (prompt + answer)[-(max_length + 1) :][:-1]
            sizes = len(row) + 1 - len(answer), len(row)
            key = _unpadded(row)
            self._known[key] = min(sizes, self._known.get(key, sizes))  # a row read in two ways shows the least

    def tokens(self, ids_BS: Tensor) -> Tokens:
        """The facts for the routing context: a row is an example, its answer is what carries loss; no task is known."""
        device, (rows, length) = ids_BS.device, ids_BS.shape
        sizes_B2 = torch.tensor([self._known[_unpadded(row)] for row in ids_BS.tolist()], device=device)
        position_S = torch.arange(length, device=device)
        prompt_BS, valid_BS = (position_S < size_B[:, None] for size_B in sizes_B2.unbind(dim=1))
        row_BS = torch.arange(rows, device=device)[:, None].expand(rows, length)
        nobody_N = torch.full((rows * length,), -1, device=device)
        return Tokens(
            valid_N=valid_BS.reshape(-1),
            task_N=nobody_N,
            domain_N=nobody_N,
            supervised_N=(valid_BS & ~prompt_BS).reshape(-1),
            sample_N=row_BS.masked_fill(~valid_BS, -1).reshape(-1),
            num_samples=rows,
        )


def _unpadded(row: Sequence[int]) -> tuple[int, ...]:
    """A row without the zeros at its end, be they padding or tokens."""
    length = len(row)
    while length and row[length - 1] == 0:
        length -= 1
    return tuple(row[:length])
