"""Whole feed-forward experts, mixed: y = sum_e w_e E_e(x), every E_e a copy of the frozen block with LoRA of its own.

    E_e(x) = (W2 + D2_e)[ act((W1 + D1_e) x) * ((W3 + D3_e) x) ]            MixLoRA (arXiv 2404.15159), section 3.2

W1 x and W3 x are the same for all experts. W2 is linear, so it too runs once per token, on the sum of what the experts
hand to it; here is what lies between (s, the experts' scales, is in `hidden` already):

    a_e   = act(gate + hidden1_e up1_e) * (up + hidden3_e up3_e)
    mixed = sum_e w_e a_e                            W2 reads it
    low_e = w_e drop(a_e) down2_e^T                  the columns of D2_e: what up2_e makes of them is added to W2 mixed

The act of an experts' sum is not the sum of their acts, so these wide rows exist once for every expert of a token; and
what autograd would keep of them is four rows for each. Differentiated by hand, nothing of width F is kept but gate and
up, and the mask of dropout: the rest is computed again. With dm and dl the gradients of mixed and low:

    c = dm + drop(dl_e down2_e)      dw_e = sum of a_e * c      ddown2_e = (w dl)^T drop(a_e)
    dgate, dup = gradients of act(gate') * up' for w_e c      dup1_e = hidden1_e^T dgate      dhidden1_e = dgate up1_e^T

Legend: N tokens, F inner width, E experts, K of a token, R rank columns of all experts, T pairs of a piece, C columns
of a pair's own expert.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from loramoe_train.experts.concatenated import Kept, precise
from loramoe_train.experts.forms import Form
from loramoe_train.experts.pairs import Columns, Piece, cut

Activation = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Mixing:
    """What does not change from pass to pass, and how this one is computed. `up` of a block without a gate is None."""

    activation: Activation
    gate: Columns
    up: Columns
    out: Columns
    form: Form
    dtype: torch.dtype  # of the narrow products

    def pieces(self, weights: Tensor, experts_NK: Tensor | None, width: int, factors: Tensor) -> Iterator[Piece]:
        return cut(weights, experts_NK, self.form, experts=len(self.gate.ranks), width=width, factors=factors)


def mix(
    how: Mixing,
    gate_NF: Tensor,
    up_NF: Tensor | None,
    hidden: tuple[Tensor, Tensor | None],
    factors: tuple[Tensor, Tensor | None, Tensor],
    weights: Tensor,
    experts_NK: Tensor | None,
    kept: Kept | None,
) -> tuple[Tensor, Tensor]:
    """(mixed (N, F) in the dtype of `gate`, low (N, R) in that of the narrow products).

    Args:
        gate_NF: what the activation sees, of the frozen layer; `up_NF` what its result is multiplied with. None, as are
            hidden3 and up3, in a block without a gate.
        hidden: (N, R) each, of the experts of gate and up: down x, times scale; in the dtype of the narrow products.
        factors: up1 (R, F), up3 (R, F), down2 (R, F).
        weights: (N, K) of the experts `experts_NK`, or (N, E) where that is None; float32 (float64).
        kept: dropout of what D2 reads, one mask for all experts.
    """
    mask_NF, factor = (None, 1.0) if kept is None else (kept.mask_ND, kept.factor)
    if torch.compiler.is_compiling():  # the compiler decides itself what to keep
        with precise(gate_NF):
            cast = _cast(factors, how.dtype)
            return _forward(how, gate_NF, up_NF, *hidden, *cast, weights, experts_NK, mask_NF, factor)
    return _Mix.apply(how, gate_NF, up_NF, *hidden, *factors, weights, experts_NK, mask_NF, factor)


def _cast(tensors: Iterable[Tensor | None], dtype: torch.dtype) -> list[Tensor | None]:
    return [None if tensor is None else tensor.to(dtype) for tensor in tensors]


def _inner(piece: Piece, base_NF: Tensor, own_TC: Tensor, factors_RF: Tensor, of: Columns) -> Tensor:
    """(T, F): what one of the layers that read x gives for the pairs of a piece."""
    return piece.expand(own_TC, factors_RF, of).add_(piece.take(base_NF))


def _forward(
    how: Mixing,
    gate_NF: Tensor,
    up_NF: Tensor | None,
    hidden1_NR: Tensor,
    hidden3_NR: Tensor | None,
    up1_RF: Tensor,
    up3_RF: Tensor | None,
    down2_RF: Tensor,
    weights: Tensor,
    experts_NK: Tensor | None,
    mask_NF: Tensor | None,
    factor: float,
) -> tuple[Tensor, Tensor]:
    """Factors and hidden in the dtype of the narrow products. Autograd can follow it, at the cost told above."""
    tokens, width = gate_NF.shape
    mixed_NF = gate_NF.new_zeros(tokens, width, dtype=torch.promote_types(gate_NF.dtype, torch.float32))
    low_NR = gate_NF.new_zeros(tokens, len(down2_RF), dtype=how.dtype)
    for piece in how.pieces(weights, experts_NK, width, up1_RF):
        a_TF = how.activation(_inner(piece, gate_NF, piece.own(hidden1_NR, how.gate), up1_RF, how.gate))
        if up_NF is not None:
            a_TF = a_TF * _inner(piece, up_NF, piece.own(hidden3_NR, how.up), up3_RF, how.up)
        weight_T1 = piece.weight_T1
        piece.add(mixed_NF, a_TF * weight_T1)
        seen_TF = dropped(piece, a_TF.to(how.dtype), mask_NF, factor)
        piece.add_own(low_NR, piece.shrink(seen_TF, down2_RF, how.out) * weight_T1.to(how.dtype), how.out)
    return mixed_NF.to(gate_NF.dtype), low_NR


def _times(wide_TF: Tensor, up_TF: Tensor | None) -> Tensor:
    return wide_TF if up_TF is None else wide_TF * up_TF


def dropped(piece: Piece, wide_TF: Tensor, mask_NF: Tensor | None, factor: float) -> Tensor:
    """The rows of a piece with what was dropped of them set to zero; a gradient with respect to them likewise."""
    return wide_TF if mask_NF is None else (wide_TF * piece.take(mask_NF)).mul_(factor)


class _Mix(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        how: Mixing,
        gate_NF: Tensor,
        up_NF: Tensor | None,
        hidden1_NR: Tensor,
        hidden3_NR: Tensor | None,
        up1_RF: Tensor,
        up3_RF: Tensor | None,
        down2_RF: Tensor,
        weights: Tensor,
        experts_NK: Tensor | None,
        mask_NF: Tensor | None,
        factor: float,
    ) -> tuple[Tensor, Tensor]:
        ctx.how, ctx.factor = how, factor
        learned = (hidden1_NR, hidden3_NR, up1_RF, up3_RF, down2_RF)
        ctx.save_for_backward(gate_NF, up_NF, *learned, weights, experts_NK, mask_NF)
        with precise(gate_NF):
            cast = _cast(learned, how.dtype)
            return _forward(how, gate_NF, up_NF, *cast, weights, experts_NK, mask_NF, factor)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dmixed_NF: Tensor, dlow_NR: Tensor) -> tuple[Tensor | None, ...]:
        gate_NF, up_NF, hidden1, hidden3, up1, up3, down2, weights, experts_NK, mask_NF = ctx.saved_tensors
        how, needs, dtype = ctx.how, ctx.needs_input_grad, ctx.how.dtype
        wide = torch.promote_types(gate_NF.dtype, torch.float32)
        up1_RF, up3_RF, down2_RF = _cast((up1, up3, down2), dtype)

        def zeros(index: int, like: Tensor | None, kind: torch.dtype) -> Tensor | None:
            return torch.zeros_like(like, dtype=kind) if needs[index] else None

        dgate_NF, dup_NF = zeros(1, gate_NF, wide), zeros(2, up_NF, wide)
        dhidden1, dhidden3 = zeros(3, hidden1, dtype), zeros(4, hidden3, dtype)
        dup1, dup3, ddown2 = zeros(5, up1, dtype), zeros(6, up3, dtype), zeros(7, down2, dtype)
        dweight_Q = weights.new_zeros(weights.numel() + 1) if needs[8] else None
        for piece in how.pieces(weights, experts_NK, gate_NF.shape[1], up1_RF):
            weight_T1 = piece.weight_T1
            own1_TC = piece.own(hidden1, how.gate)
            gate_TF = _inner(piece, gate_NF, own1_TC, up1_RF, how.gate)
            with torch.enable_grad():
                gate_TF = gate_TF.requires_grad_()
                act_TF = how.activation(gate_TF)
            own3_TC = up_TF = None
            if up_NF is not None:
                own3_TC = piece.own(hidden3, how.up)
                up_TF = _inner(piece, up_NF, own3_TC, up3_RF, how.up)
            dlow_TC = piece.own(dlow_NR, how.out)
            c_TF = dropped(piece, piece.expand(dlow_TC, down2_RF, how.out), mask_NF, ctx.factor)
            c_TF = c_TF.add_(piece.take(dmixed_NF))
            a_TF = _times(act_TF.detach(), up_TF)
            if dweight_Q is not None:
                piece.put_weight(dweight_Q, (a_TF * c_TF).sum(dim=1, dtype=dweight_Q.dtype))
            if ddown2 is not None:
                seen_TF = dropped(piece, a_TF.to(dtype), mask_NF, ctx.factor)
                piece.correlate(dlow_TC * weight_T1.to(dtype), seen_TF, ddown2, how.out)
            c_TF = c_TF.mul_(weight_T1)
            (da_TF,) = torch.autograd.grad(act_TF, gate_TF, _times(c_TF, up_TF).to(act_TF.dtype))
            _spread(piece, da_TF, dgate_NF, dhidden1, dup1, own1_TC, up1_RF, how.gate)
            if up_TF is not None:
                _spread(piece, c_TF.mul_(act_TF.detach()), dup_NF, dhidden3, dup3, own3_TC, up3_RF, how.up)
        return (
            None,
            *_cast((dgate_NF, dup_NF), gate_NF.dtype),
            dhidden1,
            dhidden3,
            *_cast((dup1, dup3, ddown2), up1.dtype),
            None if dweight_Q is None else dweight_Q[:-1].view(weights.shape),
            None,
            None,
            None,
        )


def _spread(
    piece: Piece,
    d_TF: Tensor,
    dbase_NF: Tensor | None,
    dhidden_NR: Tensor | None,
    dfactors_RF: Tensor | None,
    own_TC: Tensor,
    factors_RF: Tensor,
    of: Columns,
) -> None:
    """The gradient of `_inner` to where it belongs, in place."""
    narrow_TF = d_TF.to(own_TC.dtype)
    if dbase_NF is not None:
        piece.add(dbase_NF, d_TF)
    if dhidden_NR is not None:
        piece.add_own(dhidden_NR, piece.shrink(narrow_TF, factors_RF, of), of)
    if dfactors_RF is not None:
        piece.correlate(own_TC, narrow_TF, dfactors_RF, of)
