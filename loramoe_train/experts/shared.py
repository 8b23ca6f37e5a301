"""Work shared by linear layers that read the same tensor (q, k and v; gate and up): one narrow product, one routing.

The first layer of a group that is called does the work of all; the others find their part waiting. What is waiting is
given out once, and only for the very tensor, weights and circumstances that it was made for; a layer that finds
nothing, or was called with another tensor, works for itself. So sharing can never change a result, only its cost.

Routers are asked together where their logits are a linear map of the input and their settings are equal: then softmax,
selection and weighting run once on (N, members, E).

Legend: N tokens, D in, M members of a group, E experts of a site, R rank columns of a site.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from loramoe_train.experts.concatenated import Kept, draw, shrink_all, shrink_stacked
from loramoe_train.experts.decoding import (
    Prepared,
    Ready,
    decoding_dtype,
    gate_alone,
    gate_together,
    prepare,
)
from loramoe_train.experts.forms import FEWEST_TOKENS
from loramoe_train.experts.products import narrow_dtype
from loramoe_train.routing.types import Routing, apart

if TYPE_CHECKING:
    from loramoe_train.experts.linear import ExpertLinear


_optimizer_steps = 0


def _count_step(*_: Any) -> None:
    global _optimizer_steps
    _optimizer_steps += 1


# fused optimizers change parameters without counting up their `_version`
register_optimizer_step_post_hook(_count_step)


def versions(parameters: Iterable[Tensor]) -> tuple[int, ...]:
    """Another answer where any of these may have changed."""
    return (_optimizer_steps, *[p._version for p in parameters])


class SeenInput(NamedTuple):
    """What a site knows about its input before its experts add to the base's output."""

    x_ND: Tensor
    routing: Routing
    unweighted: bool  # every weight is 1: there is no router
    hidden_NR: Tensor | None  # x down^T in `dtype`; None: the site is computed in the grouped form
    kept: Kept | None  # dropout on what the experts see
    dtype: torch.dtype  # of the narrow products
    ready: Ready | None = None  # in place of `hidden`: only the last product is left


Seen = SeenInput | Ready  # `Ready` alone where nobody asks how the experts were chosen


class Arrangement(NamedTuple):
    """Who does what in a group; the same for every pass of one kind."""

    members: tuple[ExpertLinear, ...]
    places: tuple[int, ...]  # of those in their group
    shrunk: tuple[ExpertLinear, ...]  # members in the concatenated form
    ranks: tuple[int, ...]  # rank columns of those
    asked: tuple[ExpertLinear, ...]  # members whose routers are asked in the shared product
    experts: tuple[int, ...]  # of those
    together: bool  # whether one decision serves those, of whom there are several
    alike: bool  # whether one would serve all members, in the concatenated form with experts of one rank
    bounded: bool  # whether a token has equally many of the experts, always
    short: bool  # whether the short way of decoding is open to all members
    biased: bool  # whether any of those adds a bias to its logits


