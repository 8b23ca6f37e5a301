"""Log-likelihoods of answers after their contexts, with no more computed than is asked for.

For tokens x_1..x_n of which the last k are the answer, the result is sum_{i > n-k} log p(x_i | x_<i), and whether each
of them is the most probable. Three savings over running every request by itself, none of which changes a value beyond
rounding:

- Requests that read the same tokens (answers of one token after the same context) share a row.
- Logits are computed where an answer is predicted, and nowhere else.
- Answers of several tokens after the same context share its pass: the context is read once into a key-value cache,
  the answers go on from there. Only where every layer keeps plain keys and values (`longest_shared`).

Log-softmax and sums are taken in the dtype of the logits, as lm-eval does. Legend: B rows, S positions, V vocabulary,
K predicted positions, C contexts.
"""

import inspect
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from loramoe_train.evaluation.batches import BatchSize, run_in_batches

Answer = tuple[float, bool]  # log-likelihood, is it what greedy decoding would write
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


@dataclass
class Family:
    """Rows that go on from the same context."""

    context: list[int]
    members: list[Row]

    @property
    def rows(self) -> int:
        return len(self.members)

    @property
    def length(self) -> int:
        return max(row.length for row in self.members)


def log_likelihoods(
    model: nn.Module,
    requests: Sequence[tuple[list[int], list[int]]],
    *,
    max_length: int,
    size: BatchSize,
    reading: Reading | None,
    done: Callable[[int, Answer], None],
) -> list[Answer]:
    """Answer every request, in the order given.

    Args:
        model: a transformers causal language model, in evaluation mode.
        requests: (context, answer) as token ids, neither empty; contexts are cut on the left to what fits.
        max_length: tokens that the model reads at most.
        reading: around every pass, where the model must be told what it reads; then no context is shared.
        done: told the number of a request and its answer as soon as that is there.
    """
    found: dict[int, Answer] = {}

    def keep(logits_KV: Tensor, rows: Iterable[tuple[Row, Sequence[int]]]) -> None:
        for number, answer in _read_off(logits_KV, rows):
            found[number] = answer
            done(number, answer)

    rows = _rows(requests, max_length)
    families, alone = _families(rows, 0 if reading is not None else longest_shared(model))
    run_in_batches(families, size, lambda batch: keep(*_shared_pass(model, batch)))
    run_in_batches(alone, size, lambda batch: keep(*_plain_pass(model, batch, reading)))
    return [found[number] for number in range(len(requests))]


def _rows(requests: Sequence[tuple[list[int], list[int]]], max_length: int) -> list[Row]:
    rows: dict[tuple[int, ...], Row] = {}
    for number, (context, answer) in enumerate(requests):
        ids = (context + answer)[-(max_length + 1) : -1]  # the last token is only predicted
        start = len(ids) + 1 - len(answer)
        row = rows.setdefault(tuple(ids), Row(ids, start))
        row.context = min(row.context, start)
        row.asked.append((number, answer))
    return list(rows.values())


def _families(rows: Sequence[Row], limit: int) -> tuple[list[Family], list[Row]]:
    """Rows that shall share a context of at most `limit` tokens with the answer, and those that go by themselves."""
    together: dict[tuple[int, ...], list[Row]] = {}
    for row in rows:
        together.setdefault(tuple(row.ids[: row.context]), []).append(row)
    families, alone = [], []
    for context, members in together.items():
        family = Family(list(context), members)
        # what is saved must be worth a second pass
        if len(members) > 1 and len(context) * (len(members) - 1) >= 16 and family.length <= limit:
            families.append(family)
        else:
            alone.extend(members)
    return families, alone


# -- passes ------------------------------------------------------------------------------------------------------------


def _plain_pass(
    model: nn.Module, rows: Sequence[Row], reading: Reading | None
) -> tuple[Tensor, list[tuple[Row, range]]]:
    """Logits (K, V) of rows by themselves, zeros behind them, and where among them each row's are."""
    ids_BS = _padded([row.ids for row in rows], model.device)
    wanted_BS = torch.zeros_like(ids_BS, dtype=torch.bool)
    for number, row in enumerate(rows):
        wanted_BS[number, row.context - 1 : row.length] = True
    if reading is None:
        logits_KV = _logits(model, wanted_BS, input_ids=ids_BS, use_cache=False)
    else:
        with reading(ids_BS):
            logits_KV = _logits(model, wanted_BS, input_ids=ids_BS, use_cache=False)
    places, start = [], 0
    for row in rows:
        places.append((row, range(start, start + row.predicted)))
        start += row.predicted
    return logits_KV, places


