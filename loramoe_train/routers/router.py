"""A router in four steps: score, normalise, select, weigh. The last two may differ between training and evaluation.

    logits = score(x) / temperature          float32, whatever the dtype of x: a bf16 softmax ties experts
    p      = softmax(logits) or sigmoid(logits)
    kept   = select(p)                       all, the k largest, ...
    w      = p on the kept experts: as it is, divided by its sum, or 1

With `jitter` the score sees, in training alone, each number of x times its own factor from U(1 - jitter, 1 + jitter).
The temperature is fixed or learned; in evaluation it may be another (MeteoRA raises it for texts of several tasks).

A token's weights depend on that token alone. LoRA-Mixer (arXiv 2507.00029): linear score, softmax; all experts while
training, top-k renormalised at inference. MoLA, MixLoRA: top-k renormalised in both. LoRAMoE: all experts in both.

Legend: N tokens, D in, E experts, K kept of a token.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from inspect import isfunction
from typing import Literal

import torch
from torch import Tensor, nn

from loramoe_train.routing.context import RoutingContext
from loramoe_train.routing.types import Chosen, Origin, Routing

Select = Callable[[Tensor], Tensor]  # p_NE -> bool (N, E)
Normalise = Literal["softmax", "sigmoid"]
Weight = Literal["probability", "renormalised", "unit"]


@dataclass(frozen=True)
class Policy:
    """Which experts a token keeps, and how they are weighed."""

    select: Select
    weight: Weight = "probability"

    def __post_init__(self) -> None:
        if self.weight not in ("probability", "renormalised", "unit"):
            raise ValueError(f"weight must be probability, renormalised or unit, got '{self.weight}'")
        # as text, once: compiled code takes a module's numbers for variables, and cannot compare those
        select = repr(self.select) if isfunction(self.select) else f"{type(self.select)} {vars(self.select)}"
        object.__setattr__(self, "_settings", f"{self.weight} {select}")

    @property
    def most(self) -> int | None:
        """How many experts a token keeps where that is the same for all, and `Routing.chosen` holds them; else None."""
        return self.select.top_k if hasattr(self.select, "best") else None

    def sums_to_one(self, normalise: Normalise) -> bool:
        """Whether the weights of every token do; a selection keeps at least one expert."""
        if self.weight == "probability":
            return normalise == "softmax" and getattr(self.select, "keeps_all", False)
        return self.weight == "renormalised" or self.most == 1

    def is_like(self, other: "Policy") -> bool:
        """Whether both take the same decision from the same probabilities."""
        return self._settings == other._settings

    def __call__(self, logits_NE: Tensor, normalise: Normalise) -> Routing:
        """Float32 weights, zero where an expert is not kept; differentiable where a weight depends on p."""
        if hasattr(self.select, "best"):
            chosen = self.few(logits_NE, normalise)
            w_NE = torch.zeros_like(logits_NE).scatter_(-1, chosen.experts_NK, chosen.weights_NK)
            return Routing(w_NE, logits_NE, chosen)
        renormalise = self.weight == "renormalised"
        if getattr(self.select, "keeps_all", False):
            w_NE = normalised(logits_NE, normalise)
            if self.weight == "unit":
                w_NE = torch.ones_like(w_NE)
            elif renormalise and normalise == "sigmoid":  # a softmax over all experts sums to one already
                w_NE = w_NE / w_NE.sum(dim=-1, keepdim=True)
            return Routing(w_NE, logits_NE)
        with torch.no_grad():
            kept_NE = self.select(normalised(logits_NE, normalise))
        if self.weight == "unit":
            w_NE = kept_NE.to(logits_NE.dtype)
        elif renormalise and normalise == "softmax":
            # p over the sum of the kept p is the softmax over the kept logits, which keeps one tensor for backward
            w_NE = logits_NE.masked_fill(~kept_NE, -torch.inf).softmax(dim=-1)
        else:
            w_NE = normalised(logits_NE, normalise) * kept_NE
            w_NE = w_NE / w_NE.sum(dim=-1, keepdim=True) if renormalise else w_NE
        return Routing(w_NE, logits_NE)

    def few(self, logits_NE: Tensor, normalise: Normalise) -> Chosen:
        """The experts that each token keeps, where `most` says how many."""
        best_NK, places_NK = self.select.best(logits_NE)  # in the order of the probabilities
        if self.weight == "unit":
            w_NK = logits_NE.new_ones(places_NK.shape)
        elif self.weight == "renormalised" and normalise == "softmax":
            w_NK = best_NK.softmax(dim=-1)
        elif self.weight == "renormalised":
            w_NK = torch.sigmoid(best_NK)
            w_NK = w_NK / w_NK.sum(dim=-1, keepdim=True)
        else:
            w_NK = normalised(logits_NE, normalise).gather(-1, places_NK)
        return Chosen(places_NK, w_NK)


def normalised(logits_NE: Tensor, how: Normalise) -> Tensor:
    """Probabilities: a softmax over the experts, or each expert's own sigmoid."""
    return logits_NE.softmax(dim=-1) if how == "softmax" else torch.sigmoid(logits_NE)