class SharedInput:
    """Layers that read the same tensor, and what has been computed for those that are still to be called."""

    def __init__(self, members: Sequence[ExpertLinear]) -> None:
        self.members = tuple(members)
        self.forget()

    def see(self, layer: ExpertLinear, x: Tensor, base_dtype: torch.dtype) -> Seen:
        """The part of `layer`, computed now or waiting since another member was called with this very x (..., D)."""
        if len(self.members) == 1:
            return self._compute(self.members, x, base_dtype)[layer.place]
        now = self._now(layer, x, base_dtype)
        if layer.place in self._waiting and _same(now, self._circumstances):
            seen = self._waiting.pop(layer.place)
            if not self._waiting:
                self._circumstances = ()
            return seen
        parts = self._compute(self.members if layer is self.members[0] else (layer,), x, base_dtype)
        seen = parts.pop(layer.place)
        self._waiting, self._circumstances = parts, now if parts else ()
        return seen

    def forget_waiting(self) -> None:
        """Drop what no member has asked for."""
        self._waiting: dict[int, Seen] = {}  # by place in the group
        self._circumstances: tuple[Any, ...] = ()

    def forget(self) -> None:
        """Drop all that was remembered: called whenever members change between training and evaluation."""
        self.forget_waiting()
        self._ready: dict[torch.dtype, tuple[tuple[Any, ...], Prepared]] = {}
        self._learned: tuple[nn.Parameter, ...] | None = None
        self._arranged: dict[tuple[Any, ...], Arrangement] = {}

    # -- what the work depends on --------------------------------------------------------------------------------------

    def _now(self, layer: ExpertLinear, x: Tensor, base_dtype: torch.dtype) -> tuple[Any, ...]:
        """Everything that the work depends on; tensors by identity and by their counters of changes."""
        context = layer.context
        facts = (x, base_dtype, context.mode, torch.is_grad_enabled(), layer.training)
        if torch.compiler.is_compiling():  # numbers that grow from step to step would compile every step anew
            return facts
        if x.is_inference():
            return (*facts, context.passes)
        return (*facts, context.passes, x._version, *self._versions())

    def _versions(self) -> tuple[int, ...]:
        """Another answer where any factor or router may have changed."""
        if self._learned is None:
            self._learned = tuple(p for member in self.members for p in member.learned())
        return versions(self._learned)

    def _arrange(self, members: tuple[ExpertLinear, ...], tokens: int) -> Arrangement:
        """Decided once for every kind of pass: walking over modules costs as much as a narrow product in decoding."""
        if torch.compiler.is_compiling():  # costs nothing when the compiled code runs, and a cache would be guarded
            return _arrangement(members, tokens)
        first = members[0]
        key = (len(members), first.place, first.context.mode, first.training, tokens >= FEWEST_TOKENS)
        if key not in self._arranged:
            self._arranged[key] = _arrangement(members, tokens)
        return self._arranged[key]

    # -- the work ------------------------------------------------------------------------------------------------------

    def _compute(self, members: tuple[ExpertLinear, ...], x: Tensor, base_dtype: torch.dtype) -> dict[int, Seen]:
        x_ND = x.reshape(-1, x.shape[-1])
        dtype = narrow_dtype(base_dtype, x.device)
        plan = self._arrange(members, x_ND.shape[0])
        training = members[0].training
        dropout = max([member.bank.active_dropout for member in members]) if training else 0.0
        kept = draw(x_ND, dropout) if dropout > 0.0 else None
        # in training a pass without gradient must give the very numbers of the pass with gradient that follows it
        if plan.short and not (training or torch.is_grad_enabled() or torch.compiler.is_compiling()):
            return self._compute_ready(plan, x_ND, decoding_dtype(dtype, x_ND.shape[0], x.device))
        downs = [member.bank.down for member in plan.shrunk]
        routers = [member.linear_score[0] for member in plan.asked]
        hidden_N, logits_N = shrink_all(x_ND, downs, routers, kept, dtype)
        hidden, routings = _by_place(plan, hidden_N), _ask(plan, logits_N)
        seen = {}
        for member in members:
            place = member.place
            routing = routings[place] if place in routings else member.decide(x_ND)
            unweighted = len(plan.asked) == 0 and member.is_unweighted
            seen[place] = SeenInput(x_ND, routing, unweighted, hidden.get(place), kept, dtype)
        return seen

    def _compute_ready(self, plan: Arrangement, x_ND: Tensor, dtype: torch.dtype) -> dict[int, Seen]:
        """The same in evaluation without gradient; see `decoding.py`."""
        prepared = self._prepared(plan, dtype)
        unseen = plan.alike and not plan.members[0].context.is_open
        if unseen and prepared.alone is not None and x_ND.shape[0] == 1:
            return dict(zip(plan.places, prepared.alone(x_ND), strict=True))
        hidden_N, logits_N = shrink_stacked(x_ND, prepared.stacked)
        if unseen:
            gated = gate_together(hidden_N, _ask_together(plan, logits_N))
            return dict(zip(plan.places, map(Ready, gated, prepared.ups), strict=True))
        hidden, routings = _by_place(plan, hidden_N), _ask(plan, logits_N)
        ups = {member.place: up for member, up in zip(plan.shrunk, prepared.ups, strict=True)}
        seen: dict[int, Seen] = {}
        for member in plan.members:
            place = member.place
            routing = routings[place] if place in routings else member.decide(x_ND)
            ready = None
            if place in hidden:
                unweighted = len(plan.asked) == 0 and member.is_unweighted
                gated_NR = gate_alone(hidden[place], routing, unweighted=unweighted, expert_R=member.bank.expert_R)
                ready = Ready(gated_NR, ups[place])
            seen[place] = SeenInput(x_ND, routing, False, None, None, dtype, ready)
        return seen

    def _prepared(self, plan: Arrangement, dtype: torch.dtype) -> Prepared:
        """Made once, until a factor or router changes."""
        key = (plan.members, len(plan.shrunk), self._versions(), tuple([p.data_ptr() for p in self._learned]))
        found = self._ready.get(dtype)
        if found is None or found[0] != key:
            found = self._ready[dtype] = (key, prepare(plan, dtype))
        return found[1]


