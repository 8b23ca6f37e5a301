"""The concatenated form: every expert's rank columns side by side, two narrow products whatever the number of experts.

    hidden = x down^T          logits = x router^T           `shrink_all`: one product for all linears that read x
    gated  = hidden * w s      y += gated up                 `add_experts`: w of the column's expert, in place on W x

Differentiated by hand, because what autograd would keep is several times as much as what backward needs: x in the
base's dtype (which the frozen base itself does not need), the weights w, and `hidden`; of `hidden` only the columns of
the experts that a token has, where their number is bounded (`chosen.py`). With dy the gradient of y:

    dgated = dy up^T     dup = gated^T dy     dw_e = s_e sum over the columns of e of dgated * hidden
    dhidden = dgated * w s     ddown = dhidden^T x     drouter = dlogits^T x     dx = dhidden down + dlogits router

Dropout acts on the x that the experts see, one mask for all linears that read x; the mask is kept as booleans.

Legend: N tokens, D in, O out, E experts of a site, R rank columns of a site (of all members in `shrink_all`), L logits.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from loramoe_train.experts.products import correlate, expand, expand_onto, shrink


@dataclass(frozen=True)
class Kept:
    """Dropout of one pass: which inputs were kept, and what they are multiplied with."""

    mask_ND: Tensor  # bool
    factor: float

    def __call__(self, wide_ND: Tensor) -> Tensor:
        """The tensor, or a gradient with respect to it, with what was dropped set to zero."""
        return (wide_ND * self.mask_ND).mul_(self.factor)


def draw(x_ND: Tensor, dropout: float) -> Kept:
    """A fresh mask from torch's global generator (that of the device)."""
    return Kept(torch.empty_like(x_ND, dtype=torch.bool).bernoulli_(1.0 - dropout), 1.0 / (1.0 - dropout))


def precise(tensor: Tensor) -> AbstractContextManager:
    """Autocast off around products whose dtypes are chosen here; nothing where it is off already."""
    kind = tensor.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


# -- shrink ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stacked:
    """The factors of several linears one below the other, in the dtype that they are multiplied in."""

    both: Tensor | None  # downs, then routers: one product serves both; None where they must be apart
    down_RD: Tensor | None
    router_LD: Tensor | None
    rank_columns: int

    def down_rows(self) -> Tensor:
        """The downs alone."""
        return self.down_RD if self.both is None else self.both[: self.rank_columns]

    def router_rows(self) -> Tensor:
        """The routers alone."""
        return self.router_LD if self.both is None else self.both[self.rank_columns :]


def stack(downs: Sequence[Tensor], routers: Sequence[Tensor], dtype: torch.dtype, *, dropout: bool) -> Stacked:
    """Put the factors together. Routers keep their own dtype, whatever `dtype` is, and never see dropout."""
    columns = sum(down.shape[0] for down in downs)
    if downs and routers and not dropout and routers[0].dtype == dtype:
        return Stacked(torch.cat([*downs, *routers]).to(dtype), None, None, columns)
    return Stacked(
        None,
        torch.cat(list(downs)).to(dtype) if downs else None,
        torch.cat(list(routers)) if routers else None,
        columns,
    )


