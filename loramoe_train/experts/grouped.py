"""The grouped form: the tokens of an expert side by side, one product per expert over its own tokens, in one call.

Cost and memory do not depend on the number of experts, but every chosen (token, expert) pair is gathered, so it pays
only for many or wide experts (`forms.py`). All experts have the same rank, and a token has K of them:

    pairs (n, e) in order of e:    out_p = w_p s_e (x_n down_e^T) up_e        y_n += sum of the out_p of token n

Differentiated by hand: x, the narrow intermediate and the choice are kept, gathered copies of x and dy are not.

How the pairs lie side by side is a `Layout`. On a GPU they are sorted without gaps, for torch's `grouped_mm`. On a CPU
that function calls one small product per expert, and most of the time is the call; there the pairs lie in blocks of
equally many places, filled up with pairs of weight 0, and one batched product serves all. An expert with more pairs
than a block has places gets several blocks, so skewed routing costs no more than balanced routing and a block per
expert.

Legend: N tokens, D in, O out, E experts, K experts of a token, R rank of one, P = N * K pairs, S places, T of them, B
blocks.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from loramoe_train.experts.chosen import scaled
from loramoe_train.experts.concatenated import Kept, own, precise
from loramoe_train.routing.types import Chosen

_GROUPED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_ALIGNMENT = 16  # bytes: strides of what `grouped_mm` reads
CHUNK_ELEMENTS = 2**20  # of the gathered rows at a time
BLOCK_MARGIN = 2.0  # places of a block at most, in pairs of an evenly used expert: random routing rarely needs more


def add_grouped(
    y: Tensor,
    x_ND: Tensor,
    chosen: Chosen,
    down_ERD: Tensor,
    up_ERO: Tensor,
    scale_E: Tensor,
    kept: Kept | None,
    dtype: torch.dtype,
) -> Tensor:
    """y + the experts' outputs, in place where y allows it. y (..., O) of N rows. Products run in `dtype`."""
    mask_ND, factor = (None, 1.0) if kept is None else (kept.mask_ND, kept.factor)
    experts_NK, weights_NK = chosen.experts_NK, chosen.weights_NK
    return _Grouped.apply(own(y), x_ND, weights_NK, experts_NK, down_ERD, up_ERO, scale_E, mask_ND, factor, dtype)


