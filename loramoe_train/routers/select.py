"""Which experts a token keeps: functions of its probabilities, (N, E) -> bool (N, E).

A selection that keeps equally many of every token, and looks at nothing but the order of its probabilities, offers
`best` too: then the router weighs those few alone. Selections with equal settings are equal, so that sites that read
the same input can be asked together.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

import torch
from torch import Tensor

from loramoe_train.routing.entropy import EntropyKind, check_order, normalised_entropy


class All:
    """Every expert (soft routing)."""

    keeps_all = True  # a router need not ask

    def __call__(self, p_NE: Tensor) -> Tensor:
        return torch.ones_like(p_NE, dtype=torch.bool)


class TopK:
    """The `top_k` largest: exactly that many, even among ties. Raises ValueError when the layer has fewer experts."""

    def __init__(self, top_k: int, num_experts: int) -> None:
        if not 1 <= top_k <= num_experts:
            raise ValueError(f"top_k must lie between 1 and the layer's {num_experts} experts, got {top_k}")
        self.top_k = top_k

    def best(self, scores_NE: Tensor) -> tuple[Tensor, Tensor]:
        """(N, K) scores with gradient, and (N, K) int64 experts, of those kept. `scores_NE`: the probabilities, or what
        has the same order."""
        return scores_NE.topk(self.top_k, dim=-1)  # unlike gather it keeps no scores for backward

    def __call__(self, p_NE: Tensor) -> Tensor:
        return torch.zeros_like(p_NE, dtype=torch.bool).scatter_(-1, self.best(p_NE)[1], True)


@dataclass(frozen=True)
class TopP:
    """The most probable experts while their sum does not exceed `top_p`, and the `at_least` best in any case.

    `crossing`: whether the expert with which the sum crosses `top_p` is kept as well. Raises ValueError where the layer
    has fewer experts than `at_least`.
    """

    top_p: float
    num_experts: int
    crossing: Literal["included", "excluded"] = "included"
    at_least: int = 1

    def __post_init__(self) -> None:
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p must lie in (0, 1], got {self.top_p}")
        if self.crossing not in ("included", "excluded"):
            raise ValueError(f"crossing must be included or excluded, got '{self.crossing}'")
        if not 1 <= self.at_least <= self.num_experts:
            experts = f"the layer's {self.num_experts} experts"
            raise ValueError(f"at_least must lie between 1 and {experts}, got {self.at_least}")

    def __call__(self, p_NE: Tensor) -> Tensor:
        sorted_NE, order_NE = p_NE.sort(dim=-1, descending=True, stable=True)
        sum_NE = _running_sums(sorted_NE)
        kept_NE = sum_NE - sorted_NE < self.top_p if self.crossing == "included" else sum_NE <= self.top_p
        kept_NE[..., : self.at_least] = True
        return torch.zeros_like(kept_NE).scatter_(-1, order_NE, kept_NE)


def _running_sums(p_NE: Tensor) -> Tensor:
    """`cumsum`, which CUDA refuses to a run with `trainer.deterministic`."""
    if p_NE.is_cuda and torch.are_deterministic_algorithms_enabled():
        return torch.stack(list(accumulate(p_NE.unbind(dim=-1))), dim=-1)
    return p_NE.cumsum(dim=-1)


@dataclass(frozen=True)
class Threshold:
    """The experts with at least the probability `floor`, and the best one in any case."""

    floor: float

    def __post_init__(self) -> None:
        if not 0.0 < self.floor < 1.0:
            raise ValueError(f"floor must lie strictly between 0 and 1, got {self.floor}")

    def __call__(self, p_NE: Tensor) -> Tensor:
        best_N1 = p_NE.argmax(dim=-1, keepdim=True)
        return (p_NE >= self.floor).scatter(-1, best_N1, True)


@dataclass(frozen=True)
class EntropySwitch:
    """Every expert where a token's normalised entropy exceeds `above`, else what `otherwise` keeps (DynMoLE)."""

    otherwise: Callable[[Tensor], Tensor]
    above: float
    kind: EntropyKind = "tsallis"
    order: float = 1.1

    def __post_init__(self) -> None:
        check_order(self.kind, self.order)
        if self.above < 0:
            raise ValueError(f"above must not be negative (1 and more: never all experts), got {self.above}")

    def __call__(self, p_NE: Tensor) -> Tensor:
        logp_NE = p_NE.clamp_min(torch.finfo(p_NE.dtype).tiny).log()
        undecided_N1 = normalised_entropy(logp_NE, self.kind, self.order).unsqueeze(-1) > self.above
        return self.otherwise(p_NE) | undecided_N1
