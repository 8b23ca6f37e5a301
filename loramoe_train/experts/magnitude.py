"""Experts that learn the length of every row of the weight apart from its direction (DoRA, arXiv 2402.09353).

Expert e stands for a whole weight W_e, whose row o points where the adapted row points and is m_e[o] long:

    W_e[o] = m_e[o] / n_e[o] * (W + s_e up_e^T down_e)[o]          n_e[o] = ||(W + s_e up_e^T down_e)[o]||

The magnitudes m_e are learned and start at ||W[o]||, so a fresh expert is W itself; n_e gets no gradient (section 4.3).
Several experts mix their whole outputs, with weights that sum to one:

    sum_e w_e W_e x = W x + (sum_e w_e (m_e / n_e - 1)) * W x + sum_e w_e s_e (m_e / n_e) * up_e^T down_e x

W x is the base's output without its bias, and the last sum is what `bank.py` computes, with m_e / n_e multiplied into
up_e; so no expert's output exists by itself. The rows' lengths need no W_e either, and are measured once for every
change of the factors, in float32:

    n_e^2 = ||W||^2 + 2 s_e diag(up_e^T down_e W^T) + s_e^2 diag(up_e^T down_e down_e^T up_e)

Dropout acts on the low-rank part alone. The authors' code drops the input of W in the second term too, at the price of
another product with W. A token without any expert (padding under hard routing) keeps the base's output.

Legend: N tokens, D in, O out, E experts, R rank columns of all experts, r of one.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from loramoe_train.experts.bank import ExpertBank
from loramoe_train.experts.concatenated import precise
from loramoe_train.experts.products import correlate, expand, shrink
from loramoe_train.experts.shared import SeenInput, versions


class MagnitudeBank(ExpertBank):
    """LoRA pairs with a magnitude (E, O) beside them. `begin` must have been called before anything is computed."""

    down_per_expert = False
    mixes_outputs = True
    reads_base = True
    takes_adapters = False

    def __init__(self, d_in: int, d_out: int, *, ranks: Sequence[int], device: Any = None, **shape: Any) -> None:
        """Raises ValueError where ranks differ."""
        if len(set(ranks)) > 1:
            raise ValueError(f"experts with magnitudes have one rank at a site, got ranks {list(ranks)}")
        super().__init__(d_in, d_out, ranks=ranks, device=device, **shape)
        self.magnitude = nn.Parameter(torch.ones(len(ranks), d_out, device=device, dtype=torch.float32))
        self.register_buffer("square_O", torch.ones(d_out, device=device, dtype=torch.float32), persistent=False)
        self._base: tuple[nn.Module, ...] = ()  # a tuple: as a module of the bank its weights would be the bank's
        self._measured: tuple[tuple[Any, ...], Tensor] | None = None

    @torch.no_grad()
    def begin(self, base: nn.Module) -> None:
        self._base = (base,)
        dtype = torch.promote_types(base.weight.dtype, self.magnitude.dtype)
        self.square_O.copy_(torch.linalg.vector_norm(base.weight, dim=1, dtype=dtype).square())
        self.magnitude.copy_(_length(self.square_O))

    @torch.no_grad()
    def norms(self) -> Tensor:
        """(E, O) without gradient: n_e, measured anew when a factor has changed."""
        if torch.compiler.is_compiling():
            return self._measure()
        own = (self.down, self.up)
        key = (*versions(own), self.down.device, self.down.dtype, torch.is_inference_mode_enabled())
        if self._measured is None or self._measured[0] != key:
            self._measured = (key, self._measure())
        return self._measured[1]

    def _measure(self) -> Tensor:
        weight_OD, stacked = self._base[0].weight, (self.num_experts, self.ranks[0])
        with precise(self.down):
            if torch.compiler.is_compiling():
                cross_OR = weight_OD.to(self.down.dtype) @ self.down.T
            else:
                cross_OR = shrink(weight_OD, self.down)
            down_ErD, up_ErO = self.down.unflatten(0, stacked), self.up.unflatten(0, stacked)
            gram_Err = down_ErD @ down_ErD.transpose(1, 2)
            cross_EO = (up_ErO * cross_OR.T.unflatten(0, stacked)).sum(dim=1)
            own_EO = (up_ErO * (gram_Err @ up_ErO)).sum(dim=1)
        scale_E1 = self.scale_E.unsqueeze(-1)
        square_EO = self.square_O + 2.0 * scale_E1 * cross_EO + scale_E1.square() * own_EO
        return _length(square_EO)

    def stretch(self) -> Tensor:
        """(E, O) with gradient: m_e / n_e, by which every row of W + s_e up_e^T down_e is multiplied."""
        return self.magnitude / self.norms()

    def add_to(self, y: Tensor, seen: SeenInput) -> Tensor:
        ratio_EO = self.stretch()
        weights_NE = None if seen.unweighted else seen.routing.weights_NE
        y = add_gain(y, self._base[0].bias, weights_NE, ratio_EO - 1.0)
        up_ErO = self.up.unflatten(0, (self.num_experts, self.ranks[0])) * ratio_EO.unsqueeze(1)
        return self.add_with(y, seen, up_ErO.flatten(0, 1))

    def active_parameters(self, experts: int) -> int:
        return super().active_parameters(experts) + experts * self.d_out

    def delta(self, expert: int) -> Tensor:
        """(O, D) float32: W_e - W."""
        weight_OD = self._base[0].weight.to(self.up.dtype)
        ratio_O1 = self.stretch()[expert].unsqueeze(-1)
        return ratio_O1 * (weight_OD + super().delta(expert)) - weight_OD


def _length(square: Tensor) -> Tensor:
    return square.clamp_min(torch.finfo(square.dtype).tiny).sqrt()  # rows of zeros are divided by their length, too


def add_gain(y: Tensor, bias_O: Tensor | None, weights_NE: Tensor | None, gain_EO: Tensor) -> Tensor:
    """y + (sum_e w_e gain_e) * (y - bias), a new tensor. y (..., O) of N rows.

    `weights_NE` None: there is one expert, and its weight is 1. Of what is N rows long, only y stays for backward.
    """
    if torch.compiler.is_compiling():
        with precise(y):
            return y + _linear(y, bias_O) * _spread(y, weights_NE, gain_EO)
    return _AddGain.apply(y, bias_O, weights_NE, gain_EO)


def _linear(y: Tensor, bias_O: Tensor | None) -> Tensor:
    return y if bias_O is None else y - bias_O.to(y.dtype)


def _spread(y: Tensor, weights_NE: Tensor | None, gain_EO: Tensor) -> Tensor:
    """sum_e w_e gain_e for every row of y, in its shape and dtype."""
    if weights_NE is None:
        return gain_EO.squeeze(0).to(y.dtype)
    weights_NE = weights_NE.to(gain_EO.dtype)
    if torch.compiler.is_compiling():
        return (weights_NE @ gain_EO).to(y.dtype).view(y.shape)
    return expand(weights_NE, gain_EO, y.dtype).view(y.shape)


class _AddGain(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, bias_O: Tensor | None, weights_NE: Tensor | None, gain_EO: Tensor) -> Tensor:
        learned = ctx.needs_input_grad[2] or ctx.needs_input_grad[3]
        ctx.save_for_backward(y if learned else None, bias_O, weights_NE, gain_EO)
        with precise(y):
            return torch.addcmul(y, _linear(y, bias_O), _spread(y, weights_NE, gain_EO))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        y, bias_O, weights_NE, gain_EO = ctx.saved_tensors
        need_y, _, need_weights, need_gain = ctx.needs_input_grad
        into_y = torch.addcmul(dy, dy, _spread(dy, weights_NE, gain_EO)) if need_y else None
        dweights_NE = dgain_EO = None
        if need_weights or need_gain:
            through_NO = (dy * _linear(y, bias_O)).reshape(-1, y.shape[-1])
        if need_weights:
            dweights_NE = shrink(through_NO, gain_EO).to(weights_NE.dtype)
        if need_gain and weights_NE is None:
            dgain_EO = through_NO.sum(dim=0, keepdim=True, dtype=gain_EO.dtype)
        elif need_gain:
            dgain_EO = correlate(weights_NE.to(gain_EO.dtype), through_NO)
        return into_y, None, dweights_NE, dgain_EO
