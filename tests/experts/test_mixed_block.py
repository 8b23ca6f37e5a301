"""Whole feed-forward experts: every way to compute them against loops; `tests/test_twins.py` compares the recipes."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers import GPTNeoXConfig, Phi3Config
from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXMLP
from transformers.models.phi3.modeling_phi3 import Phi3MLP

from loramoe_train.build import attach, build_aux, check_fit
from loramoe_train.errors import ConfigError
from loramoe_train.experts.bank import ExpertBank
from loramoe_train.experts.compiled import compile_layers
from loramoe_train.experts.feed_forward import FeedForward, describe
from loramoe_train.experts.mixed_block import MixedBlock, try_blocks
from loramoe_train.experts.sites import Site
from loramoe_train.models import meta_model
from loramoe_train.models.loading import checkpoint_activations
from loramoe_train.site_plan import feed_forwards, plan_sites
from tests.composing import composed
from tests.conftest import make_llama
from tests.test_routed_model import facts, ids_of
from tests.test_twins import assert_is_as_written
from tests.twins.blocks import Loops

SMALL = ("model=smollm2_135m", "experts.rank=2", "experts.alpha=4", "experts.layout=4", "experts.dropout=0")
SMALL += ("experts.plain.rank=2", "experts.plain.alpha=4")
MIXLORA = ("+recipe=mixlora", *SMALL)
DOMAINS = ("a", "b", "c")


def route(model, config, *, stirred=True):
    routed = attach(config, model, plan_sites(config, model, DOMAINS), num_domains=len(DOMAINS))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in {**routed.groups["experts"], **routed.groups["routers"]}.items():
            if stirred and not name.endswith("down"):
                parameter.normal_(0, 0.1 if name.endswith("up") else 0.5, generator=generator)
    return routed


def parameters_of(routed):
    return {name: p for group in routed.groups.values() for name, p in group.items()}


def batch(rows=2, length=5, padded=2):
    """(ids, tokens): the last row ends with padding."""
    ids = ids_of(rows, length, seed=3)
    valid = torch.ones_like(ids, dtype=torch.bool)
    if padded:
        valid[-1, -padded:] = False
    sample = torch.arange(rows)[:, None].expand_as(ids).masked_fill(~valid, -1).reshape(-1)
    return ids, valid, replace(facts(ids, [0] * rows, valid), sample_N=sample, num_samples=rows)


def one_pass(routed, config, ids, valid, tokens, *, aux=True):
    """(logits, auxiliary value, gradients by name) of a pass in training mode."""
    for parameter in routed.model.parameters():
        parameter.grad = None
    terms = build_aux(config, routed.plan).values() if aux else ()
    with routed.context.open(tokens) as records, torch.no_grad():
        torch.manual_seed(5)
        routed.model.train()(ids, attention_mask=valid.long(), use_cache=False)
        counted = [term.loss.statistics(records, tokens) for term in terms]
    with routed.context.open(tokens) as records:
        torch.manual_seed(5)
        logits = routed.model(ids, attention_mask=valid.long(), use_cache=False).logits
        value = sum(term.loss(records, tokens, c) for term, c in zip(terms, counted, strict=True))
        (probe(logits, valid) + 10 * value).backward()
    return logits.detach(), value, {name: p.grad for name, p in parameters_of(routed).items()}


def probe(logits, valid):
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(7), dtype=logits.dtype)
    return (logits * weights * valid.unsqueeze(-1)).sum()


@pytest.mark.parametrize("form", ["concatenated", "grouped"])
def test_either_form_is_what_the_paper_says(form, tmp_path):
    assert_is_as_written("mixlora", "llama", tmp_path, f"experts.form={form}")


@pytest.mark.parametrize("mode", ["uniform", "by_domain", "off"])
def test_modes_that_ask_no_router(mode):
    """All copies with the same weight; the copy of the example's domain; the base bit for bit."""
    base = make_llama(vocab_size=50).requires_grad_(False)
    routed = route(copy.deepcopy(base), composed(*MIXLORA, "experts.layout=3"))
    ids = ids_of(3, 4, seed=3)
    given = facts(ids, [2, 0, 1])
    with routed.context.override(mode), routed.context.open(given) as records, torch.no_grad():
        logits = routed.model.eval()(ids, use_cache=False).logits
        assert set(records) == (set() if mode == "off" else set(routed.blocks))
    if mode == "off":
        assert torch.equal(logits, base(ids, use_cache=False).logits)
        return
    loops = Loops(base.double(), {n: p.detach().double() for n, p in parameters_of(routed).items()}, rank=2, scale=2.0)
    place = iter(range(ids.numel() * len(routed.blocks)))

    def block(mlp, name, x_D):
        domain = [2, 0, 1][next(place) % ids.numel() // ids.shape[1]]
        copies = [loops.copy(mlp, name, e, x_D) for e in range(3)]
        return (copies[domain] if mode == "by_domain" else sum(copies) / 3), torch.ones(3)

    with torch.no_grad():
        wanted = loops.run(ids, torch.ones_like(ids), block)
    torch.testing.assert_close(logits.double(), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("recipe", "dtype"), [("mixlora", torch.float32), ("mixlora", torch.bfloat16), ("mixlora_dora", torch.float32)]
)
def test_fresh_copies_are_the_base_block(recipe, dtype):
    model = make_llama(vocab_size=50).to(dtype)
    ids = ids_of()
    with torch.no_grad():
        before = model(ids, use_cache=False).logits
        routed = route(model, composed(f"+recipe={recipe}", *SMALL), stirred=False)
        after = routed.model.eval()(ids, use_cache=False).logits
    assert {type(block) for block in routed.blocks.values()} == {MixedBlock}
    close = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 0.02, "atol": 0.01}
    torch.testing.assert_close(after, before, **close)


