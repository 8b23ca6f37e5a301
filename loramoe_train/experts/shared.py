"""Work shared by linear layers that read the same tensor (q, k and v; gate and up): one narrow product, one routing.

The first layer of a group that is called does the work of all; the others find their part waiting. What is waiting is
given out once, and only for the very tensor, weights and circumstances that it was made for; a layer that finds
nothing, or was called with another tensor, works for itself. So sharing can never change a result, only its cost.

Routers are asked together where their logits are a linear map of the input and their settings are equal: then softmax,
selection and weighting run once on (N, members, E).

Legend: N tokens, D in, M members of a group, E experts of a site, R rank columns of a site.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from loramoe_train.experts.concatenated import Kept, Stacked, draw, shrink_all, shrink_stacked, stack
from loramoe_train.experts.products import narrow_dtype
from loramoe_train.routing.types import Routing

if TYPE_CHECKING:
    from loramoe_train.experts.linear import ExpertLinear


@dataclass(frozen=True)
class SeenInput:
    """What a site knows about its input before its experts add to the base's output."""

    x_ND: Tensor
    routing: Routing
    unweighted: bool  # every weight is 1: there is no router
    most: int | None  # experts per token at most
    hidden_NR: Tensor | None  # x down^T in `dtype`; None: the site is computed in the grouped form
    kept: Kept | None  # dropout on what the experts see
    dtype: torch.dtype  # of the narrow products


class SharedInput:
    """Layers that read the same tensor, and what has been computed for those that are still to be called."""

    def __init__(self, members: Sequence[ExpertLinear]) -> None:
        self.members = tuple(members)
        self._circumstances: tuple[Any, ...] = ()
        self._waiting: dict[str, SeenInput] = {}
        self._stacked: tuple[tuple[Any, ...], Stacked] | None = None

    def see(self, layer: ExpertLinear, x: Tensor, base_dtype: torch.dtype) -> SeenInput:
        """The part of `layer`, computed now or waiting since another member was called with this very x (..., D)."""
        now = self._now(layer, x, base_dtype)
        if layer.site in self._waiting and _same(now, self._circumstances):
            seen = self._waiting.pop(layer.site)
            if not self._waiting:
                self._circumstances = ()
            return seen
        members = self.members if layer is self.members[0] else (layer,)
        parts = self._compute(members, x, base_dtype)
        seen = parts.pop(layer.site)
        self._waiting, self._circumstances = parts, now if parts else ()
        return seen

    def forget_waiting(self) -> None:
        """Drop what no member has asked for."""
        self._waiting, self._circumstances = {}, ()

    def forget(self) -> None:
        """Drop what is waiting, and what was stacked for evaluation."""
        self.forget_waiting()
        self._stacked = None

    def _now(self, layer: ExpertLinear, x: Tensor, base_dtype: torch.dtype) -> tuple[Any, ...]:
        """Everything that the work depends on; tensors by identity and by their counters of changes."""
        context = layer.context
        facts = (x, base_dtype, context.mode, context.passes, torch.is_grad_enabled(), layer.training)
        if torch.compiler.is_compiling() or x.is_inference():
            return facts
        return (*facts, x._version, *self._versions())

    def _versions(self) -> tuple[int, ...]:
        return tuple(p._version for member in self.members for p in member.learned())

    def _compute(self, members: Sequence[ExpertLinear], x: Tensor, base_dtype: torch.dtype) -> dict[str, SeenInput]:
        x_ND = x.reshape(-1, x.shape[-1])
        dtype = narrow_dtype(base_dtype, x.device)
        most = [member.most_experts() for member in members]
        shrunk = [
            member
            for member, bound in zip(members, most, strict=True)
            if member.bank.form_for(bound, x_ND.shape[0]) == "concatenated"
        ]
        asked = [member for member in members if member.linear_score is not None]
        dropout = max(member.bank.active_dropout for member in members)
        kept = draw(x_ND, dropout) if dropout > 0.0 else None
        hidden_N, logits_N = self._products(x_ND, shrunk, asked, kept, dtype)
        hidden: dict[str, Tensor] = {}
        if shrunk:
            parts = hidden_N.split([member.bank.down.shape[0] for member in shrunk], dim=1)
            hidden = {member.site: part for member, part in zip(shrunk, parts, strict=True)}
        routings = _ask(asked, logits_N) if asked else {}
        return {
            member.site: SeenInput(
                x_ND=x_ND,
                routing=routings[member.site] if member.site in routings else member.decide(x_ND),
                unweighted=member.is_unweighted,
                most=bound,
                hidden_NR=hidden.get(member.site),
                kept=kept,
                dtype=dtype,
            )
            for member, bound in zip(members, most, strict=True)
        }

    def _products(
        self,
        x_ND: Tensor,
        shrunk: Sequence[ExpertLinear],
        asked: Sequence[ExpertLinear],
        kept: Kept | None,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        """hidden and logits of the members side by side, from one product each, or from one for both."""
        downs = [member.bank.down for member in shrunk]
        routers = [member.linear_score[0] for member in asked]
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or kept is not None:
            return shrink_all(x_ND, downs, routers, kept, dtype)
        # a generation loop comes here for every token: stack the factors once, until one of them changes
        key = (dtype, len(shrunk), len(asked), self.members[0].training, *self._versions())
        key += tuple(tensor.data_ptr() for tensor in (*downs, *routers))
        if self._stacked is None or self._stacked[0] != key:
            self._stacked = (key, stack(downs, routers, dtype, dropout=False))
        return shrink_stacked(x_ND, self._stacked[1])


def _same(now: tuple[Any, ...], before: tuple[Any, ...]) -> bool:
    return len(now) == len(before) and now[0] is before[0] and now[1:] == before[1:]


def _ask(asked: Sequence[ExpertLinear], logits_N: Tensor) -> dict[str, Routing]:
    """The decisions of the routers whose logits are known; taken together where the routers are alike."""
    first = asked[0].router
    experts = [member.bank.num_experts for member in asked]
    biases = [member.linear_score[1] for member in asked]
    if len(asked) > 1 and all(first.is_like(member.router) for member in asked[1:]) and len(set(experts)) == 1:
        logits_NME = logits_N.unflatten(1, (len(asked), experts[0]))
        if biases[0] is not None:
            logits_NME = logits_NME + torch.stack(biases)
        routing = first.decide(logits_NME)
        sites = [member.site for member in asked]
        weights, logits = routing.weights_NE.unbind(1), routing.logits_NE.unbind(1)
        return {site: Routing(w_NE, z_NE) for site, w_NE, z_NE in zip(sites, weights, logits, strict=True)}
    routings = {}
    for member, logits_NE, bias_E in zip(asked, logits_N.split(experts, dim=1), biases, strict=True):
        routings[member.site] = member.router.decide(logits_NE if bias_E is None else logits_NE + bias_E)
    return routings
