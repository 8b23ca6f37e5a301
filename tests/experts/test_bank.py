"""The stacked bank against the loop over tokens and experts, in values and all gradients."""

import pytest
import torch
from torch import nn

from loramoe_train.experts.bank import ExpertBank
from loramoe_train.experts.linear import ExpertLinear
from loramoe_train.routing.context import RoutingContext
from loramoe_train.routing.types import Tokens
from tests.reference import mixture


def make_bank(ranks, d_in=5, d_out=7, seed=0, **kwargs):
    generator = torch.Generator().manual_seed(seed)
    bank = ExpertBank(
        d_in, d_out, ranks=ranks, scales=[0.5 + e for e in range(len(ranks))], generator=generator, **kwargs
    )
    bank.up.data = torch.randn(bank.up.shape, generator=generator)
    return bank


def pairs(bank, down, up):
    return [(down[bank.columns(e)], up[:, bank.columns(e)], bank.scales[e]) for e in range(bank.num_experts)]


@pytest.mark.parametrize("ranks", [(2,), (2, 2, 2), (1, 4, 0, 3)])
@pytest.mark.parametrize("tokens", [0, 1, 6])
def test_equals_the_loop_in_values_and_gradients(ranks, tokens):
    bank = make_bank(ranks).double()
    base = nn.Linear(5, 7).double()
    x = torch.randn(tokens, 5, dtype=torch.float64, requires_grad=True)
    w = torch.rand(tokens, len(ranks), dtype=torch.float64)
    w[w < 0.3] = 0.0
    w.requires_grad_()
    fast = base(x) + bank(x, w)
    inputs = [x, w, bank.down, bank.up]
    probe = torch.randn_like(fast)
    fast_grads = torch.autograd.grad((fast * probe).sum(), inputs)
    if tokens == 0:
        assert all(torch.isfinite(g).all() for g in fast_grads)
        return
    slow = mixture(x, base.weight, base.bias, pairs(bank, bank.down, bank.up), w)
    slow_grads = torch.autograd.grad((slow * probe).sum(), inputs)
    torch.testing.assert_close(fast, slow)
    for ours, twin in zip(fast_grads, slow_grads, strict=True):
        torch.testing.assert_close(ours, twin)


def test_a_fresh_bank_adds_exactly_nothing():
    bank = ExpertBank(4, 3, ranks=(2, 2), scales=(1.0, 1.0))
    x = torch.randn(5, 4)
    assert torch.equal(bank(x, torch.rand(5, 2)), torch.zeros(5, 3))


def test_no_weights_means_every_expert_counts_once():
    bank = make_bank((2, 3))
    x = torch.randn(4, 5)
    torch.testing.assert_close(bank(x, None), bank(x, torch.ones(4, 2)))


def test_delta_is_the_merged_weight():
    bank = make_bank((2, 3))
    x, w = torch.randn(4, 5), torch.zeros(4, 2)
    w[:, 1] = 1.0
    torch.testing.assert_close(bank(x, w), x @ bank.delta(1).T, rtol=1e-5, atol=1e-5)


def test_idle_expert_gets_a_zero_gradient_not_none():
    bank = make_bank((2, 3))
    w = torch.tensor([[1.0, 0.0]] * 4)
    bank(torch.randn(4, 5), w).sum().backward()
    assert torch.equal(bank.down.grad[bank.columns(1)], torch.zeros(3, 5))
    assert bank.down.grad[bank.columns(0)].abs().sum() > 0


def test_dropout_is_off_for_frozen_experts():
    bank = make_bank((2, 3), dropout=0.5).train()
    x, w = torch.randn(4, 5), torch.rand(4, 2)
    assert not torch.equal(bank(x, w), bank(x, w))
    bank.requires_grad_(False)
    assert torch.equal(bank(x, w), bank(x, w))


def test_initialisation_depends_on_the_generator_alone():
    torch.manual_seed(1)
    one = make_bank((2, 2)).down
    torch.manual_seed(2)
    assert torch.equal(one, make_bank((2, 2)).down)


def test_bad_ranks():
    with pytest.raises(ValueError, match="one non-negative rank"):
        ExpertBank(4, 4, ranks=(2, -1), scales=(1.0, 1.0))


def facts(n, domains=None):
    domain = torch.zeros(n, dtype=torch.long) if domains is None else torch.tensor(domains)
    return Tokens(domain >= 0, domain, domain, domain >= 0)


def test_training_outside_the_context_is_refused_and_evaluation_is_not():
    context = RoutingContext()
    layer = ExpertLinear(nn.Linear(5, 7), make_bank((2,)), None, site="s", context=context)
    with pytest.raises(RuntimeError, match="outside"):
        layer(torch.randn(1, 3, 5))
    assert layer.eval()(torch.randn(1, 3, 5)).shape == (1, 3, 7)
    assert context.records == {}


def test_off_is_the_base_bit_for_bit():
    context = RoutingContext()
    base = nn.Linear(5, 7)
    layer = ExpertLinear(base, make_bank((2, 2)), None, site="s", context=context)
    x = torch.randn(2, 3, 5)
    with context.override("off"):
        assert torch.equal(layer(x), base(x))
    assert not torch.equal(layer.eval()(x), base(x))


@pytest.mark.parametrize("num_domains", [1, 2, 3, 5])
def test_hard_routing_gives_each_domain_its_own_expert(num_domains):
    """Values and gradients equal single experts that saw only their domain's tokens."""
    context = RoutingContext(num_domains)
    base, bank = nn.Linear(5, 7).double(), make_bank((2,) * num_domains).double()
    layer = ExpertLinear(base, bank, None, site="s", context=context)
    domains = [d % num_domains for d in range(8)] + [-1]
    x = torch.randn(9, 5, dtype=torch.float64)
    with context.override("by_domain"), context.open(facts(9, domains)):
        y = layer(x.view(3, 3, 5)).view(9, 7)
    grads = torch.autograd.grad(y.square().sum(), [bank.down, bank.up])
    for d in range(num_domains):
        own = [n for n, domain in enumerate(domains) if domain == d]
        down, up = bank.down[bank.columns(d)], bank.up[:, bank.columns(d)]
        single = base(x[own]) + bank.scales[d] * x[own] @ down.T @ up.T
        torch.testing.assert_close(y[own], single)
        alone = torch.autograd.grad(single.square().sum(), [bank.down, bank.up])
        torch.testing.assert_close(grads[0][bank.columns(d)], alone[0][bank.columns(d)])
        torch.testing.assert_close(grads[1][:, bank.columns(d)], alone[1][:, bank.columns(d)])
    torch.testing.assert_close(y[8], base(x[8]))


def test_uniform_is_the_average():
    context = RoutingContext()
    bank = make_bank((2, 3))
    layer = ExpertLinear(nn.Linear(5, 7), bank, None, site="s", context=context).eval()
    x = torch.randn(4, 5)
    with context.override("uniform"):
        expected = layer.base(x) + x @ ((bank.delta(0) + bank.delta(1)) / 2).T
        torch.testing.assert_close(layer(x), expected)
