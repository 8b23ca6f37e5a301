"""Auxiliary losses against loops, closed-form gradients, padding, and splits over ranks and micro-batches."""

import math

import pytest
import torch

from loramoe_train.aux_losses.gate_supervision import GateSupervision
from loramoe_train.aux_losses.load_balance import LoadBalance
from loramoe_train.aux_losses.localized_balance import LocalizedBalance
from loramoe_train.aux_losses.neg_log_mean import NegLogMean
from loramoe_train.aux_losses.router_z import RouterZ
from loramoe_train.aux_losses.routing_entropy import RoutingEntropy
from loramoe_train.aux_losses.routing_specialization import RoutingSpecialization
from loramoe_train.routing.types import Routing, Tokens
from tests import reference
from tests.aux_losses.made import records_of, tokens_of, whole

MASK = [True, True, False, True, True, False, True]


@pytest.mark.parametrize("sign", ["minus", "plus"])
@pytest.mark.parametrize("top_k", [1, 3])
def test_rsl_equals_the_loop_and_the_closed_form_gradient(sign, top_k):
    torch.manual_seed(0)
    logits = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    loss = RoutingSpecialization(top_k=top_k, balance_coef=0.3, entropy_coef=0.2, entropy_sign=sign)
    value = whole(loss, records_of(a=logits), tokens_of(MASK))
    (grad,) = torch.autograd.grad(value, logits)
    arguments = (top_k, 0.3, 0.2, -1.0 if sign == "minus" else 1.0)
    torch.testing.assert_close(value, reference.routing_specialization(logits, MASK, *arguments), rtol=1e-6, atol=1e-9)
    expected = reference.routing_specialization_gradient(logits.detach(), MASK, *arguments)
    torch.testing.assert_close(grad, expected, rtol=1e-6, atol=1e-9)


def test_rsl_at_uniform_routing_has_the_known_values():
    logits = torch.zeros(4, 6)
    loss = RoutingSpecialization(top_k=3, balance_coef=1.0, entropy_coef=0.0)
    assert whole(loss, records_of(a=logits), tokens_of([True] * 4)).item() == pytest.approx(1 / 6)
    loss = RoutingSpecialization(top_k=3, balance_coef=0.0, entropy_coef=1.0)
    assert whole(loss, records_of(a=logits), tokens_of([True] * 4)).item() == pytest.approx(-math.log(6))


def test_rsl_averages_or_adds_sites_with_unequal_counts():
    torch.manual_seed(0)
    logits = {"a": torch.randn(7, 3), "b": torch.randn(7, 5), "c": torch.randn(7, 3)}
    ks = {"a": 1, "b": 2, "c": 3}
    singles = [reference.routing_specialization(logits[s].double(), MASK, ks[s], 0.3, 0.2, -1.0) for s in logits]
    for reduction, expected in (("mean", sum(singles) / 3), ("sum", sum(singles))):
        loss = RoutingSpecialization(top_k=ks, balance_coef=0.3, entropy_coef=0.2, reduction=reduction)
        value = whole(loss, records_of(**logits), tokens_of(MASK))
        torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-7)


LOSSES = [
    RoutingSpecialization(top_k=2, balance_coef=0.3, entropy_coef=0.2),
    LoadBalance(top_k=2),
    LoadBalance(top_k=2, factor="one", reduction="sum"),
    RouterZ(),
    LoadBalance(top_k=2, pool="layer", share="per_token"),
    LoadBalance(top_k=None, counts="mass", share="per_token", pool="model"),
    LoadBalance(top_k=None, counts="kept", pool="model", reduction="sum"),
    LoadBalance(top_k=1, factor="one", pool="sample"),
    LocalizedBalance(delta=0.2, tasks=("one", "two")),
    RoutingEntropy(),
    RoutingEntropy(kind="renyi", order=2.0, normalised=False),
    GateSupervision(num_domains=4),
    NegLogMean(),
    NegLogMean(tokens="example"),
]
every_loss = pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: type(loss).__name__)


@every_loss
def test_padding_changes_nothing(loss):
    torch.manual_seed(0)
    logits = torch.randn(5, 4)
    padded = torch.cat([logits, 50 * torch.randn(9, 4)])
    plain = whole(loss, records_of(a=logits), tokens_of([True] * 5, tasks=[0, 0, 1, 1, 1], samples=[0, 0, 1, 1, 1]))
    tokens = tokens_of([True] * 5 + [False] * 9, tasks=[0, 0] + [1] * 12, samples=[0, 0] + [1] * 12)
    torch.testing.assert_close(whole(loss, records_of(a=padded), tokens), plain)


