"""Losses that are a function of sums over tokens: L = value(counts, sums), exact over ranks and micro-batches.

`counts` (no gradient) and `sums` (with gradient) add up over tokens. Everybody's are known before a micro-batch
contributes, so its share is the first-order part that its own sums have in L:

    share = L * (own part of the evidence) + dL/dsums . (own sums - the same without gradient)

Values of all shares add up to L, and their gradients to that of L, for any differentiable `value`: sums of
probabilities, of their squares, or of whole losses of examples, which lie in one micro-batch each.

Legend: C length of the counts, K length of the sums.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor

from loramoe_train.aux_losses.sums import Mask, token_mask
from loramoe_train.routing.types import Routing, Tokens


class AdditiveLoss(ABC):
    """A subclass says what is added up and what becomes of it."""

    balanced: float | None = None  # the value at perfectly even use of the experts, where that is one number

    mask: Mask = "valid"  # which tokens count

    def counts(self, records: Mapping[str, Routing], tokens: Tokens) -> Tensor:
        """(C,) float32 without gradient. The last entry weighs the evidence: how many tokens, examples, ..."""
        return self.evidence(records, tokens).view(1)

    @abstractmethod
    def sums(self, records: Mapping[str, Routing], tokens: Tokens) -> Tensor:
        """(K,) float32 with gradient."""

    @abstractmethod
    def value(self, counts: Tensor, sums: Tensor, records: Mapping[str, Routing]) -> Tensor:
        """The loss (a scalar) of everybody's counts and sums; finite, too, where all of them are zero. `records` tell
        which sites there are and how many experts they have."""

    @torch.no_grad()
    def statistics(self, records: Mapping[str, Routing], tokens: Tokens) -> Tensor:
        """Counts, then sums."""
        return torch.cat([self.counts(records, tokens), self.sums(records, tokens)])

    def __call__(self, records: Mapping[str, Routing], tokens: Tokens, statistics: Tensor) -> Tensor:
        own_K = self.sums(records, tokens)
        counts_C, sums_K = statistics.split([len(statistics) - len(own_K), len(own_K)])
        with torch.enable_grad():
            sums_K = sums_K.detach().requires_grad_()
            total = self.value(counts_C, sums_K, records)
            (slope_K,) = torch.autograd.grad(total, sums_K)
        part = self.evidence(records, tokens) / counts_C[-1].clamp(min=1.0)
        return total.detach() * part + (slope_K * (own_K - own_K.detach())).sum()

    def evidence(self, records: Mapping[str, Routing], tokens: Tokens) -> Tensor:
        """Scalar: this micro-batch's last entry of `counts`, without the work for the others: its masked tokens."""
        return token_mask(tokens, self.mask, records).sum()
