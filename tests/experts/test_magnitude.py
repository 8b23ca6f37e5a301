"""Experts with magnitudes: whole adapted weights, built one by one in float64; PEFT's DoRA; what may go with them."""

import copy
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from loramoe_train.build import attach, check_parts_fit
from loramoe_train.errors import ConfigError
from loramoe_train.experts.adapters import adapter_tensors, load_weights
from loramoe_train.experts.compiled import compile_layers
from loramoe_train.experts.fold import fold
from loramoe_train.experts.magnitude import MagnitudeBank
from loramoe_train.experts.peft_folder import write_peft_folder
from loramoe_train.models import meta_model
from loramoe_train.site_plan import plan_sites
from tests.composing import composed
from tests.conftest import make_llama
from tests.experts.test_bank import layer_of, run, some_weights
from tests.test_routed_model import DOMAINS, facts, ids_of, make_mamba, route, stir

SIZES = ("experts.rank=2", "experts.alpha=4", "experts.dropout=0")
DORA = ("+recipe=dora", *SIZES)
MIXED = ("experts=magnitude", "experts.layout=3", "experts.sites=[attn_in]", *SIZES)


def whole_outputs(x_ND, weight_OD, bias_O, experts, w_NE):
    """b + sum_e w_e W_e x + (1 - sum_e w_e) W x, token by token and row by row; `experts`: (down, up, scale, m)."""
    rows = []
    for n in range(x_ND.shape[0]):
        y_O = bias_O + (1.0 - w_NE[n].sum()) * (weight_OD @ x_ND[n])
        for e, (down, up, scale, m_O) in enumerate(experts):
            adapted_OD = weight_OD + scale * (up.T @ down)
            norm_O = torch.stack([row.detach().norm() for row in adapted_OD])
            y_O = y_O + w_NE[n, e] * ((m_O / norm_O)[:, None] * adapted_OD) @ x_ND[n]
        rows.append(y_O)
    return torch.stack(rows)


def make_layer(experts, *, rank=2, form="auto", dropout=0.0, weights=None, most=None, bias=True, dtype=torch.float64):
    generator = torch.Generator().manual_seed(experts)
    scales = [0.5] * experts
    bank = MagnitudeBank(
        8, 12, ranks=(rank,) * experts, scales=scales, form=form, dropout=dropout, generator=generator
    ).to(dtype)
    base = nn.Linear(8, 12, bias=bias).to(dtype).requires_grad_(False)
    layer = layer_of(bank, weights, most, base)
    with torch.no_grad():
        bank.up.normal_(0, 0.5, generator=generator)
        bank.magnitude.mul_(1.0 + torch.rand(bank.magnitude.shape, generator=generator, dtype=dtype))
    return layer


@pytest.mark.parametrize(
    ("experts", "most", "form", "bias"),
    [(1, None, "auto", True), (3, None, "auto", False), (4, 2, "concatenated", True), (6, 2, "grouped", True)],
)
def test_equals_the_loop_in_values_and_gradients(experts, most, form, bias):
    w = None
    if experts > 1:
        w = some_weights(7, experts, most or experts)
        w = (w / w.sum(dim=1, keepdim=True).clamp(min=1e-9)).requires_grad_()  # the first token has no expert
    layer = make_layer(experts, form=form, weights=w, most=most, bias=bias)
    bank, base = layer.bank, layer.base
    x = torch.randn(7, 8, dtype=torch.float64, requires_grad=True)
    fast = run(layer, x)
    probe = torch.randn_like(fast)
    inputs = [x, bank.down, bank.up, bank.magnitude, *([w] if w is not None else [])]
    fast_grads = torch.autograd.grad((fast * probe).sum(), inputs)
    exact = [t.detach().clone().requires_grad_() for t in inputs]
    pairs = [(exact[1][bank.rows(e)], exact[2][bank.rows(e)], bank.scales[e], exact[3][e]) for e in range(experts)]
    weights = torch.ones(7, 1, dtype=torch.float64) if w is None else exact[4]
    bias_O = base.bias if bias else torch.zeros(12, dtype=torch.float64)
    slow = whole_outputs(exact[0], base.weight, bias_O, pairs, weights)
    slow_grads = torch.autograd.grad((slow * probe).sum(), exact)
    torch.testing.assert_close(fast, slow)
    for number, (ours, twin) in enumerate(zip(fast_grads, slow_grads, strict=True)):
        used = w != 0 if number == 4 else 1.0  # nobody reads the gradient of a weight that selection set to zero
        assert (twin * used).abs().sum() > 0
        torch.testing.assert_close(ours * used, twin * used)


