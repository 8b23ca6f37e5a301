"""Experts that start from the weight's leading directions: a float64 loop, PEFT's PiSSA, the start at the base."""

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from loramoe_train.build import attach
from loramoe_train.experts.adapters import adapter_tensors, load_weights
from loramoe_train.experts.fold import fold
from loramoe_train.experts.peft_folder import write_peft_folder
from loramoe_train.experts.principal import PrincipalBank
from tests.composing import composed
from tests.conftest import make_llama
from tests.experts.test_bank import layer_of, pairs, run, some_weights
from tests.reference import mixture
from tests.test_routed_model import DOMAINS, facts, ids_of, route

SIZES = ("experts.rank=2", "experts.alpha=4", "experts.dropout=0")
MIXED = ("experts=principal", "experts.layout=3", "router=topk", *SIZES)


def make_layer(experts, *, rank=2, form="auto", weights=None, most=None, dtype=torch.float64):
    bank = PrincipalBank(8, 12, ranks=(rank,) * experts, scales=(0.5,) * experts, form=form).to(dtype)
    torch.manual_seed(experts)
    return layer_of(bank, weights, most, nn.Linear(8, 12).to(dtype).requires_grad_(False))


@pytest.mark.parametrize(("experts", "most", "form"), [(1, None, "auto"), (3, None, "auto"), (6, 2, "grouped")])
def test_equals_the_loop_in_values_and_gradients(experts, most, form):
    """Without the start, an expert of weight - sum_e w_e, whose pair does not train."""
    w = None if experts == 1 else some_weights(7, experts, most or experts).requires_grad_()
    layer = make_layer(experts, form=form, weights=w, most=most)
    bank, base = layer.bank, layer.base
    x = torch.randn(7, 8, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(run(layer, x), base(x))
    with torch.no_grad():
        bank.down.normal_(), bank.up.normal_()
    fast = run(layer, x)
    probe = torch.randn_like(fast)
    inputs = [x, bank.down, bank.up, *([w] if w is not None else [])]
    fast_grads = torch.autograd.grad((fast * probe).sum(), inputs)
    exact = [t.detach().clone().requires_grad_() for t in inputs]
    weights = torch.ones(7, 1, dtype=torch.float64) if w is None else exact[3]
    start = (bank.start_down, bank.start_up.T, 0.5)
    together = torch.cat([weights, -weights.sum(dim=1, keepdim=True)], dim=1)
    slow = mixture(exact[0], base.weight, base.bias, [*pairs(bank, exact[1], exact[2]), start], together)
    slow_grads = torch.autograd.grad((slow * probe).sum(), exact)
    torch.testing.assert_close(fast, slow)
    for number, (ours, twin) in enumerate(zip(fast_grads, slow_grads, strict=True)):
        used = w != 0 if number == 3 else 1.0  # nobody reads the gradient of a weight that selection set to zero
        assert (twin * used).abs().sum() > 0
        torch.testing.assert_close(ours * used, twin * used)


def test_equals_pefts_layer_in_start_values_and_gradients():
    layer = make_layer(1, rank=4, dtype=torch.float32)
    bank = layer.bank
    config = LoraConfig(r=4, lora_alpha=2, target_modules=["a"], init_lora_weights="pissa")
    theirs = get_peft_model(nn.ModuleDict({"a": copy.deepcopy(layer.base)}), config).base_model.model["a"]
    down, up = theirs.lora_A["default"].weight, theirs.lora_B["default"].weight
    close = {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(bank.start_up.T @ bank.start_down, up @ down, **close)
    torch.testing.assert_close(bank.start_down.norm(dim=1), down.norm(dim=1), **close)
    with torch.no_grad():
        down.add_(0.1 * torch.randn_like(down)), up.add_(0.1 * torch.randn_like(up))
        bank.down.copy_(down), bank.up.copy_(up.T)
    x = torch.randn(5, 8, requires_grad=True)
    ours, expected = run(layer, x), theirs(x)
    torch.testing.assert_close(ours, expected, **close)
    found = torch.autograd.grad(ours.square().sum(), [x, bank.down, bank.up])
    wanted = torch.autograd.grad(expected.square().sum(), [x, down, up])
    for one, other in zip(found, (*wanted[:2], wanted[2].T), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def test_a_model_starts_as_the_base_and_is_stored_with_its_start(tmp_path):
    base, ids, close = make_llama(vocab_size=50), ids_of(), {"rtol": 1e-4, "atol": 1e-5}
    config = composed(*MIXED, "experts.dropout=0.3")
    routed = route(copy.deepcopy(base), config)
    with torch.no_grad():
        expected = base(ids).logits
        torch.testing.assert_close(routed.model(ids).logits, expected, **close)
        with routed.context.open(facts(ids)):  # whatever is dropped
            torch.testing.assert_close(routed.model.train()(ids, use_cache=False).logits, expected, **close)
        for site, layer in routed.layers.items():
            assert torch.linalg.matrix_norm(layer.bank.start_up.T @ layer.bank.start_down, ord=2) > 0.05, site
            layer.bank.down.add_(0.3 * torch.randn_like(layer.bank.down))
        tensors = adapter_tensors(routed.layers)
        again = attach(config, make_llama(vocab_size=50, seed=7), routed.plan, num_domains=3)  # another start
        again.model.load_state_dict(
            {name: value for name, value in routed.model.state_dict().items() if ".start_" not in name}, strict=False
        )
        trained = routed.model.eval()(ids).logits
        assert not torch.allclose(again.model.eval()(ids).logits, trained, **close)
        load_weights(again.tensors(), tensors, "x")
        assert torch.equal(again.model(ids).logits, trained) and not torch.allclose(trained, expected, **close)
        with routed.context.override("uniform"):
            wanted = routed.model(ids).logits
    write_peft_folder(tmp_path / "a", fold(routed.plan, tensors, "uniform", domains=DOMAINS), base_model="tiny")
    with torch.no_grad():
        adapted = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "a").eval()
        torch.testing.assert_close(adapted(ids).logits, wanted, **close)


def test_the_start_never_trains_and_the_global_generator_is_left_alone():
    bank, base = PrincipalBank(8, 12, ranks=(2,), scales=(1.0,)), nn.Linear(8, 12)
    before = torch.get_rng_state()
    bank.begin(base)
    assert torch.equal(torch.get_rng_state(), before) and bank.start_up.abs().sum() > 0
    assert {name for name, _ in bank.named_parameters()} == {"down", "up"}


def test_bad_shapes():
    with pytest.raises(ValueError, match=r"one rank and one scale at a site, got ranks \[2, 3\]"):
        PrincipalBank(8, 12, ranks=(2, 3), scales=(1.0, 1.0))
    with pytest.raises(ValueError, match="a 12 x 8 weight has 8 directions, fewer than rank 9"):
        PrincipalBank(8, 12, ranks=(9,), scales=(1.0,))
