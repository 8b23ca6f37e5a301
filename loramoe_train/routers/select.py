"""Which experts a token keeps: functions of its probabilities, (N, E) -> bool (N, E).

A selection that keeps equally many of every token, and looks at nothing but the order of its probabilities, offers
`best` too: then the router weighs those few alone.
"""

import torch
from torch import Tensor


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