def test_equals_pefts_layer_in_values_and_gradients():
    torch.manual_seed(0)
    model = nn.ModuleDict({"a": nn.Linear(8, 12)})
    base = copy.deepcopy(model["a"]).requires_grad_(False)
    config = LoraConfig(r=4, lora_alpha=2, use_dora=True, target_modules=["a"], init_lora_weights=False)
    theirs = get_peft_model(model, config).base_model.model["a"]
    factors = [theirs.lora_A["default"].weight, theirs.lora_B["default"].weight]
    magnitude = theirs.lora_magnitude_vector["default"].weight
    bank = MagnitudeBank(8, 12, ranks=(4,), scales=(0.5,))
    layer = layer_of(bank, base=base)
    with torch.no_grad():
        magnitude.mul_(1.3)
        bank.down.copy_(factors[0]), bank.up.copy_(factors[1].T), bank.magnitude.copy_(magnitude[None])
    x = torch.randn(2, 5, 8, requires_grad=True)
    ours, expected = run(layer, x), theirs(x)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)
    probe = torch.randn_like(ours)
    found = torch.autograd.grad((ours * probe).sum(), [x, bank.down, bank.up, bank.magnitude])
    wanted = list(torch.autograd.grad((expected * probe).sum(), [x, *factors, magnitude]))
    wanted[2], wanted[3] = wanted[2].T, wanted[3][None]
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_lengths_are_measured_once_for_every_change_of_the_factors(monkeypatch):
    layer, measured = make_layer(2, weights=torch.full((4, 2), 0.5, dtype=torch.float64)), []
    bank, true = layer.bank, MagnitudeBank._measure
    monkeypatch.setattr(MagnitudeBank, "_measure", lambda bank: measured.append(1) or true(bank))
    optimizer = torch.optim.AdamW(bank.parameters(), lr=0.1, fused=True)
    x = torch.randn(4, 8, dtype=torch.float64)
    for step in range(1, 3):
        for _ in range(2):
            run(layer, x).square().sum().backward()
        expected = torch.stack([(layer.base.weight + bank.up[bank.rows(e)].T @ bank.down[bank.rows(e)] / 2).norm(dim=1)
                                for e in range(2)])  # fmt: skip
        torch.testing.assert_close(bank.norms(), expected)
        assert len(measured) == step
        optimizer.step()
    with torch.inference_mode():
        run(layer.eval(), x)
    run(layer.train(), x).sum().backward()  # what inference mode made cannot be used here


def test_dropout_spares_the_frozen_weight():
    layer = make_layer(1, dropout=0.5).train()
    x = torch.randn(5, 8, dtype=torch.float64)
    assert not torch.equal(run(layer, x), run(layer, x))
    nn.init.zeros_(layer.bank.up)
    ratio_O = layer.bank.magnitude[0] / layer.base.weight.norm(dim=1)
    torch.testing.assert_close(run(layer, x), ratio_O * (x @ layer.base.weight.T) + layer.base.bias)


def test_a_bfloat16_base_with_float32_magnitudes():
    w = some_weights(6, 3, 3).softmax(1)
    exact, half = make_layer(3, weights=w), make_layer(3, weights=w.float(), dtype=torch.float32)
    half.base.load_state_dict(exact.base.state_dict())
    half.bank.load_state_dict(exact.bank.state_dict())
    half.base.bfloat16()
    x = torch.randn(6, 8).bfloat16()
    exact.base.load_state_dict(half.base.state_dict())  # rounded as well
    half.bank.square_O.copy_(half.base.weight.float().square().sum(dim=1))
    exact.bank.square_O.copy_(exact.base.weight.square().sum(dim=1))
    ours, twin = run(half, x), run(exact, x.double())
    assert ours.dtype == torch.bfloat16
    torch.testing.assert_close(ours.double(), twin, rtol=0.05, atol=0.05)
    ours.float().square().sum().backward()
    twin.square().sum().backward()
    for name, parameter in half.bank.named_parameters():
        wanted = exact.bank.get_parameter(name).grad
        assert parameter.grad.dtype == torch.float32
        assert (parameter.grad.double() - wanted).norm() < 0.05 * wanted.norm(), name


