"""Which experts a token keeps: functions of its probabilities, (N, E) -> bool (N, E)."""

import torch
from torch import Tensor


class All:
    """Every expert (soft routing)."""

    keeps_all = True  # a router need not ask

    def __call__(self, p_NE: Tensor) -> Tensor:
        return torch.ones_like(p_NE, dtype=torch.bool)


class TopK:
    """The `top_k` largest: exactly that many, even among ties. Raises ValueError when the layer has fewer experts."""

    by_order = True  # monotone maps of the probabilities do not matter

    def __init__(self, top_k: int, num_experts: int) -> None:
        if not 1 <= top_k <= num_experts:
            raise ValueError(f"top_k must lie between 1 and the layer's {num_experts} experts, got {top_k}")
        self.top_k = top_k

    def __call__(self, p_NE: Tensor) -> Tensor:
        kept_NK = p_NE.topk(self.top_k, dim=-1).indices
        return torch.zeros_like(p_NE, dtype=torch.bool).scatter_(-1, kept_NK, True)