def _arrangement(members: tuple[ExpertLinear, ...], tokens: int) -> Arrangement:
    shrunk = tuple(m for m in members if m.bank.form_for(m.most_experts(), tokens) == "concatenated")
    asked = tuple(member for member in members if member.linear_score is not None)
    experts = tuple(member.bank.num_experts for member in asked)
    alike = all(asked[0].router.is_like(member.router) for member in asked[1:])
    alike = alike and len(set(experts)) == 1
    ranks = {rank for member in members for rank in member.bank.ranks}
    return Arrangement(
        members,
        tuple(member.place for member in members),
        shrunk,
        tuple(member.bank.down.shape[0] for member in shrunk),
        asked,
        experts,
        alike and len(asked) > 1,
        alike and len(asked) == len(shrunk) == len(members) and len(ranks) == 1 and 0 not in ranks,
        all(member.most_experts() is not None for member in members),
        all(member.bank.down_per_expert for member in members),
        any(member.linear_score[1] is not None for member in asked),
    )


def _same(now: tuple[Any, ...], before: tuple[Any, ...]) -> bool:
    return len(now) == len(before) and now[0] is before[0] and now[1:] == before[1:]


def _by_place(plan: Arrangement, hidden_N: Tensor) -> dict[int, Tensor]:
    """Each member's rank columns, of those in the concatenated form."""
    if not plan.shrunk:
        return {}
    parts = hidden_N.split(plan.ranks, dim=1)
    return {member.place: part for member, part in zip(plan.shrunk, parts, strict=True)}


def _ask(plan: Arrangement, logits_N: Tensor) -> dict[int, Routing]:
    """By place, the decisions of the routers whose logits are known; taken together where the routers are alike."""
    asked = plan.asked
    if plan.together:
        routings = apart(_ask_together(plan, logits_N))
        return {member.place: routing for member, routing in zip(asked, routings, strict=True)}
    found = {}
    for member, logits_NE in zip(asked, logits_N.split(plan.experts, dim=1) if asked else (), strict=True):
        bias_E = member.linear_score[1]
        found[member.place] = member.router.decide(logits_NE if bias_E is None else logits_NE + bias_E)
    return found


def _ask_together(plan: Arrangement, logits_N: Tensor) -> Routing:
    """One decision whose tensors are (N, M, ...)."""
    asked = plan.asked
    logits_NME = logits_N.view(-1, len(asked), plan.experts[0])
    if plan.biased:
        logits_NME = logits_NME + torch.stack([member.linear_score[1] for member in asked])
    return asked[0].router.decide(logits_NME)