# -- whole models ------------------------------------------------------------------------------------------------------


def stirred(routed):
    stir(routed)
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for layer in routed.layers.values():
            layer.bank.magnitude.mul_(1.0 + 0.3 * torch.rand(layer.bank.magnitude.shape, generator=generator))
    return routed


@pytest.mark.parametrize("kind", ["llama", "falcon_mamba"])
def test_one_expert_is_another_weight(kind):
    """Fresh, it is the base; later, the base with W_e in place of W, in training, evaluation and cached decoding."""
    mamba = kind == "falcon_mamba"
    base = make_mamba() if mamba else make_llama(vocab_size=50, attention_bias=True)
    routed = route(copy.deepcopy(base), composed(*DORA, *(["model=falcon_mamba_7b"] if mamba else [])))
    model, ids = routed.model, ids_of(rows=2)
    with torch.no_grad():
        fresh, before = model(ids, use_cache=False).logits, base(ids, use_cache=False).logits
    torch.testing.assert_close(fresh, before, rtol=0, atol=1e-6 if mamba else 0)
    stirred(routed)
    with torch.no_grad():
        for site, layer in routed.layers.items():
            base.get_submodule(site).weight.add_(layer.bank.delta(0))
        expected = base(ids, use_cache=False).logits
        assert not torch.allclose(expected, before, atol=1e-3)
        with routed.context.open(facts(ids)):
            trained = model.train()(ids, use_cache=False).logits
        out = model.eval()(ids[:, :4], use_cache=True)
        given = {"cache_params": out.cache_params} if mamba else {"past_key_values": out.past_key_values}
        last = model(ids[:, 4:5], use_cache=True, **given).logits
        for found, wanted in ((trained, expected), (out.logits, expected[:, :4]), (last, expected[:, 4:5])):
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
        with routed.context.override("off"):
            torch.testing.assert_close(model(ids, use_cache=False).logits, before, rtol=0, atol=1e-6 if mamba else 0)


def test_a_mixture_starts_as_the_base_and_every_way_to_compute_it_agrees():
    config = composed(*MIXED, "router=topk", "router.top_k=2")
    model = make_llama(vocab_size=50)
    ids = ids_of()
    with torch.no_grad():
        before = model(ids, use_cache=False).logits
        routed = route(model, config)
        assert torch.equal(model(ids, use_cache=False).logits, before)
        stirred(routed)
        expected = model(ids, use_cache=False).logits
        assert not torch.allclose(expected, before, atol=1e-3)
        again = attach(config, make_llama(vocab_size=50), routed.plan, num_domains=3)
        load_weights(again.tensors(), adapter_tensors(routed.layers), "x")
        assert torch.equal(again.model(ids, use_cache=False).logits, expected)
        for token in range(3):  # one row, one token: as decoding begins
            one = model(ids[:1, : token + 1], use_cache=False).logits
            torch.testing.assert_close(one, expected[:1, : token + 1], rtol=1e-4, atol=1e-5)
    with routed.context.open(facts(ids)):
        torch.testing.assert_close(model.train()(ids, use_cache=False).logits, expected, rtol=1e-4, atol=1e-5)