def shrink_all(
    x_ND: Tensor, downs: Sequence[Tensor], routers: Sequence[Tensor], kept: Kept | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """(hidden (N, sum of R) in `dtype`, logits (N, sum of L) in the routers' dtype, float32 or float64)."""
    if torch.compiler.is_compiling():  # the compiler decides itself what to keep; a custom function would hide it
        with precise(x_ND):
            stacked = stack(downs, routers, dtype, dropout=True)
            seen_ND = x_ND if kept is None else x_ND * kept.mask_ND * kept.factor
            hidden_NR = x_ND[:, :0] if stacked.down_RD is None else seen_ND.to(dtype) @ stacked.down_RD.T
            logits_NL = x_ND[:, :0]
            if stacked.router_LD is not None:
                logits_NL = x_ND.to(stacked.router_LD.dtype) @ stacked.router_LD.T
            return hidden_NR, logits_NL
    mask_ND, factor = (None, 1.0) if kept is None else (kept.mask_ND, kept.factor)
    return _Shrink.apply(x_ND, mask_ND, factor, dtype, len(downs), *downs, *routers)


def shrink_stacked(x_ND: Tensor, stacked: Stacked, kept: Kept | None = None) -> tuple[Tensor, Tensor]:
    """What `shrink_all` gives, from factors that were stacked before; without gradient."""
    with precise(x_ND):
        if stacked.both is not None:
            both_N = shrink(x_ND, stacked.both)
            return both_N[:, : stacked.rank_columns], both_N[:, stacked.rank_columns :]
        empty_N0, down_RD, router_LD = x_ND[:, :0], stacked.down_RD, stacked.router_LD
        seen_ND = x_ND if kept is None or down_RD is None else kept(x_ND)
        return (
            empty_N0 if down_RD is None else shrink(seen_ND, down_RD),
            empty_N0 if router_LD is None else shrink(x_ND, router_LD),
        )


class _Shrink(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_ND: Tensor,
        mask_ND: Tensor | None,
        factor: float,
        dtype: torch.dtype,
        num_downs: int,
        *weights: Tensor,
    ) -> tuple[Tensor, Tensor]:
        downs, routers = list(weights[:num_downs]), list(weights[num_downs:])
        ctx.set_materialize_grads(False)
        ctx.factor, ctx.dtype, ctx.num_downs, ctx.x_dtype = factor, dtype, num_downs, x_ND.dtype
        learned = any(ctx.needs_input_grad[5:])
        # under autocast x is wider than what the products see; the narrow copy is what stays
        own_ND = (x_ND if x_ND.element_size() <= dtype.itemsize else x_ND.to(dtype)) if learned else None
        ctx.save_for_backward(own_ND, mask_ND, *weights)
        kept = None if mask_ND is None else Kept(mask_ND, factor)
        stacked = stack(downs, routers, dtype, dropout=kept is not None)
        hidden_NR, logits_NL = shrink_stacked(x_ND, stacked, kept)
        # a copy, for what keeps logits for backward would else keep all that the product gave
        return hidden_NR.view_as(hidden_NR), logits_NL.clone(memory_format=torch.contiguous_format)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dhidden_NR: Tensor | None, dlogits_NL: Tensor | None) -> tuple[Tensor | None, ...]:
        x_ND, mask_ND, *weights = ctx.saved_tensors
        dtype = ctx.dtype
        downs, routers = weights[: ctx.num_downs], weights[ctx.num_downs :]
        kept = None if mask_ND is None else Kept(mask_ND, ctx.factor)
        needed = ctx.needs_input_grad[5:]
        split = ctx.num_downs
        # (gradient, weights, which of them learn, dropout); without dropout both halves are one product
        halves = [(dhidden_NR, downs, needed[:split], kept), (dlogits_NL, routers, needed[split:], None)]
        if kept is None and downs and routers and dhidden_NR is not None and dlogits_NL is not None:
            halves = [
                (torch.cat([dhidden_NR.to(dtype), dlogits_NL.to(dtype)], dim=1), [*downs, *routers], needed, None)
            ]
        dx_ND: Tensor | None = None
        grads: list[Tensor | None] = []
        for g_N, members, learns, dropped in halves:
            if g_N is None or not members:
                grads += [None] * len(members)
                continue
            g_N = g_N.to(dtype)
            if any(learns):
                seen_ND = x_ND if dropped is None else dropped(x_ND)
                together = correlate(g_N, seen_ND).to(members[0].dtype)  # factors and routers are of one dtype
                parts = together.split([member.shape[0] for member in members])
                grads += [part if learn else None for part, learn in zip(parts, learns, strict=True)]
            else:
                grads += [None] * len(members)
            if ctx.needs_input_grad[0]:
                part_ND = expand(g_N, torch.cat(list(members)).to(dtype), ctx.x_dtype)
                part_ND = part_ND if dropped is None else dropped(part_ND)
                dx_ND = part_ND if dx_ND is None else dx_ND.add_(part_ND)
        return dx_ND, None, None, None, None, *grads


# -- expand ------------------------------------------------------------------------------------------------------------