def test_bf16_base_with_float32_copies():
    exact = route(make_llama(vocab_size=50), composed(*MIXLORA))
    half = route(make_llama(vocab_size=50).to(torch.bfloat16), composed(*MIXLORA))
    ids, valid, tokens = batch()
    with torch.no_grad():
        torch.testing.assert_close(
            half.model.eval()(ids).logits.float(), exact.model.eval()(ids).logits, rtol=0.1, atol=0.05
        )
    _, _, gradients = one_pass(half, composed(*MIXLORA), ids, valid, tokens)
    assert all(g.dtype == torch.float32 and torch.isfinite(g).all() for g in gradients.values())


def check_recomputed(config):
    """Checkpointing changes no bit of logits, loss and gradients; returns the checkpointed model."""
    found = []
    for on in (False, True):
        routed = route(make_llama(vocab_size=50), config)
        if on:
            checkpoint_activations(routed.model)
        found.append(one_pass(routed, config, *batch()))
    (plain, value, gradients), (again, same, recomputed) = found
    assert torch.equal(plain, again) and torch.equal(value, same)
    assert all(torch.equal(gradients[name], recomputed[name]) for name in gradients)
    return routed


def test_jitter_at_every_site_is_the_same_in_a_recomputed_layer():
    sites = ("router=topk", "router.make.jitter=0.2", "aux_loss=load_balance", "experts.rank=2", "experts.layout=3")
    check_recomputed(composed("model=smollm2_135m", *sites))


@pytest.mark.parametrize(
    ("recipe", "form"), [("mixlora", "concatenated"), ("mixlora", "grouped"), ("mixlora_dora", "auto")]
)
def test_checkpointing_and_generation(recipe, form):
    """With dropout and jitter, recomputed layers give every bit again; a cache changes nothing."""
    noise = ("experts.dropout=0.3", "router.make.jitter=0.2")
    routed = check_recomputed(composed(f"+recipe={recipe}", *SMALL, f"experts.form={form}", *noise))
    ids = ids_of(rows=2)
    with torch.no_grad():
        full = routed.model.eval()(ids, use_cache=False).logits
        out = routed.model(ids[:, :3], use_cache=True)
        steps = [out.logits]
        for position in range(3, ids.shape[1]):
            out = routed.model(ids[:, position : position + 1], use_cache=True, past_key_values=out.past_key_values)
            steps.append(out.logits)
    torch.testing.assert_close(torch.cat(steps, dim=1), full, rtol=1e-4, atol=1e-5)


