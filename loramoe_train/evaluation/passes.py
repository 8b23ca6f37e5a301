"""Forward passes over rows of token ids that compute logits where an answer is predicted, and nowhere else.

Legend: B rows, S positions, V vocabulary, K predicted positions.
"""

import inspect
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

Reading = Callable[[Tensor], AbstractContextManager[Any]]  # from the (B, S) ids of a pass without a cache


@dataclass
class Row:
    """What the model reads for one or several requests: a context and an answer without its last token."""

    ids: list[int]
    context: int  # tokens before the longest answer
    asked: list[tuple[int, list[int]]] = field(default_factory=list)  # (number of the request, its answer)

    rows = 1

    @property
    def length(self) -> int:
        return len(self.ids)

    @property
    def predicted(self) -> int:
        """At how many positions, the last ones, something is predicted."""
        return len(self.ids) - self.context + 1


Places = list[tuple[Row, Sequence[int]]]  # which of K positions are a row's


def plain_pass(model: nn.Module, rows: Sequence[Row], reading: Reading | None = None) -> tuple[Tensor, Places]:
    """Logits (K, V) of rows by themselves, with zeros behind them, and where among them each row's are."""
    ids_BS = padded([row.ids for row in rows], model.device)
    wanted_BS = torch.zeros_like(ids_BS, dtype=torch.bool)
    for number, row in enumerate(rows):
        wanted_BS[number, row.context - 1 : row.length] = True
    with nullcontext() if reading is None else reading(ids_BS):
        logits_KV = logits_at(wanted_BS, model, input_ids=ids_BS, use_cache=False)
    places: Places = []
    start = 0
    for row in rows:
        places.append((row, range(start, start + row.predicted)))
        start += row.predicted
    return logits_KV, places


def logits_at(wanted_BS: Tensor, model: nn.Module, **inputs: Any) -> Tensor:
    """(K, V): the logits at the wanted positions, row after row."""
    if accepts(model, "logits_to_keep"):
        logits = model(**inputs, logits_to_keep=wanted_BS).logits
    else:
        logits = model(**{name: value for name, value in inputs.items() if accepts(model, name)}).logits
    return logits if logits.dim() == 2 else logits[wanted_BS]


def accepts(model: nn.Module, name: str) -> bool:
    """Whether the model's forward has that argument, and it means what it means in transformers."""
    owner = next(kind for kind in type(model).__mro__ if "forward" in vars(kind))
    known = owner.__module__.startswith("transformers.models.")  # not code that came with a checkpoint
    return name == "input_ids" or (known and name in inspect.signature(owner.forward).parameters)


def padded(rows: Sequence[Sequence[int]], device: Any) -> Tensor:
    """(B, S) int64 ids, zeros behind each row."""
    longest = max(len(row) for row in rows)
    return torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows], device=device)