@every_loss
def test_shares_add_up_to_the_loss_of_the_union(loss):
    """Values and gradients, for parts of unequal size, one of them all padding; examples lie in one part each."""
    torch.manual_seed(0)
    logits = {s: torch.randn(12, 4, dtype=torch.float64, requires_grad=True) for s in ("a", "b")}
    mask = [True, False, True, True, True, True, False, False, False, True, True, True]
    samples, tasks = [0, 0, 0, 1, 1, 2, 3, 3, 3, 4, 4, 4], [0, 0, 0, 1, 1, 1, 0, 0, 0, 1, 1, 1]
    value = whole(loss, records_of(**logits), tokens_of(mask, tasks=tasks, samples=samples))
    grads = torch.autograd.grad(value, list(logits.values()))
    parts = []
    for c in (slice(0, 5), slice(5, 6), slice(6, 9), slice(9, 12)):
        own = [sample - samples[c][0] for sample in samples[c]]
        parts.append(
            (records_of(**{s: v[c] for s, v in logits.items()}), tokens_of(mask[c], tasks=tasks[c], samples=own))
        )
    summed = sum(loss.statistics(records, tokens) for records, tokens in parts)
    split = sum(loss(records, tokens, summed) for records, tokens in parts)
    torch.testing.assert_close(split, value)
    for one, other in zip(grads, torch.autograd.grad(split, list(logits.values())), strict=True):
        torch.testing.assert_close(one, other)


def test_statistics_have_no_gradient():
    logits = torch.randn(4, 3, requires_grad=True)
    for loss in LOSSES:
        tokens = tokens_of([True] * 4, samples=[0] * 4)
        assert not loss.statistics(records_of(a=logits), tokens).requires_grad


@every_loss
def test_without_a_single_token_there_is_no_loss_and_no_nan(loss):
    logits = torch.randn(4, 4, requires_grad=True)
    value = whole(loss, records_of(a=logits), tokens_of([False] * 4, samples=[0] * 4))
    assert value.item() == 0.0
    (grad,) = torch.autograd.grad(value, logits)
    assert torch.isfinite(grad).all()


def test_load_balance_constants():
    """1 when balanced, E when every token picks one expert with certainty; 1/E and 1 without the factor."""
    balanced = 50.0 * torch.eye(4).repeat(2, 1)
    collapsed = torch.tensor([[50.0, 0, 0, 0]] * 8)
    for factor, even, one in (("experts", 1.0, 4.0), ("one", 0.25, 1.0)):
        loss = LoadBalance(top_k=1, factor=factor)
        assert whole(loss, records_of(a=balanced), tokens_of([True] * 8)).item() == pytest.approx(even)
        assert whole(loss, records_of(a=collapsed), tokens_of([True] * 8)).item() == pytest.approx(one)


def test_with_as_many_picks_as_experts_balance_has_no_gradient():
    logits = torch.randn(6, 3, requires_grad=True)
    value = whole(LoadBalance(top_k=3), records_of(a=logits), tokens_of([True] * 6))
    assert value.item() == pytest.approx(1.0)
    (grad,) = torch.autograd.grad(value, logits)
    assert grad.abs().max() < 1e-7


def test_router_z_by_hand():
    logits = torch.tensor([[0.0, 0.0], [1.0, 1.0]])
    expected = (math.log(2) ** 2 + (1 + math.log(2)) ** 2) / 2
    assert whole(RouterZ(), records_of(a=logits), tokens_of([True, True])).item() == pytest.approx(expected)


def test_only_supervised_tokens_on_request():
    torch.manual_seed(0)
    logits = torch.randn(4, 3)
    ids = torch.zeros(4, dtype=torch.long)
    tokens = Tokens(torch.ones(4, dtype=torch.bool), ids, ids, torch.tensor([False, True, True, False]))
    loss = RoutingSpecialization(top_k=1, tokens="supervised")
    every = RoutingSpecialization(top_k=1)
    torch.testing.assert_close(
        whole(loss, records_of(a=logits), tokens), whole(every, records_of(a=logits[1:3]), tokens_of([True, True]))
    )


def test_unknown_names_are_refused():
    for bad in ({"entropy_sign": "up"}, {"reduction": "max"}, {"tokens": "all"}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            RoutingSpecialization(top_k=1, **bad)
    with pytest.raises(ValueError, match="factor"):
        LoadBalance(top_k=1, factor="two")


def test_a_site_without_logits_is_named():
    with pytest.raises(ValueError, match="q has no learned routing"):
        LoadBalance(top_k=1).statistics({"q": Routing(torch.ones(2, 1))}, tokens_of([True, True]))
