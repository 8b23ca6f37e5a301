"""The concatenated form where a token has at most K experts: what is kept for backward does not grow with E.

The same two narrow products as in `concatenated.py`, over the rank columns of all experts, for a product over the few
columns that each token needs would have to gather a matrix per token. But of `hidden` only the columns of a token's
own experts are kept, weighed, and put back among zeros where a product needs all columns:

    own = hidden at the token's experts      gated = (own * w s) among zeros      y += gated up, in place on W x
    dgated = dy up^T, taken at those         dup = gated^T dy      dw = s sum over r of dgated * own
    dhidden = (dgated * w s) among zeros

Legend: N tokens, O out, E experts, K experts of a token, R rank columns of all experts, r of one.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from loramoe_train.experts.concatenated import own, precise
from loramoe_train.experts.products import correlate, expand_onto, shrink
from loramoe_train.routing.types import Chosen


def add_chosen(y: Tensor, hidden_NR: Tensor, chosen: Chosen, up_RO: Tensor, scale_E: Tensor) -> Tensor:
    """y + gated up, in place where y allows it. y (..., O) of N rows in the base's dtype; experts of equal rank."""
    return _ExpandChosen.apply(own(y), hidden_NR, chosen.weights_NK, chosen.experts_NK, up_RO, scale_E)


def scaled(weights_NK: Tensor, experts_NK: Tensor, scale_E: Tensor) -> Tensor:
    """(N, K): w s of the token's experts, in the dtype of the weights."""
    return weights_NK * scale_E[experts_NK]


class _ExpandChosen(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        hidden_NR: Tensor,
        weights_NK: Tensor,
        experts_NK: Tensor,
        up_RO: Tensor,
        scale_E: Tensor,
    ) -> Tensor:
        dtype, experts = hidden_NR.dtype, len(scale_E)
        rows_P = _rows(experts_NK, experts)
        own_NKr = _take(hidden_NR, experts_NK, rows_P, experts)
        factor_NK1 = scaled(weights_NK, experts_NK, scale_E).to(dtype).unsqueeze(-1)
        gated_NR = _among_zeros(own_NKr * factor_NK1, rows_P, experts)
        with precise(y):
            expand_onto(y.view(-1, y.shape[-1]), gated_NR, up_RO.to(dtype))
        ctx.mark_dirty(y)
        needed = ctx.needs_input_grad[2] or ctx.needs_input_grad[4]  # dhidden itself needs no hidden
        ctx.save_for_backward(own_NKr if needed else None, weights_NK, experts_NK, up_RO, scale_E)
        ctx.dtype = dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        own_NKr, weights_NK, experts_NK, up_RO, scale_E = ctx.saved_tensors
        dtype, experts = ctx.dtype, len(scale_E)
        dy_NO = dy.reshape(-1, dy.shape[-1])
        _, need_hidden, need_weights, _, need_up, _ = ctx.needs_input_grad
        rows_P = _rows(experts_NK, experts)
        factor_NK1 = scaled(weights_NK, experts_NK, scale_E).to(dtype).unsqueeze(-1)
        dup = dhidden_NR = dweights_NK = None
        if need_up:
            dup = correlate(_among_zeros(own_NKr * factor_NK1, rows_P, experts), dy_NO).to(up_RO.dtype)
        if need_hidden or need_weights:
            dgated_NR = shrink(dy_NO, up_RO.to(dtype))
            dgated_NKr = _take(dgated_NR, experts_NK, rows_P, experts)
        if need_weights:
            dweights_NK = (dgated_NKr * own_NKr).sum(dim=-1, dtype=weights_NK.dtype)
            dweights_NK = scaled(dweights_NK, experts_NK, scale_E)
        if need_hidden:
            dhidden_NR = _among_zeros(dgated_NKr * factor_NK1, rows_P, experts)
        return dy, dhidden_NR, dweights_NK, None, dup, None


def _rows(experts_NK: Tensor, experts: int) -> Tensor:
    """(N * K,) int64: where a token's experts are when every expert of every token has a row."""
    first_N = torch.arange(0, len(experts_NK) * experts, experts, device=experts_NK.device)
    return (experts_NK + first_N.unsqueeze(-1)).flatten()


def _take(all_NR: Tensor, experts_NK: Tensor, rows_P: Tensor, experts: int) -> Tensor:
    """(N, K, r): the columns of each token's experts. index_select is on a CPU three times as fast as gather."""
    tokens, columns = all_NR.shape
    rank = columns // experts
    if all_NR.is_contiguous():
        taken_Pr = all_NR.view(tokens * experts, rank).index_select(0, rows_P)
        return taken_Pr.view(tokens, experts_NK.shape[1], rank)
    return all_NR.unflatten(1, (experts, rank)).gather(1, experts_NK.unsqueeze(-1).expand(-1, -1, rank))


def _among_zeros(few_NKr: Tensor, rows_P: Tensor, experts: int) -> Tensor:
    """(N, R): the columns of each token's experts, 0 in those of the others."""
    tokens, _, rank = few_NKr.shape
    all_ = few_NKr.new_zeros(tokens * experts, rank)
    return all_.index_copy_(0, rows_P, few_NKr.reshape(-1, rank)).view(tokens, experts * rank)
