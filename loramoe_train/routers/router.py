"""A router in four steps: score, normalise, select, weigh. The last two may differ between training and evaluation.

    logits = score(x) / temperature          float32, whatever the dtype of x: a bf16 softmax ties experts
    p      = softmax(logits) or sigmoid(logits)
    kept   = select(p)                       all, the k largest, ...
    w      = p on the kept experts: as it is, divided by its sum, or 1

A token's weights depend on that token alone. LoRA-Mixer (arXiv 2507.00029): linear score, softmax; all experts while
training, top-k renormalised at inference. MoLA, MixLoRA: top-k renormalised in both. LoRAMoE: all experts in both.

Legend: N tokens, D in, E experts.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from loramoe_train.routing.context import RoutingContext
from loramoe_train.routing.types import Routing

Select = Callable[[Tensor], Tensor]  # p_NE -> bool (N, E)
Weight = Literal["probability", "renormalised", "unit"]


@dataclass(frozen=True)
class Policy:
    """Which experts a token keeps, and how they are weighed."""

    select: Select
    weight: Weight = "probability"

    def __post_init__(self) -> None:
        if self.weight not in ("probability", "renormalised", "unit"):
            raise ValueError(f"weight must be probability, renormalised or unit, got '{self.weight}'")

    def __call__(self, p_NE: Tensor) -> Tensor:
        """(N, E) float32 weights, zero where an expert is not kept."""
        kept_NE = self.select(p_NE)
        if self.weight == "unit":
            return kept_NE.to(p_NE.dtype)
        w_NE = p_NE * kept_NE
        return w_NE / w_NE.sum(dim=-1, keepdim=True) if self.weight == "renormalised" else w_NE


class Router(nn.Module):
    """One decision per token. Trained through the weights of the kept experts."""

    def __init__(
        self,
        *,
        score: nn.Module,
        train: Policy,
        evaluate: Policy,
        normalise: Literal["softmax", "sigmoid"] = "softmax",
        temperature: float = 1.0,
    ) -> None:
        super().__init__()
        if temperature <= 0:
            raise ValueError(f"temperature must be positive, got {temperature}")
        if normalise not in ("softmax", "sigmoid"):
            raise ValueError(f"normalise must be softmax or sigmoid, got '{normalise}'")
        self.score, self.normalise, self.temperature = score, normalise, temperature
        self.policies = {True: train, False: evaluate}

    def forward(self, x_ND: Tensor, context: RoutingContext) -> Routing:
        logits_NE = self.score(x_ND) / self.temperature
        p_NE = logits_NE.softmax(dim=-1) if self.normalise == "softmax" else torch.sigmoid(logits_NE)
        return Routing(self.policies[self.training](p_NE), logits_NE)
