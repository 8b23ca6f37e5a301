"""A shared down factor: a bank of tied pairs in value and gradient, counted once, exported exactly."""

import pytest
import torch

from loramoe_train.experts.adapters import adapter_tensors
from loramoe_train.experts.bank import ExpertBank
from loramoe_train.experts.fold import fold
from loramoe_train.experts.shared_down import SharedDownBank
from tests.composing import composed
from tests.conftest import make_llama
from tests.test_routed_model import DOMAINS, facts, ids_of, route, stir

SHARED = ("experts=shared_down", "experts.layout=3", "experts.rank=2", "experts.alpha=4")


def both(*overrides):
    """The same model with shared and with tied factors."""
    pair = []
    for option in ("experts=shared_down", "experts=default"):
        routed = route(make_llama(vocab_size=50), composed(*SHARED, option, *overrides))
        stir(routed)
        pair.append(routed)
    shared, tied = pair
    with torch.no_grad():
        for site, layer in tied.layers.items():
            layer.bank.down.copy_(shared.layers[site].bank.down.repeat(3, 1))
            layer.bank.up.copy_(shared.layers[site].bank.up)
            layer.router.score.weight.copy_(shared.layers[site].router.score.weight)
    return shared, tied


@pytest.mark.parametrize("router", ["soft", "topk"])
def test_it_is_a_bank_of_tied_pairs(router):
    shared, tied = both(f"router={router}")
    ids, logits = ids_of(), []
    for routed in (shared, tied):
        routed.model.train()
        with routed.context.open(facts(ids)):
            out = routed.model(ids, use_cache=False).logits
            out.square().mean().backward()
        logits.append(out.detach())
    torch.testing.assert_close(*logits, rtol=1e-5, atol=1e-6)
    for site, layer in shared.layers.items():
        other = tied.layers[site].bank
        assert layer.bank.down.grad.abs().sum() > 0
        summed = other.down.grad.unflatten(0, (3, 2)).sum(0)
        torch.testing.assert_close(layer.bank.down.grad, summed, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(layer.bank.up.grad, other.up.grad, rtol=1e-4, atol=1e-6)


def test_evaluation_and_decoding():
    shared, tied = both("router=soft")
    ids = ids_of()
    with torch.no_grad():
        ours, theirs = (routed.model.eval()(ids, use_cache=False).logits for routed in (shared, tied))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_it_starts_as_the_base_and_counts_the_factor_once():
    base = make_llama(vocab_size=50)
    ids = ids_of()
    with torch.no_grad():
        before = base(ids, use_cache=False).logits
        routed = route(base, composed(*SHARED))
        assert torch.equal(routed.model(ids, use_cache=False).logits, before)
    for layer in routed.layers.values():
        bank = layer.bank
        assert bank.down.shape == (2, bank.d_in) and bank.up.shape == (6, bank.d_out)
        assert bank.active_parameters(2) == 2 * bank.d_in + 4 * bank.d_out


def test_a_static_route_is_one_lora_of_one_experts_rank():
    routed = route(make_llama(vocab_size=50), composed(*SHARED))
    stir(routed)
    factors = fold(routed.plan, adapter_tensors(routed.layers), "uniform", domains=DOMAINS)
    for site, pair in factors.items():
        bank = routed.layers[site].bank
        assert pair.down.shape[0] == 2
        expected = sum(bank.delta(e) for e in range(3)) / 3
        torch.testing.assert_close(pair.up @ pair.down, expected.detach())


def test_the_same_seed_draws_the_same_factor_and_unequal_experts_are_refused():
    draws = [torch.Generator().manual_seed(3) for _ in range(2)]
    one = SharedDownBank(4, 5, ranks=(2, 2), scales=(1.0, 1.0), generator=draws[0])
    two = ExpertBank(4, 5, ranks=(2, 2), scales=(1.0, 1.0), generator=draws[1])
    assert torch.equal(one.down, two.down[:2])
    with pytest.raises(ValueError, match=r"one rank and one scale, got ranks \[2, 4\]"):
        SharedDownBank(4, 5, ranks=(2, 4), scales=(1.0, 1.0))
