"""The grouped form: tokens sorted by expert, one product per expert over its own tokens, in one grouped call.

Cost and memory do not depend on the number of experts, but every chosen (token, expert) pair is gathered, so it pays
only for many or wide experts (`forms.py`). All experts have the same rank, and a token has at most `most` of them:

    pairs (n, e) in order of e:    out_p = w_p s_e (x_n down_e^T) up_e        y_n += sum of the out_p of token n

Differentiated by hand: x, the weights and the choice are kept, gathered copies are not.

Legend: N tokens, D in, O out, E experts, R rank of one expert, P = N * most pairs.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from loramoe_train.experts.concatenated import Kept, own, precise

_GROUPED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_ALIGNMENT = 16  # bytes: strides of what `grouped_mm` reads


def add_grouped(
    y: Tensor,
    x_ND: Tensor,
    weights_NE: Tensor,
    down_ERD: Tensor,
    up_ERO: Tensor,
    scale_E: Tensor,
    most: int,
    kept: Kept | None,
    dtype: torch.dtype,
) -> Tensor:
    """y + the experts' outputs, in place where y allows it. y (..., O) of N rows.

    `weights_NE` has at most `most` entries per row that are not zero; further ones would be left out. Products run in
    `dtype`.
    """
    y = own(y)
    mask_ND, factor = (None, 1.0) if kept is None else (kept.mask_ND, kept.factor)
    return _Grouped.apply(y, x_ND, weights_NE, down_ERD, up_ERO, scale_E, most, mask_ND, factor, dtype)


def grouped_product(rows_PD: Tensor, factors_EDR: Tensor, ends_E: Tensor) -> Tensor:
    """(P, R): each row times the factor of its group; group e holds the rows before ends_E[e] (int32)."""
    if _served(rows_PD, factors_EDR):
        return functional.grouped_mm(rows_PD, factors_EDR, offs=ends_E)
    padded, place_P = _padded(rows_PD, ends_E)
    return torch.bmm(padded, factors_EDR).flatten(0, 1)[place_P]


def grouped_correlation(left_PR: Tensor, right_PD: Tensor, ends_E: Tensor) -> Tensor:
    """(E, R, D): left^T right over the rows of each group."""
    if _served(left_PR, right_PD):
        return functional.grouped_mm(left_PR.T, right_PD, offs=ends_E)
    left, _ = _padded(left_PR, ends_E)
    right, _ = _padded(right_PD, ends_E)
    return torch.bmm(left.transpose(1, 2), right)


def _served(*operands: Tensor) -> bool:
    """Whether torch's grouped product takes these operands, whose innermost sizes become strides."""
    return all(
        tensor.dtype in _GROUPED_DTYPES
        and tensor.numel() > 0
        and all(stride == 1 or stride * tensor.element_size() % _ALIGNMENT == 0 for stride in tensor.stride())
        for tensor in operands
    )


def _padded(rows_PD: Tensor, ends_E: Tensor) -> tuple[Tensor, Tensor]:
    """(E, C, D) with the rows of each group and zeros behind them, C the largest group; and each row's place in it."""
    groups = ends_E.shape[0]
    sizes_E = ends_E.diff(prepend=ends_E.new_zeros(1)).long()
    capacity = int(sizes_E.max()) if rows_PD.shape[0] else 0
    group_P = torch.repeat_interleave(torch.arange(groups, device=rows_PD.device), sizes_E, output_size=len(rows_PD))
    first_P = (ends_E.long() - sizes_E)[group_P]
    place_P = group_P * capacity + torch.arange(len(rows_PD), device=rows_PD.device) - first_P
    padded = rows_PD.new_zeros(groups * capacity, rows_PD.shape[1]).index_copy(0, place_P, rows_PD)
    return padded.view(groups, capacity, rows_PD.shape[1]), place_P