@pytest.mark.nightly  # recipe mixlora, compiled, is always seen (test_compiled.py); this one has dropout and jitter
def test_compiled_layers_give_the_same():
    torch._dynamo.reset()
    config = composed(*MIXLORA, "experts.dropout=0.3", "router.make.jitter=0.2")
    plain, compiled = (route(make_llama(vocab_size=50), config) for _ in range(2))
    compile_layers(compiled.model.model.layers, compiled.blocks.values(), backend="eager")
    one, other = (one_pass(routed, config, *batch()) for routed in (plain, compiled))
    torch.testing.assert_close(other[0], one[0], rtol=1e-4, atol=1e-5)
    for name, gradient in one[2].items():
        torch.testing.assert_close(other[2][name], gradient, rtol=1e-3, atol=1e-4, msg=name)
    assert not torch._dynamo.utils.counters["graph_break"]
    torch._dynamo.reset()


# -- banks that stretch rows -------------------------------------------------------------------------------------------


class StretchedBank(ExpertBank):
    """Every row of W + D_e times a number of its own, which is learned."""

    mixes_outputs = True

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.rows_EO = nn.Parameter(torch.rand(self.num_experts, self.d_out) + 0.5)

    def stretch(self):
        return self.rows_EO


@pytest.mark.parametrize("overrides", [(), ("router=soft", "router.scope=block")], ids=["top-k", "soft"])
def test_stretched_rows_are_those_of_whole_weights(overrides):
    """W_e = c_e * (W + s B A) built as a matrix for each projection, token by token."""
    torch.manual_seed(0)
    config = composed(*MIXLORA, *overrides, "experts.layout=3")
    routed = route(make_llama(vocab_size=50, mlp_bias=True), config)
    for site, layer in routed.layers.items():
        if ".mlp." in site:
            bank = StretchedBank(layer.bank.d_in, layer.bank.d_out, ranks=(2,) * 3, scales=(2.0,) * 3)
            nn.init.normal_(bank.up, 0, 0.3)
            layer.bank = bank
    block = routed.blocks["model.layers.1.mlp"].double().train()
    x_ND = torch.randn(7, 32, dtype=torch.float64, requires_grad=True)
    layers = [getattr(block.base, name) for name in ("gate_proj", "up_proj", "down_proj")]
    leaves = [x_ND, *block.router.parameters(), *(p for layer in layers for p in layer.bank.parameters())]

    def loops():
        weights_NE = block.decide(x_ND).weights_NE
        rows = []
        for x_D, weights_E in zip(x_ND, weights_NE, strict=True):
            y_D = 0.0
            for e in range(3):

                def linear(layer, x, e=e):
                    whole = layer.base.weight + layer.bank.delta(e)
                    return (layer.bank.rows_EO[e][:, None] * whole) @ x + layer.base.bias

                inner = nn.functional.silu(linear(layers[0], x_D)) * linear(layers[1], x_D)
                y_D = y_D + weights_E[e] * linear(layers[2], inner)
            rows.append(y_D)
        return torch.stack(rows)

    found = []
    with routed.context.open(facts(torch.zeros(1, 7, dtype=torch.long))):
        for way in (lambda: block(x_ND), loops):
            y_ND = way()
            probe_ND = torch.randn(y_ND.shape, generator=torch.Generator().manual_seed(2), dtype=y_ND.dtype)
            found.append((y_ND, *torch.autograd.grad((y_ND * probe_ND).sum(), leaves)))
    for one, other in zip(*found, strict=True):
        assert other.abs().sum() > 0
        torch.testing.assert_close(one, other)


# -- blocks of other shapes --------------------------------------------------------------------------------------------


def fused():
    names = ("gate_up_proj", "down_proj")
    block = Phi3MLP(Phi3Config(hidden_size=8, intermediate_size=12, pad_token_id=0))
    return block, names, FeedForward(names[:1], names[1], "activation_fn", True)


def plain():
    names = ("dense_h_to_4h", "dense_4h_to_h")
    block = GPTNeoXMLP(GPTNeoXConfig(hidden_size=8, intermediate_size=12, num_attention_heads=2))
    return block, names, FeedForward(names[:1], names[1], "act", False)


def sites_of(block, names):
    layers = [getattr(block, name) for name in names]
    return [
        Site(f"layers.0.mlp.{name}", 0, "ffn", layer.in_features, layer.out_features, layer.bias is not None)
        for name, layer in zip(names, layers, strict=True)
    ]


