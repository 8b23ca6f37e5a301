"""The (token, expert) pairs of a pass, in pieces that are computed one after the other: what `mixing.py` runs over.

A piece is some pairs and the products of their tokens' rows with the factors of their experts. Three ways to cut:

    every expert    one expert of some tokens at a time; for routing without a bound
    by choice       the j-th choice of some tokens, over the rank columns of all experts with those of others zeroed: no
                    size depends on the data, so a compiler can have it, and nobody waits for a GPU
    by expert       the pairs of each expert side by side (`grouped.py`): a product over its own columns alone

The wide rows of a piece fit into a processor's cache.

Legend: N tokens, K experts of a token, E experts, R rank columns of all experts, r of one, F width, T pairs of a piece,
C columns of a piece: r, or R by choice, P = N * K pairs.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from loramoe_train.experts.concatenated import gate
from loramoe_train.experts.forms import Form
from loramoe_train.experts.grouped import CHUNK_ELEMENTS, Chunk, grouped_mm_serves, lay_out


@dataclass(frozen=True)
class Columns:
    """Which rank columns are whose, in one bank."""

    ranks: tuple[int, ...]
    expert_R: Tensor | None  # None: experts of equal rank

    def of(self, expert: int) -> slice:
        start = sum(self.ranks[:expert])
        return slice(start, start + self.ranks[expert])


@dataclass(frozen=True)
class RowPiece:
    """One expert, or the j-th choice, of the tokens `rows`."""

    rows: slice
    place: int  # the expert, or j: a column of the weights
    weights: Tensor  # (N, E) or (N, K), float32 (float64)
    hot_TE: Tensor | None  # 1 at the chosen expert; None: every token has expert `place`

    @property
    def weight_T1(self) -> Tensor:
        """The weights of the pairs."""
        return self.weights[self.rows, self.place].unsqueeze(-1)

    def take(self, wide_NF: Tensor) -> Tensor:
        """(T, F): the rows of the pairs' tokens."""
        return wide_NF[self.rows]

    def add(self, into_NF: Tensor, wide_TF: Tensor) -> None:
        """Add each pair's row to that of its token, in place."""
        into_NF[self.rows] += wide_TF

    def own(self, hidden_NR: Tensor, columns: Columns) -> Tensor:
        """(T, C): of each pair the columns of its expert."""
        if self.hot_TE is None:
            return hidden_NR[self.rows, columns.of(self.place)]
        return gate(hidden_NR[self.rows], self.hot_TE, None, columns.expert_R)

    def add_own(self, into_NR: Tensor, own_TC: Tensor, columns: Columns) -> None:
        """Add what `own` gives, or its gradient, to where it was taken from, in place."""
        if self.hot_TE is None:
            into_NR[self.rows, columns.of(self.place)] += own_TC
        else:
            into_NR[self.rows] += gate(own_TC, self.hot_TE, None, columns.expert_R)

    def of_expert(self, table_EF: Tensor) -> Tensor:
        """(T, F), or (1, F) where it is one expert: the row of each pair's expert."""
        if self.hot_TE is None:
            return table_EF[self.place, None]
        return self.hot_TE.to(table_EF.dtype) @ table_EF

    def put_weight(self, into_Q: Tensor, value_T: Tensor) -> None:
        """Write a number of each pair to a flat tensor in the order of the weights, which has one place to spare."""
        into_Q[:-1].view(self.weights.shape)[self.rows, self.place] = value_T

    def expand(self, own_TC: Tensor, factors_RF: Tensor, columns: Columns) -> Tensor:
        """(T, F): the columns times the factors of the pair's expert."""
        return own_TC @ self._factors(factors_RF, columns)

    def shrink(self, wide_TF: Tensor, factors_RF: Tensor, columns: Columns) -> Tensor:
        """(T, C): the row times the factors of the pair's expert; other experts' columns hold anything."""
        return wide_TF @ self._factors(factors_RF, columns).T

    def correlate(self, own_TC: Tensor, wide_TF: Tensor, into_RF: Tensor, columns: Columns) -> None:
        """into += own^T wide, over the pairs of each expert."""
        self._factors(into_RF, columns).addmm_(own_TC.T, wide_TF)

    def _factors(self, factors_RF: Tensor, columns: Columns) -> Tensor:
        return factors_RF if self.hot_TE is not None else factors_RF[columns.of(self.place)]