class Router(nn.Module):
    """One decision per token. Trained through the weights of the kept experts."""

    def __init__(
        self,
        *,
        score: nn.Module,
        train: Policy,
        evaluate: Policy,
        normalise: Normalise = "softmax",
        temperature: float = 1.0,
        learn_temperature: bool = False,
        test_temperature: float | None = None,
        jitter: float = 0.0,
        device: torch.device | str | None = None,
    ) -> None:
        """
        Args:
            learn_temperature: start from `temperature`; its logarithm is what is learned, so it stays positive.
            test_temperature: in evaluation, in place of the other; None: the same.
        """
        super().__init__()
        for name, value in (("temperature", temperature), ("test_temperature", test_temperature)):
            if value is not None and value <= 0:
                raise ValueError(f"{name} must be positive, got {value}")
        if not 0.0 <= jitter < 1.0:
            raise ValueError(f"jitter must lie in [0, 1), where 0 is none, got {jitter}")
        if normalise not in ("softmax", "sigmoid"):
            raise ValueError(f"normalise must be softmax or sigmoid, got '{normalise}'")
        self.score, self.normalise, self.jitter = score, normalise, jitter
        self.temperature, self.test_temperature = temperature, test_temperature
        self.policies = {True: train, False: evaluate}
        self.log_temperature: nn.Parameter | None = None
        if learn_temperature:
            start = torch.full((), math.log(temperature), device=device, dtype=torch.float32)
            self.log_temperature = nn.Parameter(start)

    @property
    def linear_score(self) -> tuple[Tensor, Tensor | None] | None:
        """(weight (E, D), bias) where the logits before the temperature are a linear map of the input in float32."""
        return self.score.linear if hasattr(self.score, "linear") and not self._jitters else None

    @property
    def reads(self) -> Literal["input", "outputs"]:
        """What it is asked with: tokens (N, D), or the experts' outputs on whole sequences (Q, E, D)."""
        return getattr(self.score, "reads", "input")

    @property
    def origin(self) -> Origin | None:
        """What alone the decision depends on, where that is the example's task or domain; None: on the input."""
        return getattr(self.score, "origin", None)

    @property
    def most(self) -> int | None:
        """See `Policy.most`; of the present mode."""
        return self.policies[self.training].most

    @property
    def sums_to_one(self) -> bool:
        """Whether the weights of every token do, in training and in evaluation."""
        return all(policy.sums_to_one(self.normalise) for policy in self.policies.values())

    @property
    def _jitters(self) -> bool:
        return self.training and self.jitter > 0.0

    def is_like(self, other: nn.Module) -> bool:
        """Whether both make the same weights of the same logits, so that they can be asked together."""
        if type(self) is not type(other) or self.log_temperature is not None or other.log_temperature is not None:
            return False
        if any(
            getattr(self, name) != getattr(other, name) for name in ("normalise", "temperature", "test_temperature")
        ):
            return False
        return all(self.policies[mode].is_like(other.policies[mode]) for mode in self.policies)

    def forward(self, x_ND: Tensor, context: RoutingContext) -> Routing:
        if self._jitters:
            # torch's own generator, whose state a recomputation and the pass that collects statistics find again
            x_ND = x_ND.to(torch.promote_types(x_ND.dtype, torch.float32))
            x_ND = x_ND * torch.empty_like(x_ND).uniform_(1.0 - self.jitter, 1.0 + self.jitter)
        return self.decide(self.score(x_ND) if self.origin is None else self.score(x_ND, context))

    def decide(self, logits_NE: Tensor) -> Routing:
        """The routing that follows from the scores; further dimensions may stand between N and E."""
        return self.policies[self.training](self._cooled(logits_NE), self.normalise)

    def few(self, logits_NE: Tensor) -> Chosen:
        """What `decide` chooses, alone: for decoding. Only where `most` is not None."""
        return self.policies[self.training].few(self._cooled(logits_NE), self.normalise)

    def _cooled(self, logits_NE: Tensor) -> Tensor:
        if not self.training and self.test_temperature is not None:
            return logits_NE / self.test_temperature
        if self.log_temperature is not None:
            return logits_NE / self.log_temperature.exp()
        return logits_NE if self.temperature == 1.0 else logits_NE / self.temperature