def _shared_pass(model: nn.Module, families: Sequence[Family]) -> tuple[Tensor, list[tuple[Row, list[int]]]]:
    """The same for families: their contexts, padded on the left, then all that goes on from them."""
    device = model.device
    longest = max(len(family.context) for family in families)
    padded = [[0] * (longest - len(family.context)) + family.context for family in families]
    lengths_C = torch.tensor([len(family.context) for family in families], device=device)
    position_CS = torch.arange(longest, device=device) - (longest - lengths_C)[:, None]
    mask_CS = (position_CS >= 0).long()
    output = model(
        input_ids=torch.tensor(padded, device=device),
        attention_mask=mask_CS,
        position_ids=position_CS.clamp(min=0),
        use_cache=True,
        logits_to_keep=1,
    )
    first_CV, cache = output.logits[:, -1], output.past_key_values
    longer = [(number, row) for number, family in enumerate(families) for row in family.members if row.predicted > 1]
    chosen_B = torch.tensor([number for number, _ in longer], device=device)
    cache.batch_select_indices(chosen_B)
    ids_BS = _padded([row.ids[row.context :] for _, row in longer], device)
    position_S = torch.arange(ids_BS.shape[1], device=device)
    wanted_BS = position_S < torch.tensor([row.predicted - 1 for _, row in longer], device=device)[:, None]
    rest_KV = _logits(
        model,
        wanted_BS,
        input_ids=ids_BS,
        attention_mask=torch.cat([mask_CS[chosen_B], torch.ones_like(ids_BS)], dim=1),
        position_ids=lengths_C[chosen_B][:, None] + position_S,
        past_key_values=cache,
        use_cache=True,
    )
    places, start = [], len(families)
    for number, family in enumerate(families):
        for row in family.members:
            rest = row.predicted - 1
            places.append((row, [number, *range(start, start + rest)]))
            start += rest
    return torch.cat([first_CV, rest_KV]), places


def _logits(model: nn.Module, wanted_BS: Tensor, **inputs: Any) -> Tensor:
    """(K, V): the logits at the wanted positions, row after row."""
    if _accepts(model, "logits_to_keep"):
        logits = model(**inputs, logits_to_keep=wanted_BS).logits
    else:
        logits = model(**{key: value for key, value in inputs.items() if _accepts(model, key)}).logits
    return logits if logits.dim() == 2 else logits[wanted_BS]


def _accepts(model: nn.Module, name: str) -> bool:
    """Whether the model's forward has that argument, and it means what it means in transformers."""
    owner = next(kind for kind in type(model).__mro__ if "forward" in vars(kind))
    known = owner.__module__.startswith("transformers.models.") and "forward" not in vars(model)
    return name == "input_ids" or (known and name in inspect.signature(owner.forward).parameters)


def longest_shared(model: nn.Module) -> int:
    """How long, in tokens, a row may be whose context was read before into a cache: 0 where a model has a layer that
    keeps anything but keys and values, or cannot be told its positions."""
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    needed = ("attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep")
    if getattr(model, "_is_stateful", True) or not all(_accepts(model, name) for name in needed):
        return 0
    layers = DynamicCache(config=model.config).layers
    if not layers or any(type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers):
        return 0
    windows = [layer.sliding_window for layer in layers if isinstance(layer, DynamicSlidingWindowLayer)]
    return min((window - 1 for window in windows), default=2**31)


def _padded(rows: Sequence[Sequence[int]], device: Any) -> Tensor:
    """(B, S) ids, zeros behind each row."""
    longest = max(len(row) for row in rows)
    return torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows], device=device)


# -- what the logits say -----------------------------------------------------------------------------------------------


def _read_off(logits_KV: Tensor, rows: Iterable[tuple[Row, Sequence[int]]]) -> list[tuple[int, Answer]]:
    """The answers to all requests of some rows, given which logits are theirs."""
    numbers, lengths, places, tokens = [], [], [], []
    for row, own in rows:
        for number, answer in row.asked:
            numbers.append(number)
            lengths.append(len(answer))
            places.extend(own[-len(answer) :])
            tokens.extend(answer)
    place_T, token_T = torch.tensor([places, tokens], device=logits_KV.device)
    log_probs_KV = F.log_softmax(logits_KV, dim=-1)
    picked = log_probs_KV[place_T, token_T].cpu().split(lengths)
    greedy = (log_probs_KV.argmax(dim=-1)[place_T] == token_T).cpu().split(lengths)
    answers = [(float(values.sum()), bool(same.all())) for values, same in zip(picked, greedy, strict=True)]
    return list(zip(numbers, answers, strict=True))
