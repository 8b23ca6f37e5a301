"""Entropy of each token's routing, averaged over tokens and sites: minimised, it makes routers decide.

Tsallis of order 1.1, normalised, is DynMoLE's (arXiv 2504.00661); see `routing/entropy.py` for the definitions. A
negative `weight` spreads the routing instead. Unlike the authors' code it leaves out padding, and needs no epsilon.

Legend: M sites, N tokens, E experts.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from loramoe_train.aux_losses.additive import AdditiveLoss
from loramoe_train.aux_losses.sums import Mask, grouped, one_of, token_mask
from loramoe_train.routing.entropy import EntropyKind, check_order, entropy, normalised_entropy
from loramoe_train.routing.types import Routing, Tokens


class RoutingEntropy(AdditiveLoss):
    """Mean Tsallis, Renyi or Shannon entropy of the softmax of the logits."""

    def __init__(
        self, *, kind: EntropyKind = "tsallis", order: float = 1.1, normalised: bool = True, tokens: Mask = "valid"
    ) -> None:
        check_order(kind, order)
        self.kind, self.order = kind, order
        self.measure = normalised_entropy if normalised else entropy
        self.mask = one_of("tokens", tokens, "valid", "supervised")

    def sums(self, records: Mapping[str, Routing], tokens: Tokens) -> Tensor:
        mask_N = token_mask(tokens, self.mask, records)
        entropies = (self.measure(g.logits_MNE.log_softmax(dim=-1), self.kind, self.order) for g in grouped(records))
        return torch.stack([(entropy_MN * mask_N).sum() for entropy_MN in entropies]).sum().view(1)

    def value(self, counts: Tensor, sums: Tensor, records: Mapping[str, Routing]) -> Tensor:
        return sums[0] / (counts[-1].clamp(min=1.0) * len(records))