def test_compiled_it_gives_the_same():
    """One layer, for compiling takes its time."""
    torch._dynamo.reset()
    own = (*MIXED, "experts.sites=[q_proj]", "router=topk")
    routed = stirred(route(make_llama(vocab_size=50, num_hidden_layers=1), composed(*own)))
    model, ids, seen = routed.model.train(), ids_of(), []
    for compiled in (False, True):
        if compiled:
            compile_layers(model.model.layers, routed.layers.values(), backend="aot_eager")
        with routed.context.open(facts(ids)):
            logits = model(ids, use_cache=False).logits
            logits.square().mean().backward()
        grads = [p.grad for members in routed.groups.values() for p in members.values()]
        seen.append((logits.detach(), *grads))
        model.zero_grad(set_to_none=True)
    torch._dynamo.reset()
    for plain, other in zip(*seen, strict=True):
        assert plain.abs().sum() > 0
        torch.testing.assert_close(other, plain, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("router", [("router.top_k=2",), ("router=soft", "router.scope=block")])
def test_whole_feed_forward_blocks_of_such_experts(router):
    """Projections with W_e in place of W, a block per expert, mixed token by token."""
    config = composed("+recipe=mixlora", "experts=magnitude", "experts.layout=3", *SIZES, *router)
    routed = route(make_llama(vocab_size=50, mlp_bias=True), config)
    stirred_banks = [layer.bank for layer in routed.layers.values()]
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for bank in stirred_banks:
            bank.up.normal_(0, 0.3, generator=generator)
            bank.magnitude.mul_(1.0 + torch.rand(bank.magnitude.shape, generator=generator))
    block = routed.blocks["model.layers.1.mlp"].double().train()
    nn.init.normal_(block.router.score.weight)
    layers = [getattr(block.base, name) for name in ("gate_proj", "up_proj", "down_proj")]
    x_ND = torch.randn(7, 32, dtype=torch.float64)
    leaves = [*block.router.parameters(), *(p for layer in layers for p in layer.bank.parameters())]
    with routed.context.open(facts(torch.zeros(1, 7, dtype=torch.long))):
        weights_NE = block.decide(x_ND).weights_NE
        found, slow = block(x_ND), 0.0
        for e in range(3):
            gate, up, down = [
                lambda x, layer=layer, e=e: x @ (layer.base.weight + layer.bank.delta(e)).T + layer.base.bias
                for layer in layers
            ]
            slow = slow + weights_NE[:, e : e + 1] * down(nn.functional.silu(gate(x_ND)) * up(x_ND))
        probe = torch.randn_like(slow)
        torch.testing.assert_close(found, slow, rtol=1e-5, atol=1e-6)
        ours, twins = (torch.autograd.grad((y * probe).sum(), leaves) for y in (found, slow))
    for one, other in zip(ours, twins, strict=True):
        assert other.abs().sum() > 0
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_exported_it_is_pefts_dora(tmp_path):
    base = make_llama(vocab_size=50)
    routed = stirred(route(copy.deepcopy(base), composed(*MIXED, "router=topk")))
    tensors, ids = adapter_tensors(routed.layers), ids_of()
    with pytest.raises(ConfigError, match="route=uniform: model.layers.0.* magnitudes.* route=expert:0"):
        fold(routed.plan, tensors, "uniform", domains=DOMAINS)
    write_peft_folder(tmp_path / "a", fold(routed.plan, tensors, "expert:1", domains=DOMAINS), base_model="tiny")
    adapted = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "a").eval()
    with torch.no_grad():
        for site, layer in routed.layers.items():
            base.get_submodule(site).weight.add_(layer.bank.delta(1))
        torch.testing.assert_close(adapted(ids).logits, base(ids).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("router=topk", "router.make.train.weight=probability"), "MagnitudeBank .* those of router.make need not do"),
        (("router=soft", "router.make.normalise=sigmoid"), "those of router.make need not do; use router=soft"),
        (("router=topk", "router.make.train.weight=unit"), "must sum to one"),
        (("router=soft_topk", "model.quantization=nf4"), "model.quantization=nf4: experts.make=MagnitudeBank"),
        (("router=soft_topk", "experts.adapters=[a]"), "experts.adapters: imported LoRAs cannot"),
    ],
)
def test_what_does_not_go_with_whole_outputs(overrides, message):
    config = composed(*MIXED, *overrides)
    plan = plan_sites(replace_adapters(config), meta_model(config.model), DOMAINS)
    with pytest.raises(ConfigError, match=message):
        check_parts_fit(config, plan)


def replace_adapters(config):
    return config.model_copy(update={"experts": config.experts.model_copy(update={"adapters": []})})


@pytest.mark.parametrize("router", ["topk", "soft", "soft_topk", "top_p", "threshold", "adaptive_threshold"])
def test_routers_whose_weights_sum_to_one(router):
    config = composed(*MIXED, f"router={router}")
    check_parts_fit(config, plan_sites(config, meta_model(config.model), DOMAINS))


def test_one_rank_and_no_second_expert_without_a_router():
    with pytest.raises(ValueError, match=r"one rank at a site, got ranks \[2, 3\]"):
        MagnitudeBank(4, 4, ranks=(2, 3), scales=(1.0, 1.0))
    config = composed(*DORA)
    plan = plan_sites(config, meta_model(config.model), DOMAINS)
    two = {name: replace(spec, ranks=(2, 2), scales=(1.0, 1.0)) for name, spec in plan.items()}
    with pytest.raises(ConfigError, match="must sum to one, which they do not without a router"):
        check_parts_fit(config, two)