@dataclass(frozen=True)
class ExpertPiece:
    """Pairs of some experts side by side; the same methods as `RowPiece`. Places that hold no pair weigh 0."""

    chunk: Chunk
    token_T: Tensor
    expert_T: Tensor
    weight_T1: Tensor

    def take(self, wide_NF: Tensor) -> Tensor:
        return wide_NF.index_select(0, self.token_T)

    def add(self, into_NF: Tensor, wide_TF: Tensor) -> None:
        into_NF.index_add_(0, self.token_T, wide_TF.to(into_NF.dtype))

    def own(self, hidden_NR: Tensor, columns: Columns) -> Tensor:
        rank = columns.ranks[0]
        return hidden_NR.reshape(-1, rank).index_select(0, self._row_of(columns))

    def add_own(self, into_NR: Tensor, own_TC: Tensor, columns: Columns) -> None:
        into_NR.view(-1, columns.ranks[0]).index_add_(0, self._row_of(columns), own_TC)

    def of_expert(self, table_EF: Tensor) -> Tensor:
        return table_EF.index_select(0, self.expert_T)

    def put_weight(self, into_Q: Tensor, value_T: Tensor) -> None:
        into_Q.index_copy_(0, self.chunk.layout.pair_S[self.chunk.places], value_T)

    def expand(self, own_TC: Tensor, factors_RF: Tensor, columns: Columns) -> Tensor:
        return self.chunk.product(own_TC, _by_expert(factors_RF, columns))

    def shrink(self, wide_TF: Tensor, factors_RF: Tensor, columns: Columns) -> Tensor:
        return self.chunk.product(wide_TF, _by_expert(factors_RF, columns).transpose(1, 2))

    def correlate(self, own_TC: Tensor, wide_TF: Tensor, into_RF: Tensor, columns: Columns) -> None:
        self.chunk.correlate(own_TC, wide_TF, _by_expert(into_RF, columns))

    def _row_of(self, columns: Columns) -> Tensor:
        """Where the columns of a pair's expert are when every expert of every token has a row."""
        return self.token_T * len(columns.ranks) + self.expert_T


Piece = RowPiece | ExpertPiece


def _by_expert(factors_RF: Tensor, columns: Columns) -> Tensor:
    return factors_RF.unflatten(0, (len(columns.ranks), columns.ranks[0]))


def cut(
    weights: Tensor,
    experts_NK: Tensor | None,
    form: Form,
    *,
    experts: int,
    width: int,
    factors: Tensor,
    whole: bool = False,
) -> Iterator[Piece]:
    """The pairs of all tokens, with rows of `width`.

    Args:
        weights: (N, K) of the chosen experts, or (N, E) where `experts_NK` is None.
        form: `grouped` needs `experts_NK` and experts of equal rank.
        factors: any of what the pieces will be multiplied with.
        whole: cut no tokens apart; for what autograd follows, which would make a tensor of all rows for each piece.
    """
    if experts_NK is not None and form == "grouped":
        yield from _by_experts(weights, experts_NK, experts, width, factors)
        return
    for rows in [slice(None)] if whole else _row_chunks(weights, width):
        for place in range(weights.shape[1]):
            hot_TE = None
            if experts_NK is not None:
                numbers_E = torch.arange(experts, device=weights.device)
                hot_TE = (experts_NK[rows, place, None] == numbers_E).to(factors.dtype)
            yield RowPiece(rows, place, weights, hot_TE)


def _row_chunks(weights: Tensor, width: int) -> Sequence[slice]:
    """All tokens, a cache's worth at a time; at once where no cache matters or a compiler looks."""
    if torch.compiler.is_compiling() or weights.device.type != "cpu":
        return [slice(None)]
    rows = max(CHUNK_ELEMENTS // width, 1)
    return [slice(start, start + rows) for start in range(0, len(weights), rows)]


def _by_experts(
    weights_NK: Tensor, experts_NK: Tensor, experts: int, width: int, factors: Tensor
) -> Iterator[ExpertPiece]:
    layout = lay_out(experts_NK, experts, blocks=not grouped_mm_serves(factors, columns=len(factors) // experts))
    pairs, most = weights_NK.numel(), weights_NK.shape[1]
    holds_S = layout.pair_S < pairs
    pair_S = torch.where(holds_S, layout.pair_S, 0)
    token_S = pair_S.div(most, rounding_mode="floor")
    weight_S1 = (weights_NK.flatten().index_select(0, pair_S) * holds_S).unsqueeze(-1)
    expert_S = experts_NK.flatten().index_select(0, pair_S)
    for chunk in layout.chunks(width):
        own = chunk.places
        yield ExpertPiece(chunk, token_S[own], expert_S[own], weight_S1[own])
