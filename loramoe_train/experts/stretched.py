"""Whole feed-forward experts whose projections multiply every row of the adapted weight with a number of its own.

With c the numbers of a projection, one for each expert and row, and b its bias, E_e of `mixing.py` becomes

    gate_e = c1_e * (W1 x + D1_e x) + b1      up_e = c3_e * (W3 x + D3_e x) + b3      a_e = act(gate_e) * up_e
    y      = sum_e w_e c2_e * (W2 a_e + D2_e a_e) + b2

which is MixLoRA with DoRA experts (MixDoRA) where c is magnitude over length (arXiv 2402.09353). W1 x and W3 x still
run once per token, but W2 runs for every expert of one, for its output is stretched differently each time. Autograd
follows what is written here, so every expert's rows of width F are kept for backward.

Legend: N tokens, D width, F inner width, E experts, R rank columns of all experts, T pairs of a piece.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from loramoe_train.experts.concatenated import Kept, precise
from loramoe_train.experts.mixing import Mixing, dropped
from loramoe_train.experts.pairs import Columns, Piece, cut


@dataclass(frozen=True)
class Inner:
    """One of the layers that read x."""

    base_NF: Tensor  # what the frozen one gives, bias included
    bias_F: Tensor | None
    hidden_NR: Tensor  # down x, times scale
    up_RF: Tensor
    stretch_EF: Tensor
    columns: Columns

    def of(self, piece: Piece) -> Tensor:
        """(T, F): what it gives for the pairs of a piece."""
        with precise(self.base_NF):
            own_TC = piece.own(self.hidden_NR, self.columns)
            linear_TF = piece.expand(own_TC, self.up_RF.to(own_TC.dtype), self.columns) + piece.take(self.base_NF)
            linear_TF = linear_TF if self.bias_F is None else linear_TF - self.bias_F
            y_TF = linear_TF * piece.of_expert(self.stretch_EF).to(linear_TF.dtype)
            return y_TF if self.bias_F is None else y_TF + self.bias_F


def mix_stretched(
    how: Mixing,
    gate: Inner,
    up: Inner | None,
    out: Callable[[Tensor], Tensor],
    stretch_ED: Tensor,
    down_RF: Tensor,
    weights: Tensor,
    experts_NK: Tensor | None,
    kept: Kept | None,
) -> tuple[Tensor, Tensor]:
    """(y (N, D) without D2 and b2, low (N, R) as in `mixing.py`). `out`: W2 without its bias; `stretch_ED`: its c."""
    tokens, width = gate.base_NF.shape
    wide = torch.promote_types(gate.base_NF.dtype, torch.float32)
    y_ND = gate.base_NF.new_zeros(tokens, stretch_ED.shape[1], dtype=wide)
    low_NR = gate.base_NF.new_zeros(tokens, len(down_RF), dtype=how.dtype)
    drop = (None, 1.0) if kept is None else (kept.mask_ND, kept.factor)
    shape = {"experts": len(how.gate.ranks), "width": width, "factors": low_NR}
    for piece in cut(weights, experts_NK, "concatenated", **shape, whole=True):
        a_TF = how.activation(gate.of(piece))
        a_TF = a_TF if up is None else a_TF * up.of(piece)
        weight_T1 = piece.weight_T1
        z_TD = out(a_TF.to(gate.base_NF.dtype))
        piece.add(y_ND, z_TD * (piece.of_expert(stretch_ED) * weight_T1))
        with precise(y_ND):
            seen_TF = dropped(piece, a_TF.to(how.dtype), *drop)
            own_TC = piece.shrink(seen_TF, down_RF.to(how.dtype), how.out) * weight_T1.to(how.dtype)
        piece.add_own(low_NR, own_TC, how.out)
    return y_ND.to(gate.base_NF.dtype), low_NR
