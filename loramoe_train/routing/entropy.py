"""Entropies of routing probabilities, from log-probabilities so that no p of zero ends in a NaN, here or in backward.

    Tsallis  S_q(p) = (1 - sum_e p_e^q) / (q - 1)        Renyi  R_q(p) = ln(sum_e p_e^q) / (1 - q)

q = 1 is Shannon's entropy - sum_e p_e ln p_e for both. Normalised ones are divided by the value at uniform p, so they
lie between 0 (one expert) and 1 (all alike).

Legend: E experts.
"""

import math
from typing import Literal

from torch import Tensor

EntropyKind = Literal["tsallis", "renyi"]


def entropy(logp_E: Tensor, kind: EntropyKind, order: float) -> Tensor:
    """The entropy over the last dimension of log-probabilities, which it takes away."""
    if order == 1.0:
        return -(logp_E.exp() * logp_E).sum(dim=-1)
    if kind == "renyi":
        return (order * logp_E).logsumexp(dim=-1) / (1.0 - order)
    return (1.0 - (order * logp_E).exp().sum(dim=-1)) / (order - 1.0)


def entropy_of_uniform(num_experts: int, kind: EntropyKind, order: float) -> float:
    """The largest value that `entropy` takes, 0 for one expert."""
    if order == 1.0 or kind == "renyi":
        return math.log(num_experts)
    return (1.0 - num_experts ** (1.0 - order)) / (order - 1.0)


def normalised_entropy(logp_E: Tensor, kind: EntropyKind, order: float) -> Tensor:
    """`entropy` over its value at uniform p; 1 where there is a single expert, whose p is uniform."""
    if logp_E.shape[-1] == 1:
        return logp_E[..., 0].exp()
    return entropy(logp_E, kind, order) / entropy_of_uniform(logp_E.shape[-1], kind, order)


def check_order(kind: str, order: float) -> None:
    """ValueError for an unknown kind or an order that defines no entropy."""
    if kind not in ("tsallis", "renyi"):
        raise ValueError(f"kind must be tsallis or renyi, got '{kind}'")
    if order <= 0:
        raise ValueError(f"order must be positive (1: Shannon), got {order}")
