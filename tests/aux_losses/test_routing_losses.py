"""Localized balance, entropies and gate supervision: against loops, and their constants."""

import math

import pytest
import torch
from torch.nn import functional

from loramoe_train.aux_losses.gate_supervision import GateSupervision
from loramoe_train.aux_losses.localized_balance import LocalizedBalance
from loramoe_train.aux_losses.routing_entropy import RoutingEntropy
from loramoe_train.routing.entropy import normalised_entropy
from loramoe_train.routing.types import Routing
from tests.aux_losses import reference
from tests.aux_losses.made import records_of, tokens_of, whole

MASK = [True, True, False, True, True, False, True, True]
SAMPLES = [0, 0, 0, 0, 1, 1, 1, 1]
TASKS = [0, 0, 0, 0, 1, 1, 1, 1]
NAMES = ("world", "other")


def doubles(*sites, experts=4):
    torch.manual_seed(0)
    return {s: torch.randn(8, experts, dtype=torch.float64, requires_grad=True) for s in sites}


def same_gradients(one, other, logits):
    ours, twins = (torch.autograd.grad(v, list(logits.values()), retain_graph=True) for v in (one, other))
    for a, b in zip(ours, twins, strict=True):
        assert b.abs().sum() > 0
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


# -- localized balance -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("reduction", "experts"), [("sum", 4), ("mean", 4), ("sum", 5)])
def test_localized_balance_against_the_loop(reduction, experts):
    """Examples of different length (three tokens and two): no column counts for more. Five experts have no halves."""
    logits = doubles("a", "b", experts=experts)
    loss = LocalizedBalance(delta=0.3, tasks=NAMES, reduction=reduction)
    value = whole(loss, records_of(**logits), tokens_of(MASK, tasks=TASKS, samples=SAMPLES))
    samples = [[n for n in range(8) if MASK[n] and SAMPLES[n] == b] for b in (0, 1)]
    terms = [reference.localized(z.softmax(-1), samples, [0, 1], experts=experts, delta=0.3) for z in logits.values()]
    expected = sum(terms) / (2 if reduction == "mean" else 1)
    torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-9)
    same_gradients(value, expected, logits)


def test_its_minimum_gives_the_matching_half_less():
    """Delta 0.1, six experts: 0.45 on the half that is favoured by name, 0.55 on the other; the loss is about zero."""
    low, high = math.log(0.45 / 3), math.log(0.55 / 3)
    logits = torch.tensor([[low] * 3 + [high] * 3] * 2 + [[high] * 3 + [low] * 3] * 2)
    tokens = tokens_of([True] * 4, tasks=[0, 0, 1, 1], samples=[0, 0, 1, 1])
    loss = LocalizedBalance(delta=0.1, tasks=NAMES)
    assert whole(loss, records_of(a=logits), tokens).item() == pytest.approx(0.0, abs=1e-8)
    assert whole(loss, records_of(a=logits.flip(-1)), tokens).item() > 0.04  # not the other way round


def test_descent_finds_that_minimum():
    logits = torch.zeros(2, 6, dtype=torch.float64, requires_grad=True)
    tokens = tokens_of([True, True], tasks=[0, 1], samples=[0, 1])
    loss, optimizer = LocalizedBalance(delta=0.1, tasks=NAMES), torch.optim.Adam([logits], lr=0.02)
    for _ in range(300):
        optimizer.zero_grad()
        value = whole(loss, records_of(a=logits), tokens)
        value.backward()
        optimizer.step()
    halves = logits.detach().softmax(-1).view(2, 2, 3).sum(-1)
    torch.testing.assert_close(halves, torch.tensor([[0.45, 0.55], [0.55, 0.45]]).double(), atol=1e-3, rtol=0)
    assert value.item() < 1e-6


