"""Selections against loops over sorted experts, and DynMoLE's active counts."""

import pytest
import torch

from loramoe_train.routers.router import Policy, Router
from loramoe_train.routers.scores import LinearScore
from loramoe_train.routers.select import EntropySwitch, Threshold, TopP
from loramoe_train.routing.context import RoutingContext
from tests.contracts import check_router


def kept_by(select, p):
    return [e for e, kept in enumerate(select(torch.tensor([p]))[0].tolist()) if kept]


def dynmole(experts=8):
    return EntropySwitch(TopP(0.75, experts, "excluded", min(2, experts)), above=0.9)


@pytest.mark.parametrize("make", [lambda e: TopP(0.6, e), lambda e: Threshold(0.3), lambda e: dynmole(e)])
@pytest.mark.parametrize("weight", ["renormalised", "probability"])
def test_contracts(make, weight):
    def router(d_in, experts):
        policy = Policy(make(experts), weight)
        return Router(score=LinearScore(d_in, experts), train=policy, evaluate=policy)

    check_router(router, sums_to_one=weight == "renormalised")


@pytest.mark.parametrize("crossing", ["included", "excluded"])
@pytest.mark.parametrize("at_least", [1, 3])
def test_top_p_against_the_loop(crossing, at_least):
    torch.manual_seed(0)
    p_NE = torch.randn(50, 6).mul(2).softmax(-1)
    kept_NE = TopP(0.7, 6, crossing, at_least)(p_NE)
    for row, kept in zip(p_NE.tolist(), kept_NE.tolist(), strict=True):
        total, expected = 0.0, set()
        for rank, e in enumerate(sorted(range(6), key=lambda e, row=row: -row[e])):
            inside = total < 0.7 if crossing == "included" else total + row[e] <= 0.7
            total += row[e]
            if inside or rank < at_least:
                expected.add(e)
        assert {e for e in range(6) if kept[e]} == expected


def test_the_crossing_expert():
    p = [0.5, 0.3, 0.15, 0.05]
    assert kept_by(TopP(0.6, 4), p) == [0, 1] and kept_by(TopP(0.6, 4, "excluded"), p) == [0]
    assert kept_by(TopP(1.0, 4), p) == [0, 1, 2, 3] and kept_by(TopP(0.1, 4, "excluded"), p) == [0]


def test_threshold_keeps_the_best_in_any_case():
    assert kept_by(Threshold(0.3), [0.5, 0.3, 0.2]) == [0, 1]
    assert kept_by(Threshold(0.9), [0.2, 0.5, 0.3]) == [1]


@pytest.mark.parametrize(
    ("p", "active", "mass"),
    [
        ([1 / 8] * 8, 8, 1.0),
        ([0.93] + [0.01] * 7, 2, 0.94),
        ([0.45, 0.35] + [0.2 / 6] * 6, 2, 0.80),
        ([0.3, 0.2, 0.15, 0.1, 0.1, 0.05, 0.05, 0.05], 8, 1.0),
    ],
)
def test_dynmoles_active_counts(p, active, mass):
    """Eight experts, top-p 0.75 without the crossing expert, two at least, all above entropy 0.9. [measured]"""
    w = Policy(dynmole())(torch.tensor([p]).log(), "softmax").weights_NE
    assert int((w > 0).sum()) == active and w.sum().item() == pytest.approx(mass, abs=1e-5)


def test_the_switch_can_be_turned_off():
    off = EntropySwitch(TopP(0.75, 4, "excluded", 2), above=1.0 + 1e-6)
    assert kept_by(off, [0.25] * 4) == [0, 1, 2] and kept_by(dynmole(4), [0.25] * 4) == [0, 1, 2, 3]


def test_selections_with_equal_settings_are_asked_together():
    one, two = (Policy(dynmole()) for _ in range(2))
    assert one.is_like(two) and not one.is_like(Policy(dynmole(6)))
    joint = one(torch.randn(5, 3, 8), "softmax").weights_NE  # three routers at once
    assert joint.shape == (5, 3, 8)


def test_without_a_bound_there_is_no_list_of_the_chosen():
    assert Policy(dynmole()).most is None
    router = Router(score=LinearScore(4, 8), train=Policy(TopP(0.5, 8)), evaluate=Policy(TopP(0.5, 8)))
    assert router(torch.randn(3, 4), RoutingContext()).chosen is None


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TopP(0.0, 4), r"top_p must lie in \(0, 1\], got 0.0"),
        (lambda: TopP(0.5, 4, "both"), "included or excluded, got 'both'"),
        (lambda: TopP(0.5, 2, at_least=3), "the layer's 2 experts, got 3"),
        (lambda: Threshold(1.0), "floor must lie strictly between 0 and 1, got 1.0"),
        (lambda: EntropySwitch(Threshold(0.5), above=-1), "above must not be negative"),
        (lambda: EntropySwitch(Threshold(0.5), above=0.5, order=0), "order must be positive"),
    ],
)
def test_bad_values(make, message):
    with pytest.raises(ValueError, match=message):
        make()
