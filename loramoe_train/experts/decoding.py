"""The short way in evaluation without gradient: a generation loop comes here once per token, layer and input.

Then a narrow product costs less than walking over modules and casting factors. So what does not depend on the token is
made once and kept until a factor changes: the factors of all layers that read an input one below the other, with the
experts' scales multiplied in, and each layer's `up`, in the dtype of the products. The columns of all these layers are
weighed in one operation. For a single token only the factors of its own experts are read: reading factors is what
takes the time then. The routers' product alone still grows with the number of experts.

Legend: N tokens, D in, O out, M layers that read the same input, E experts, K of a token, R rank columns of a layer, r
of one expert.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from loramoe_train.experts.concatenated import Stacked, gate, precise, stack
from loramoe_train.experts.products import expand_onto
from loramoe_train.routing.types import Routing

if TYPE_CHECKING:
    from loramoe_train.experts.shared import Arrangement

# On a CPU a half-precision product over so few rows takes longer than casting them and multiplying in float32.
FEW_TOKENS = 4


class Ready(NamedTuple):
    """What is left to do for a layer: y += gated up."""

    gated_NR: Tensor
    up_RO: Tensor

    def add_to(self, y: Tensor) -> Tensor:
        """In place where y (..., O) allows it."""
        y = y if y.is_contiguous() else y.contiguous()
        with precise(y):
            expand_onto(y.view(-1, self.up_RO.shape[1]), self.gated_NR, self.up_RO)
        return y


class OneToken:
    """One token through M alike layers, reading the factors of its own experts alone."""

    def __init__(self, plan: Arrangement, stacked: Stacked, ups: tuple[Tensor, ...]) -> None:
        down_RD, self.router_LD = stacked.down_rows(), stacked.router_rows()
        self.layers, self.experts = len(plan.members), plan.experts[0]
        self.rank, self.width = down_RD.shape[0] // (self.layers * self.experts), down_RD.shape[1]
        self.dtype, self.router = down_RD.dtype, plan.members[0].router
        # every expert of every layer in one row; the rows of a layer begin at `first_M1`
        self.downs = down_RD.reshape(self.layers * self.experts, -1)
        self.first_M1 = torch.arange(self.layers, device=down_RD.device).unsqueeze(-1) * self.experts
        self.ups = tuple(up.view(self.experts, -1) for up in ups)
        self.outs = tuple(up.shape[1] for up in ups)
        biases = [member.linear_score[1] for member in plan.members] if plan.biased else None
        self.bias_ME = None if biases is None else torch.stack(biases).detach()

    def __call__(self, x_1D: Tensor) -> list[Ready]:
        """What is left to do for each layer."""
        with precise(x_1D):
            wide_1D = x_1D.to(self.dtype)
            logits_ME = (x_1D.to(self.router_LD.dtype) @ self.router_LD.T).view(self.layers, self.experts)
            if self.bias_ME is not None:
                logits_ME = logits_ME + self.bias_ME
            chosen = self.router.few(logits_ME)
            rows = chosen.experts_NK if self.layers == 1 else chosen.experts_NK + self.first_M1
            own = self.downs.index_select(0, rows.view(-1)).view(-1, self.width)
            hidden = (wide_1D @ own.T).view(self.layers, -1, self.rank)
            gated = (hidden * chosen.weights_NK.to(self.dtype).unsqueeze(-1)).view(self.layers, 1, -1)
            layers = zip(gated.unbind(0), chosen.experts_NK.unbind(0), self.ups, self.outs, strict=True)
            return [Ready(part, up.index_select(0, own_K).view(-1, out)) for part, own_K, up, out in layers]


@dataclass(frozen=True)
class Prepared:
    """What does not depend on the tokens."""

    stacked: Stacked
    ups: tuple[Tensor, ...]  # (R, O) of the layers in the concatenated form
    alone: OneToken | None  # where the layers are alike


def decoding_dtype(dtype: torch.dtype, tokens: int, device: torch.device) -> torch.dtype:
    """The dtype of the narrow products over so many tokens, where it would be `dtype` for many."""
    return torch.promote_types(dtype, torch.float32) if device.type == "cpu" and tokens <= FEW_TOKENS else dtype


def prepare(plan: Arrangement, dtype: torch.dtype) -> Prepared:
    downs = [member.bank.scaled_down() for member in plan.shrunk]
    routers = [member.linear_score[0] for member in plan.asked]
    ups = tuple(member.bank.up.detach().to(dtype) for member in plan.shrunk)
    stacked = stack(downs, routers, dtype, dropout=False)
    return Prepared(stacked, ups, OneToken(plan, stacked, ups) if plan.alike and plan.bounded else None)


def gate_together(hidden_NR: Tensor, decided: Routing) -> tuple[Tensor, ...]:
    """The weighed columns of each of M layers with equally many experts of equal rank. `decided` holds (N, M, E)."""
    tokens, layers, experts = decided.weights_NE.shape
    weights_NME1 = decided.weights_NE.to(hidden_NR.dtype).unsqueeze(-1)
    gated = hidden_NR.view(tokens, layers, experts, hidden_NR.shape[1] // (layers * experts)) * weights_NME1
    return gated.view(tokens, layers, -1).unbind(1)


def gate_alone(hidden_NR: Tensor, routing: Routing, *, unweighted: bool, expert_R: Tensor | None) -> Tensor:
    """The weighed columns of one layer."""
    return gate(hidden_NR, None if unweighted else routing.weights_NE, None, expert_R)