def test_groups_of_tasks():
    tasks = ("a", "b", "c")
    assert LocalizedBalance(delta=0.1, tasks=tasks).group_of == (0, 1, 0)
    assert LocalizedBalance(delta=0.1, tasks=tasks, groups=[["a"], ["b", "c"]]).group_of == (0, 1, 1)
    for groups, word in (([["a"], ["b"]], "'c' 0 times"), ([["a", "b", "c"], ["c"]], "'c' 2 times")):
        with pytest.raises(ValueError, match=word):
            LocalizedBalance(delta=0.1, tasks=tasks, groups=groups)
    with pytest.raises(ValueError, match="q has 1 experts for 2 groups"):
        LocalizedBalance(delta=0.1, tasks=tasks, num_experts={"q": 1})
    with pytest.raises(ValueError, match=r"delta must lie in \[0, 1\), got 1"):
        LocalizedBalance(delta=1.0, tasks=tasks)


# -- entropies ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "order"), [("tsallis", 1.1), ("tsallis", 2.0), ("tsallis", 1.0), ("renyi", 0.5)])
def test_entropy_against_the_loop(kind, order):
    logits = doubles("a", "b")
    value = whole(RoutingEntropy(kind=kind, order=order), records_of(**logits), tokens_of(MASK))
    measure = reference.tsallis if kind == "tsallis" else reference.renyi
    rows = [z.softmax(-1)[n] for z in logits.values() for n, used in enumerate(MASK) if used]
    expected = sum(measure(list(row), order) for row in rows) / len(rows)
    torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-9)
    same_gradients(value, expected, logits)


@pytest.mark.parametrize(
    ("p", "expected"),
    [
        ([1 / 8] * 8, 1.0),
        ([0.93] + [0.01] * 7, 0.173),
        ([0.45, 0.35] + [0.2 / 6] * 6, 0.677),
        ([0.3, 0.2, 0.15, 0.1, 0.1, 0.05, 0.05, 0.05], 0.903),
    ],
)
def test_values_of_dynmoles_entropy(p, expected):
    """Eight experts, order 1.1. [measured in the notes; the epsilon of the authors' code moves the third digit]"""
    assert normalised_entropy(torch.tensor(p).log(), "tsallis", 1.1).item() == pytest.approx(expected, abs=2e-3)


@pytest.mark.parametrize("kind", ["tsallis", "renyi"])
@pytest.mark.parametrize("order", [0.5, 1.0, 1.1])
def test_a_certain_router_has_entropy_zero_and_a_finite_gradient(kind, order):
    """The authors' epsilon makes it negative; a power or logarithm of 0 would make the gradient NaN."""
    logits = torch.tensor([[200.0, 0.0, -200.0]], requires_grad=True)
    value = whole(RoutingEntropy(kind=kind, order=order), records_of(a=logits), tokens_of([True]))
    value.backward()
    assert value.item() == pytest.approx(0.0, abs=1e-6) and torch.isfinite(logits.grad).all()


def test_entropy_of_one_expert_and_bad_orders():
    assert whole(RoutingEntropy(), records_of(a=torch.zeros(2, 1)), tokens_of([True] * 2)).item() == 1.0
    for bad, word in (({"order": 0.0}, "positive"), ({"kind": "shannon"}, "tsallis or renyi, got 'shannon'")):
        with pytest.raises(ValueError, match=word):
            RoutingEntropy(**bad)


# -- gate supervision --------------------------------------------------------------------------------------------------


def test_gate_supervision_is_the_mean_cross_entropy():
    logits = doubles("a", "b", experts=2)
    value = whole(GateSupervision(num_domains=2), records_of(**logits), tokens_of(MASK, tasks=TASKS))
    kept = torch.tensor(MASK)
    target = torch.tensor(TASKS)[kept]
    expected = sum(functional.cross_entropy(z[kept], target) for z in logits.values()) / 2
    torch.testing.assert_close(value, expected)
    same_gradients(value, expected, logits)
    with pytest.raises(ValueError, match=r"q has 3 experts for 2 domains.*experts.layout=per_domain"):
        GateSupervision(num_domains=2, num_experts={"q": 3})


def test_a_router_that_knows_the_domain_has_no_loss():
    logits = 100.0 * torch.eye(3)
    records = {"a": Routing(logits.softmax(-1), logits)}
    assert whole(GateSupervision(num_domains=3), records, tokens_of([True] * 3, tasks=[0, 1, 2])).item() < 1e-6