class _Grouped(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        x_ND: Tensor,
        weights_NE: Tensor,
        down_ERD: Tensor,
        up_ERO: Tensor,
        scale_E: Tensor,
        most: int,
        mask_ND: Tensor | None,
        factor: float,
        dtype: torch.dtype,
    ) -> Tensor:
        experts = weights_NE.shape[1]
        # the largest weights are the chosen experts; a place that nobody fills has weight zero and adds nothing
        chosen_Nk = weights_NE.topk(most, dim=1).indices
        expert_P, order_P = chosen_Nk.flatten().sort(stable=True)
        token_P = order_P.div(most, rounding_mode="floor")
        counts_E = torch.zeros(experts, dtype=torch.int32, device=y.device).index_add_(
            0, expert_P, torch.ones_like(expert_P, dtype=torch.int32)
        )
        ends_E = counts_E.cumsum(0, dtype=torch.int32)
        weight_P = (weights_NE[token_P, expert_P] * scale_E[expert_P]).to(dtype)
        kept = None if mask_ND is None else Kept(mask_ND, factor)
        with precise(y):
            seen_ND = x_ND if kept is None else kept(x_ND)
            hidden_PR = grouped_product(_rows(seen_ND, token_P, dtype), down_ERD.to(dtype).transpose(1, 2), ends_E)
            out_PO = grouped_product(hidden_PR * weight_P[:, None], up_ERO.to(dtype), ends_E)
            y.view(-1, y.shape[-1]).index_add_(0, token_P, out_PO.to(y.dtype))
        ctx.mark_dirty(y)
        ctx.factor, ctx.dtype, ctx.x_dtype = factor, dtype, x_ND.dtype
        own_ND = x_ND if x_ND.element_size() <= dtype.itemsize else x_ND.to(dtype)
        narrow = [t.to(torch.int32) for t in (token_P, expert_P)]
        ctx.save_for_backward(own_ND, mask_ND, weights_NE, down_ERD, up_ERO, scale_E, *narrow, ends_E)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x_ND, mask_ND, weights_NE, down_ERD, up_ERO, scale_E, token_P, expert_P, ends_E = ctx.saved_tensors
        dtype, token_P, expert_P = ctx.dtype, token_P.long(), expert_P.long()
        _, need_x, need_weights, need_down, need_up, *_ = ctx.needs_input_grad
        kept = None if mask_ND is None else Kept(mask_ND, ctx.factor)
        down, up = down_ERD.to(dtype), up_ERO.to(dtype)
        weight_P1 = (weights_NE[token_P, expert_P] * scale_E[expert_P]).to(dtype)[:, None]
        x_PD = _rows(x_ND if kept is None else kept(x_ND), token_P, dtype)
        dy_PO = _rows(dy.reshape(-1, dy.shape[-1]), token_P, dtype)
        dgated_PR = grouped_product(dy_PO, up.transpose(1, 2), ends_E)
        dup = ddown = dweights_NE = dx_ND = None
        if need_up or need_weights:
            hidden_PR = grouped_product(x_PD, down.transpose(1, 2), ends_E)
        if need_up:
            dup = grouped_correlation(hidden_PR * weight_P1, dy_PO, ends_E).to(up_ERO.dtype)
        if need_weights:
            dweight_P = (dgated_PR * hidden_PR).sum(dim=1, dtype=weights_NE.dtype) * scale_E[expert_P]
            dweights_NE = torch.zeros_like(weights_NE).index_put_((token_P, expert_P), dweight_P)
        dhidden_PR = dgated_PR * weight_P1
        if need_down:
            ddown = grouped_correlation(dhidden_PR, x_PD, ends_E).to(down_ERD.dtype)
        if need_x:
            dx_PD = grouped_product(dhidden_PR, down, ends_E)
            dx_ND = dx_PD.new_zeros(x_ND.shape).index_add_(0, token_P, dx_PD).to(ctx.x_dtype)
            dx_ND = dx_ND if kept is None else kept(dx_ND)
        return dy, dx_ND, dweights_NE, ddown, dup, None, None, None, None, None


def _rows(wide_ND: Tensor, token_P: Tensor, dtype: torch.dtype) -> Tensor:
    """(P, D) in `dtype`. index_select: on a CPU several times as fast as indexing."""
    return wide_ND.index_select(0, token_P).to(dtype)
