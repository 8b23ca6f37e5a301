"""The multi-layer score: contract, the equation by hand, dropout, heads, bad values."""

import pytest
import torch

from loramoe_train.routers.router import Policy, Router
from loramoe_train.routers.scores import MLPScore
from loramoe_train.routers.select import All
from loramoe_train.routing.context import RoutingContext
from tests.contracts import check_router


def test_contract():
    policy = Policy(All())
    check_router(lambda d, e: Router(score=MLPScore(d, e, depth=2, width=8), train=policy, evaluate=policy))


@pytest.mark.parametrize("heads", [None, 2])
def test_logits_by_hand(heads):
    """Token by token, layer by layer, in float64."""
    torch.manual_seed(0)
    score = MLPScore(4, 3, depth=3, width=5, heads=heads).double()
    x = torch.randn(6, 4, dtype=torch.float64)
    rows = []
    for a in x:
        for number, layer in enumerate(score.layers):
            a = torch.stack([sum(w * v for w, v in zip(row, a, strict=True)) for row in layer.weight]) + layer.bias
            a = torch.where(a > 0, a, 0) if number < 2 else a
        rows.append(a if heads is None else a.view(heads, 3))
    torch.testing.assert_close(score(x), torch.stack(rows))
    assert [tuple(layer.weight.shape) for layer in score.layers] == [(5, 4), (5, 5), (3 * (heads or 1), 5)]


def test_dropout_is_of_hidden_layers_in_training_alone():
    torch.manual_seed(0)
    x, deep, flat = torch.randn(50, 4), MLPScore(4, 3, depth=2, width=16, dropout=0.5), MLPScore(4, 3, dropout=0.5)
    assert not torch.equal(deep(x), deep(x)) and torch.equal(flat(x), flat(x))
    deep.eval()
    assert torch.equal(deep(x), deep(x))


def test_starts():
    zeros = Router(score=MLPScore(4, 5, depth=2, init="zeros"), train=Policy(All()), evaluate=Policy(All()))
    weights = zeros(torch.randn(3, 4), RoutingContext()).weights_NE
    torch.testing.assert_close(weights, torch.full((3, 5), 0.2))
    one, two = (MLPScore(4, 5, depth=2, generator=torch.Generator().manual_seed(7)) for _ in range(2))
    for layer, other in zip(one.layers, two.layers, strict=True):
        assert torch.equal(layer.weight, other.weight) and layer.weight.any() and layer.bias.any()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"depth": 0}, "depth and width must be at least 1, got 0 and 2048"),
        ({"width": 0}, "got 1 and 0"),
        ({"dropout": 1.0}, r"dropout must lie in \[0, 1\), got 1.0"),
        ({"init": "ones"}, "init must be zeros or kaiming, got 'ones'"),
    ],
)
def test_bad_values(changes, message):
    with pytest.raises(ValueError, match=message):
        MLPScore(4, 3, **changes)