def gate(hidden_NR: Tensor, weights_NE: Tensor | None, scale_E: Tensor | None, expert_R: Tensor | None) -> Tensor:
    """(N, R): hidden times weight and scale of the column's expert. `expert_R` None: experts of equal rank; `scale_E`
    None: the scale is in `hidden` already."""
    if weights_NE is None and scale_E is None:
        return hidden_NR
    if weights_NE is None:
        factor_NE = scale_E[None]
    else:
        factor_NE = weights_NE if scale_E is None else weights_NE * scale_E
    factor_NE = factor_NE.to(hidden_NR.dtype)
    if expert_R is not None:
        return hidden_NR * factor_NE[:, expert_R]
    tokens, columns, experts = *hidden_NR.shape, factor_NE.shape[1]
    by_expert = hidden_NR.view(tokens, experts, columns // experts) * factor_NE.unsqueeze(-1)
    return by_expert.view(tokens, columns)


def _sum_by_expert(values_NR: Tensor, experts: int, expert_R: Tensor | None) -> Tensor:
    """(N, E) float32 (float64): sums over the columns of each expert."""
    precise = torch.promote_types(values_NR.dtype, torch.float32)
    if expert_R is None:
        return values_NR.unflatten(1, (experts, -1)).sum(dim=-1, dtype=precise)
    out_NE = values_NR.new_zeros(values_NR.shape[0], experts, dtype=precise)
    return out_NE.index_add_(1, expert_R, values_NR.to(precise))


def add_experts(
    y: Tensor,
    hidden_NR: Tensor,
    weights_NE: Tensor | None,
    up_RO: Tensor,
    scale_E: Tensor,
    expert_R: Tensor | None,
) -> Tensor:
    """y + gated up, in place where y allows it. y (..., O) of N rows in the base's dtype.

    `weights_NE` float32 (float64), None for 1 everywhere.
    """
    if torch.compiler.is_compiling():
        with precise(y):
            gated_NR = gate(hidden_NR, weights_NE, scale_E, expert_R)
            return y + (gated_NR @ up_RO.to(hidden_NR.dtype)).view(y.shape).to(y.dtype)
    return _Expand.apply(own(y), hidden_NR, weights_NE, up_RO, scale_E, expert_R)


def own(y: Tensor) -> Tensor:
    """The fresh output of a linear layer as a contiguous tensor that may be written to.

    A linear layer with a bias returns a view of its product. Nobody else holds that product, but autograd would protect
    it at the price of two copies in backward; as an `_unsafe_view` it is a tensor in its own right.
    """
    y = y if y.is_contiguous() else y.contiguous()
    return torch.ops.aten._unsafe_view(y, y.shape) if y._is_view() else y


class _Expand(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        hidden_NR: Tensor,
        weights_NE: Tensor | None,
        up_RO: Tensor,
        scale_E: Tensor,
        expert_R: Tensor | None,
    ) -> Tensor:
        dtype = hidden_NR.dtype
        gated_NR = gate(hidden_NR, weights_NE, scale_E, expert_R)
        with precise(y):
            expand_onto(y.view(-1, y.shape[-1]), gated_NR, up_RO.to(dtype))
        ctx.mark_dirty(y)
        ctx.dtype = dtype
        needed = ctx.needs_input_grad[2] or ctx.needs_input_grad[3]  # dhidden itself needs no hidden
        ctx.save_for_backward(hidden_NR if needed else None, weights_NE, up_RO, scale_E, expert_R)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        hidden_NR, weights_NE, up_RO, scale_E, expert_R = ctx.saved_tensors
        dy_NO = dy.reshape(-1, dy.shape[-1])
        _, need_hidden, need_weights, need_up, *_ = ctx.needs_input_grad
        dup = correlate(gate(hidden_NR, weights_NE, scale_E, expert_R), dy_NO).to(up_RO.dtype) if need_up else None
        dhidden_NR = dweights_NE = None
        if need_hidden or need_weights:
            dgated_NR = shrink(dy_NO, up_RO.to(ctx.dtype))
        if need_weights:
            dweights_NE = _sum_by_expert(dgated_NR * hidden_NR, len(scale_E), expert_R).mul_(scale_E)
        if need_hidden:
            dhidden_NR = gate(dgated_NR, weights_NE, scale_E, expert_R)
        return dy, dhidden_NR, dweights_NE, dup, None, None