@dataclass(frozen=True)
class Layout:
    """Where the pairs lie: place s holds pair `pair_S[s]`, or nothing where that is P.

    Either group e has the places before `ends_E[e]` (int32) and after its predecessor's, or the places form blocks of
    equal size, the b-th of expert `expert_B[b]`.
    """

    pair_S: Tensor  # int64
    ends_E: Tensor | None
    expert_B: Tensor | None
    size: int  # places of a block
    experts: int

    @property
    def block_is_expert(self) -> bool:
        """Whether there are as many blocks as experts: every expert has at least one."""
        return self.expert_B is not None and len(self.expert_B) == self.experts

    def chunks(self, width: int) -> Iterator["Chunk"]:
        """All places, so many blocks at a time that their rows of `width` fit into the processor's cache."""
        if self.expert_B is None:
            yield Chunk(self, slice(None), slice(None))
            return
        blocks = max(CHUNK_ELEMENTS // (self.size * width), 1)
        for first in range(0, len(self.expert_B), blocks):
            end = min(first + blocks, len(self.expert_B))
            yield Chunk(self, slice(first * self.size, end * self.size), slice(first, end))


@dataclass(frozen=True)
class Chunk:
    """Some places of a layout (T of them), and the products over them."""

    layout: Layout
    places: slice
    blocks: slice

    def product(self, rows_TD: Tensor, factors_EDR: Tensor) -> Tensor:
        """(T, R): each row times the factor of its expert."""
        if self.layout.expert_B is None:
            return functional.grouped_mm(rows_TD, factors_EDR, offs=self.layout.ends_E)
        return torch.bmm(self._by_block(rows_TD), self._of_blocks(factors_EDR)).flatten(0, 1)

    def correlate(self, left_TR: Tensor, right_TD: Tensor, into_ERD: Tensor) -> None:
        """into += left^T right over the rows of each expert."""
        layout = self.layout
        if layout.expert_B is None:
            into_ERD.copy_(functional.grouped_mm(left_TR.T, right_TD, offs=layout.ends_E))
            return
        of_blocks = torch.bmm(self._by_block(left_TR).transpose(1, 2), self._by_block(right_TD))
        if layout.block_is_expert:
            into_ERD[self.blocks] = of_blocks
        else:
            into_ERD.index_add_(0, layout.expert_B[self.blocks], of_blocks.to(into_ERD.dtype))

    def _by_block(self, rows_TD: Tensor) -> Tensor:
        return rows_TD.view(-1, self.layout.size, rows_TD.shape[1])

    def _of_blocks(self, factors_EDR: Tensor) -> Tensor:
        if self.layout.block_is_expert:
            return factors_EDR[self.blocks]
        return factors_EDR.index_select(0, self.layout.expert_B[self.blocks])


def lay_out(experts_NK: Tensor, experts: int, *, blocks: bool) -> Layout:
    """Bring together the pairs of each expert, in order of tokens."""
    expert_P, pair_P = experts_NK.flatten().sort(stable=True)
    counts_E = torch.zeros(experts, dtype=torch.long, device=expert_P.device)
    counts_E.index_add_(0, expert_P, torch.ones_like(expert_P))
    if not blocks:
        return Layout(pair_P, counts_E.cumsum(0, dtype=torch.int32), None, 0, experts)
    pairs = len(expert_P)
    size = max(1, min(int(counts_E.max()), -(-int(BLOCK_MARGIN * pairs) // experts)))
    # an idle expert has a block too, so that block e is as a rule that of expert e
    blocks_E = ((counts_E + size - 1) // size).clamp(min=1) if pairs else counts_E
    expert_B = torch.repeat_interleave(torch.arange(experts, device=expert_P.device), blocks_E)
    # a pair's place: those of the blocks of earlier experts, then its own number among the pairs of its expert
    shift_E = (blocks_E.cumsum(0) - blocks_E) * size - (counts_E.cumsum(0) - counts_E)
    place_P = shift_E[expert_P] + torch.arange(pairs, device=expert_P.device)
    pair_S = torch.full((len(expert_B) * size,), pairs, device=expert_P.device).index_copy_(0, place_P, pair_P)
    return Layout(pair_S, None, expert_B, size, experts)


def grouped_mm_serves(*operands: Tensor, columns: int) -> bool:
    """Whether torch's grouped product is the better one on this device, and takes these operands, and the narrow
    intermediate of so many columns."""
    return all(
        tensor.device.type != "cpu"
        and tensor.dtype in _GROUPED_DTYPES
        and tensor.numel() > 0
        and all(stride == 1 or stride * tensor.element_size() % _ALIGNMENT == 0 for stride in tensor.stride())
        and columns * tensor.element_size() % _ALIGNMENT == 0
        for tensor in operands
    )


class _Grouped(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        x_ND: Tensor,
        weights_NK: Tensor,
        experts_NK: Tensor,
        down_ERD: Tensor,
        up_ERO: Tensor,
        scale_E: Tensor,
        mask_ND: Tensor | None,
        factor: float,
        dtype: torch.dtype,
    ) -> Tensor:
        down, up = down_ERD.to(dtype), up_ERO.to(dtype)
        layout = lay_out(experts_NK, len(scale_E), blocks=not grouped_mm_serves(down, up, columns=down.shape[1]))
        kept = None if mask_ND is None else Kept(mask_ND, factor)
        token_S, weight_S1 = _places(layout.pair_S, scaled(weights_NK, experts_NK, scale_E), dtype)
        hidden_SR = down.new_empty(len(token_S), down.shape[1])
        y_NO = y.view(-1, y.shape[-1])
        with precise(y):
            seen_ND = x_ND if kept is None else kept(x_ND)
            for chunk in layout.chunks(max(x_ND.shape[1], y.shape[-1])):
                token_T, own = token_S[chunk.places], hidden_SR[chunk.places]
                own.copy_(chunk.product(_rows(seen_ND, token_T, dtype), down.transpose(1, 2)))
                out_TO = chunk.product(own * weight_S1[chunk.places], up)
                y_NO.index_add_(0, token_T, out_TO.to(y.dtype))
        ctx.mark_dirty(y)
        ctx.factor, ctx.dtype, ctx.x_dtype, ctx.size = factor, dtype, x_ND.dtype, layout.size
        own_ND = x_ND if x_ND.element_size() <= dtype.itemsize else x_ND.to(dtype)
        place = [layout.pair_S.to(torch.int32), layout.ends_E, layout.expert_B]
        ctx.save_for_backward(own_ND, mask_ND, weights_NK, experts_NK, down_ERD, up_ERO, scale_E, hidden_SR, *place)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x_ND, mask_ND, weights_NK, experts_NK, down_ERD, up_ERO, scale_E, hidden_SR, *place = ctx.saved_tensors
        pair_S, ends_E, expert_B = place
        layout, dtype = Layout(pair_S.long(), ends_E, expert_B, ctx.size, len(scale_E)), ctx.dtype
        _, need_x, need_weights, _, need_down, need_up, *_ = ctx.needs_input_grad
        kept = None if mask_ND is None else Kept(mask_ND, ctx.factor)
        token_S, weight_S1 = _places(layout.pair_S, scaled(weights_NK, experts_NK, scale_E), dtype)
        down, up, dy_NO = down_ERD.to(dtype), up_ERO.to(dtype), dy.reshape(-1, dy.shape[-1])
        seen_ND = x_ND if kept is None or not need_down else kept(x_ND)
        dup = torch.zeros_like(up_ERO) if need_up else None
        ddown = torch.zeros_like(down_ERD) if need_down else None
        dx_ND = x_ND.new_zeros(x_ND.shape, dtype=dtype) if need_x else None
        dweight_P = scale_E.new_zeros(weights_NK.numel() + 1) if need_weights else None
        for chunk in layout.chunks(max(x_ND.shape[1], dy.shape[-1])):
            places = chunk.places
            token_T, hidden_TR, weight_T1 = token_S[places], hidden_SR[places], weight_S1[places]
            dy_TO = _rows(dy_NO, token_T, dtype)
            dgated_TR = chunk.product(dy_TO, up.transpose(1, 2))
            if need_up:
                chunk.correlate(hidden_TR * weight_T1, dy_TO, dup)
            if need_weights:
                dweight_T = (dgated_TR * hidden_TR).sum(dim=1, dtype=dweight_P.dtype)
                dweight_P.index_copy_(0, layout.pair_S[places], dweight_T)
            dhidden_TR = dgated_TR * weight_T1
            if need_down:
                chunk.correlate(dhidden_TR, _rows(seen_ND, token_T, dtype), ddown)
            if need_x:
                dx_ND.index_add_(0, token_T, chunk.product(dhidden_TR, down))
        if need_x:
            dx_ND = dx_ND.to(ctx.x_dtype)
            dx_ND = dx_ND if kept is None else kept(dx_ND)
        dweights_NK = None
        if need_weights:
            dweights_NK = scaled(dweight_P[:-1].view(weights_NK.shape), experts_NK, scale_E)
        return dy, dx_ND, dweights_NK, None, ddown, dup, None, None, None, None


def _places(pair_S: Tensor, scaled_NK: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(token (S,), w s (S, 1) in `dtype`) of every place; what holds nothing is the first token with weight 0."""
    pairs, most = scaled_NK.numel(), scaled_NK.shape[1]
    padded = torch.cat([scaled_NK.flatten(), scaled_NK.new_zeros(1)])
    token_S = torch.where(pair_S < pairs, pair_S, 0).div(most, rounding_mode="floor")
    return token_S, padded.index_select(0, pair_S).to(dtype).unsqueeze(-1)


def _rows(wide_ND: Tensor, token_S: Tensor, dtype: torch.dtype) -> Tensor:
    """(S, D) in `dtype`. index_select: on a CPU several times as fast as indexing."""
    return wide_ND.index_select(0, token_S).to(dtype)
