"""Copies of a feed-forward block, between its frozen layers: every way to mix them against the sum over pairs."""

import pytest
import torch
from torch import nn

from loramoe_train.experts.concatenated import Kept
from loramoe_train.experts.mixing import Mixing, _forward, mix
from loramoe_train.experts.pairs import Columns

N, F, E, K = 37, 6, 4, 2


def made(*, gated=True, ranks=(2,) * E, form="concatenated", chosen=True, dropout=False):
    """(how, arguments of `mix`) in float64."""
    generator = torch.Generator().manual_seed(0)

    def normal(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64).requires_grad_()

    rows = [expert for expert, rank in enumerate(ranks) for _ in range(rank)]
    columns = Columns(ranks, torch.tensor(rows) if len(set(ranks)) > 1 else None)
    total = len(rows)
    weights = normal(N, E).softmax(dim=-1).detach()
    experts_NK = None
    if chosen:
        weights, experts_NK = weights.topk(K, dim=-1)
    kept = Kept(torch.rand(N, F, generator=generator) > 0.3, 1.5) if dropout else None
    how = Mixing(nn.functional.silu, columns, columns, columns, form, torch.float64)
    hidden = (normal(N, total), normal(N, total) if gated else None)
    factors = (normal(total, F), normal(total, F) if gated else None, normal(total, F))
    inner = (normal(N, F), normal(N, F) if gated else None)
    return how, (*inner, hidden, factors, weights.requires_grad_(), experts_NK, kept)


def leaves_of(arguments):
    gate, up, hidden, factors, weights, *_ = arguments
    return [t for t in (gate, up, *hidden, *factors, weights) if t is not None]


def by_hand(how, gate_NF, up_NF, hidden, factors, weights, experts_NK, kept):
    """The equations of the module, pair by pair."""
    rows_of = [how.gate.of(e) for e in range(E)]
    mixed, low = torch.zeros_like(gate_NF), torch.zeros_like(hidden[0])
    for n in range(N):
        for place in range(weights.shape[1]):
            e = place if experts_NK is None else int(experts_NK[n, place])
            own = rows_of[e]
            a_F = how.activation(gate_NF[n] + hidden[0][n, own] @ factors[0][own])
            if up_NF is not None:
                a_F = a_F * (up_NF[n] + hidden[1][n, own] @ factors[1][own])
            mixed = mixed.index_add(0, torch.tensor([n]), (weights[n, place] * a_F)[None])
            seen_F = a_F if kept is None else a_F * kept.mask_ND[n] * kept.factor
            row_R = torch.zeros(low.shape[1], dtype=low.dtype).index_add(
                0, torch.arange(own.start, own.stop), weights[n, place] * (factors[2][own] @ seen_F)
            )
            low = low.index_add(0, torch.tensor([n]), row_R[None])
    return mixed, low


@pytest.mark.parametrize(
    "case",
    [
        {"form": "grouped", "dropout": True},
        {"form": "grouped", "gated": False},
        {"dropout": True},
        {"ranks": (1, 0, 3, 2), "dropout": True},
        {"chosen": False, "ranks": (1, 0, 3, 2), "dropout": True},
        {"chosen": False, "gated": False},
    ],
    ids=str,
)
def test_every_way_to_compute_it_is_the_sum_over_pairs(case, monkeypatch):
    monkeypatch.setattr("loramoe_train.experts.pairs.CHUNK_ELEMENTS", 10 * F)  # several pieces
    monkeypatch.setattr("loramoe_train.experts.grouped.CHUNK_ELEMENTS", 10 * F)
    how, arguments = made(**case)
    leaves, found = leaves_of(arguments), []
    *wide, hidden, factors, weights, experts_NK, kept = arguments
    drop = (None, 1.0) if kept is None else (kept.mask_ND, kept.factor)
    ways = (
        lambda: mix(how, *arguments),
        lambda: _forward(how, *wide, *hidden, *factors, weights, experts_NK, *drop),  # as it is compiled
        lambda: by_hand(how, *arguments),
    )
    for way in ways:
        mixed, low = way()
        generator = torch.Generator().manual_seed(1)
        loss = sum((t * torch.randn(t.shape, generator=generator, dtype=t.dtype)).sum() for t in (mixed, low))
        found.append((mixed, low, *torch.autograd.grad(loss, leaves)))
    for ours in found[:2]:
        for one, other in zip(ours, found[2], strict=True):
            torch.testing.assert_close(one, other)


@pytest.mark.parametrize("form", ["concatenated", "grouped"])
def test_nothing_wide_is_kept_but_what_the_frozen_layers_gave(form):
    how, arguments = made(form=form)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        mix(how, *arguments)
    assert sum(t.shape == (N, F) for t in kept) == 2 and not [t for t in kept if t.numel() > N * 2 * E]
