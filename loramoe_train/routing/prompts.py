"""Decisions for whole sequences, taken on their prompts: which tokens those are, and what was decided before.

A decision for a sequence may look at its prompt alone, never at what is to be predicted. In a batch (open context) a
prompt is what comes before the first supervised token of its example. Without a batch it is what the model reads first:
all tokens of a call without a cache or with an empty one (`context.serving(prompt=...)` says where they end if the call
holds more). Calls that go on with a filled cache use what was decided when it was empty.

Legend: B rows, S positions, N = B * S tokens, Q sequences, E experts.
"""

from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from loramoe_train.routing.types import Tokens

CACHES = ("past_key_values", "cache_params")  # what models call their cache, as argument and in their output


@dataclass(frozen=True)
class Prompts:
    """Which of Q sequences each token belongs to, and which tokens a decision may look at.

    Q is a length and no number, so that compiled code serves any.
    """

    sequence_N: Tensor  # int64 in [0, Q); Q on padding
    slot_N: Tensor  # the same on prompts; Q elsewhere
    tokens_Q: Tensor  # (Q + 1,) int64: tokens of each prompt, then the others

    def mean(self, values_ND: Tensor) -> Tensor:
        """(Q, D): the mean over each sequence's prompt."""
        total_QD = values_ND.new_zeros(len(self.tokens_Q), values_ND.shape[1]).index_add(0, self.slot_N, values_ND)
        return (total_QD / self.tokens_Q.clamp(min=1).to(values_ND.dtype)[:, None])[:-1]

    def to_tokens(self, values_QE: Tensor) -> Tensor:
        """(N, E): each token gets its sequence's row, padding zeros."""
        padded = torch.cat([values_QE, values_QE.new_zeros(1, values_QE.shape[1])])
        return padded.index_select(0, self.sequence_N)


def _prompts(sequence_N: Tensor, prompt_N: Tensor, num: int) -> Prompts:
    slot_N = sequence_N.masked_fill(~prompt_N, num)
    return Prompts(sequence_N, slot_N, slot_N.new_zeros(num + 1).index_add(0, slot_N, torch.ones_like(slot_N)))


def prompts_of_batch(tokens: Tokens, rows: int = 0) -> Prompts:
    """Of a batch. Where it does not tell its examples apart, each of its `rows` rows is one.

    An example's first token is prompt in any case: nothing predicts it.
    """
    valid_N, device = tokens.valid_N, tokens.valid_N.device
    size = len(valid_N)
    position_N = torch.arange(size, device=device)
    if tokens.sample_N is None:
        number_N, num = position_N // max(size // max(rows, 1), 1), rows
    else:
        number_N, num = tokens.sample_N, tokens.num_samples
    sequence_N = number_N.masked_fill(~valid_N, num)
    never_Q = torch.full((num + 1,), size, device=device)
    first_Q = never_Q.scatter_reduce(0, sequence_N, position_N, "amin")
    wanted_N = position_N.masked_fill(~tokens.supervised_N, size)
    answer_Q = never_Q.scatter_reduce(0, sequence_N, wanted_N, "amin")
    before_N = position_N < answer_Q.index_select(0, sequence_N)
    is_first_N = position_N == first_Q.index_select(0, sequence_N)
    return _prompts(sequence_N, valid_N & (before_N | is_first_N), num)


class Sequences:
    """What was decided on the prompts that a model reads outside a batch, for as long as their cache lives.

    Watches the calls of a model: each begins new sequences or goes on with those of its cache, so an old decision can
    never serve another prompt. Beam search reorders rows within a prompt only, whose rows were all decided alike.
    """

    def __init__(self) -> None:
        self._kept: WeakKeyDictionary[Any, dict[str, Tensor]] = WeakKeyDictionary()
        self._leave()

    def watch(self, model: nn.Module) -> None:
        """`model`: the module that is given token ids, a mask of the padding and the cache by keyword."""
        model.register_forward_pre_hook(lambda _, args, kwargs: self._enter(kwargs), with_kwargs=True)
        model.register_forward_hook(lambda _, args, kwargs, output: self._leave(kwargs, output), with_kwargs=True)

    def _enter(self, kwargs: dict[str, Any]) -> None:
        self._leave()
        mask = kwargs.get("attention_mask")
        self._mask_BS = mask if isinstance(mask, Tensor) and mask.dim() == 2 else None
        cache = _cache_in(kwargs)
        if cache is None or _is_empty(cache):
            return
        if cache not in self._kept:
            raise RuntimeError("this cache was filled by other calls than this model's, so nothing is decided for it")
        self._decided, self.begin = self._kept[cache], False

    def _leave(self, kwargs: dict[str, Any] | None = None, output: Any = None) -> None:
        for values in (kwargs, output):  # a model makes a cache itself where it is given none
            cache = _cache_in(values) if isinstance(values, dict) else None
            if cache is not None:
                self._kept[cache] = self._decided
        self.begin = True  # whether the call in flight begins its sequences
        self._decided: dict[str, Tensor] = {}  # owner of the decision -> (B, E)
        self._mask_BS: Tensor | None = None

    def prompts(self, rows: int, length: int, device: torch.device, end: int | None) -> Prompts:
        """Of a call that begins sequences: all that is no padding, up to position `end`."""
        row_B1 = torch.arange(rows, device=device)[:, None]
        valid_BS = torch.ones(rows, length, dtype=torch.bool, device=device)
        if self._mask_BS is not None:
            valid_BS = self._mask_BS[:, -length:].to(device).bool()
        prompt_BS = valid_BS if end is None else valid_BS & (torch.arange(length, device=device) < end)
        sequence_BS = torch.where(valid_BS, row_B1, rows)
        return _prompts(sequence_BS.reshape(-1), prompt_BS.reshape(-1), rows)

    def keep(self, owner: str, weights_BE: Tensor) -> None:
        self._decided[owner] = weights_BE

    def kept(self, owner: str, rows: int) -> Tensor:
        """(rows, E): what `owner` decided when these sequences began. RuntimeError where it decided nothing."""
        weights_BE = self._decided.get(owner)
        if weights_BE is None or rows % max(len(weights_BE), 1):
            raise RuntimeError(f"{owner} has decided nothing for the sequences of this cache: generate from the start")
        return weights_BE.repeat_interleave(rows // len(weights_BE), dim=0)  # rows of a prompt lie together


def _cache_in(values: dict[str, Any]) -> Any:
    return next((values[name] for name in CACHES if values.get(name) is not None), None)


def _is_empty(cache: Any) -> bool:
    """Whether nothing was read into a cache of transformers. RuntimeError for one that does not tell."""
    if not hasattr(cache, "layers"):
        raise RuntimeError(f"a {type(cache).__name__} does not tell whether it is empty; generate with use_cache=False")
    return not any(_holds(layer) for layer in cache.layers)


def _holds(layer: Any) -> bool:
    states = getattr(layer, "has_previous_state", None)  # of a state-space layer, by number
    if states is not None and any(states.values()):
        return True
    return hasattr(layer, "keys") and int(layer.get_seq_length()) > 0