@pytest.mark.parametrize("make", [fused, plain])
def test_blocks_of_other_shapes(make):
    torch.manual_seed(0)
    block, names, wanted = make()
    model = nn.Module()
    model.layers = nn.ModuleList([nn.ModuleDict({"mlp": block})])
    model.config = GPTNeoXConfig(hidden_size=8, num_attention_heads=2)
    ffn = f"model.sites.ffn=[mlp.{names[0]},mlp.{names[1]}]"
    config = composed(*MIXLORA, "experts.plain=null", "model.layers=layers", ffn)
    exact = copy.deepcopy(block)
    routed = route(model, config)
    (mixed,) = routed.blocks.values()
    assert mixed.shape == wanted == describe("layers.0.mlp", exact, sites_of(exact, names))
    try_blocks(routed.blocks.values())
    x_ND = torch.randn(5, 8)
    weights_NE = mixed.eval().decide(x_ND).weights_NE
    rows = []
    for x_D, weights_E in zip(x_ND, weights_NE, strict=True):
        y = 0.0
        for e in range(4):
            adapted = copy.deepcopy(exact)
            for name in names:
                getattr(adapted, name).weight.data += routed.layers[f"layers.0.mlp.{name}"].bank.delta(e).detach()
            y = y + weights_E[e] * adapted(x_D)
        rows.append(y)
    torch.testing.assert_close(mixed(x_ND), torch.stack(rows), rtol=1e-4, atol=1e-5)


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["router.scope=site"], ["experts.mixing=output", "router.scope=site", "set router.scope=block"]),
        (["router.make.train.weight=unit"], ["router.make.train.weight=unit", "renormalised"]),
        (["router.make.evaluate.weight=probability"], ["router.make.evaluate.weight=probability"]),
        (
            ["router=soft", "router.scope=block", "router.make.normalise=sigmoid"],
            ["router.make.train.weight=probability"],
        ),
        (["experts=shared_down"], ["experts.make", "SharedDownBank", "experts=magnitude"]),
        (["experts.sites=[gate_proj,up_proj]"], ["model.layers.0.mlp", "gate_proj, up_proj", "experts.sites=[ffn]"]),
        (["experts.sites=[down_proj]"], ["down_proj", "experts.sites=[ffn]"]),
        (["experts.sites=[attn_in,attn_out]", "experts.plain=null"], ["self_attn", "experts.sites=[ffn]"]),
    ],
    ids=lambda value: value[0],
)
def test_what_cannot_be_mixed_is_told_before_weights_are_loaded(overrides, words):
    with pytest.raises(ConfigError) as told:
        config = composed(*MIXLORA, *overrides)
        model = meta_model(composed().model)
        plan = plan_sites(config, model, DOMAINS)
        feed_forwards(config, model, plan)
        check_fit(config, plan)
    assert all(word in str(told.value) for word in words), str(told.value)
    assert "\n" not in str(told.value)


def test_a_router_that_promises_nothing():
    given = ("experts.mixing=output", "router=adaptive_threshold", "router.scope=block", "experts.sites=[ffn]")
    config = composed(*given, "+router.make.ceiling=1.0")
    with pytest.raises(ConfigError, match="router.make, a AdaptiveThreshold does not promise that"):
        check_fit(config, plan_sites(config, meta_model(config.model), DOMAINS))


def test_weights_that_are_sure_to_sum_to_one_are_accepted():
    model = meta_model(composed().model)
    for overrides in (
        ["router.top_k=1", "router.make.train.weight=unit"],
        ["router=soft", "router.scope=block"],
        ["router=top_p", "router.scope=block"],
    ):
        config = composed(*MIXLORA, *overrides)
        check_fit(config, plan_sites(config, model, DOMAINS))


def test_a_block_that_does_more_than_it_seems():
    """A factor between the layers, as some models have, is found with the first numbers."""
    model = make_llama(vocab_size=50)
    own = type(model.model.layers[0].mlp)
    kind = type("Scaled", (own,), {"forward": lambda self, x: 0.5 * own.forward(self, x)})
    routed = route(model, composed(*MIXLORA))
    try_blocks(routed.blocks.values())
    routed.blocks["model.layers.0.mlp"].base.__class__ = kind
    with pytest.raises(ConfigError, match=r"model\.layers\.0\.mlp \(Scaled\) does more .* experts\.mixing=delta"):
        try_blocks(routed.blocks.values())


def test_a_training_pass_outside_the_context():
    routed = route(make_llama(vocab_size=50), composed(*MIXLORA))
    with pytest.raises(RuntimeError, match="training forward outside"):
        routed.model.train()(ids_of())
