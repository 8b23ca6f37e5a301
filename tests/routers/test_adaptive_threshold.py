"""The adaptive threshold: contract, numbers by hand, the token for which no expert is above it."""

import math

import pytest
import torch

from loramoe_train.routers.adaptive_threshold import AdaptiveThreshold
from loramoe_train.routing.context import RoutingContext
from tests.contracts import check_router


def test_contract():
    check_router(AdaptiveThreshold)


def test_weights_by_hand():
    router = AdaptiveThreshold(1, 3)
    p = [0.6, 0.35, 0.05]
    with torch.no_grad():
        router.gate.copy_(torch.tensor(p).log().unsqueeze(-1))
        router.threshold.zero_(), router.threshold_bias.fill_(math.log(0.9 / 0.1))
    routing = router(torch.ones(1, 1), RoutingContext())
    tau = 0.9 / 3
    torch.testing.assert_close(routing.p_NE[0], torch.tensor([q - tau for q in p]))
    torch.testing.assert_close(routing.weights_NE[0], torch.tensor([0.3 / 0.35, 0.05 / 0.35, 0.0]))


def test_nobody_above_the_threshold():
    router = AdaptiveThreshold(2, 4, ceiling=1.0)
    with torch.no_grad():
        router.threshold_bias.fill_(50.0)
    routing = router(torch.zeros(1, 2), RoutingContext())
    routing.weights_NE.sum().backward()
    assert not routing.weights_NE.any()
    assert all(torch.isfinite(p.grad).all() for p in router.parameters())


def test_the_default_ceiling_keeps_an_expert_for_every_token():
    torch.manual_seed(0)
    w = AdaptiveThreshold(6, 5)(3 * torch.randn(200, 6), RoutingContext()).weights_NE
    active = (w > 0).sum(dim=-1)
    assert active.min() >= 1 and len(active.unique()) > 2


@pytest.mark.parametrize("ceiling", [0.0, 1.5])
def test_bad_ceiling(ceiling):
    with pytest.raises(ValueError, match="ceiling must lie in"):
        AdaptiveThreshold(2, 2, ceiling=ceiling)
