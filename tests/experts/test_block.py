"""One decision for the sites of a block: who asks, who follows, what is recorded, stored and refused."""

import pytest
import torch

from loramoe_train.build import build_aux
from loramoe_train.errors import ConfigError
from loramoe_train.experts.block import RoutedBlock
from loramoe_train.experts.decisions import plan_decisions
from loramoe_train.site_plan import plan_sites
from tests.composing import composed
from tests.conftest import make_llama
from tests.test_routed_model import facts, ids_of, route, stir

BLOCK = ("router.scope=block", "router.top_k=2", "experts.sites=[ffn]", "experts.layout=3", "experts.rank=2")
PLAIN = ("+experts.plain={sites:[attn_in,attn_out],rank:3,alpha:6}",)
SMALL = ("experts.alpha=4", "experts.dropout=0.0", "model=smollm2_135m")


def make(*overrides, router="topk"):
    config = composed(f"router={router}", *BLOCK, *SMALL, *overrides)
    routed = route(make_llama(vocab_size=50), config)
    stir(routed)
    return routed, config


def forward_as_loops(routed, ids):
    """Logits with every site's delta from `bank.delta` and weights from the block's router on the block's input."""
    weights = {}

    def note(block, args, kwargs):
        x = (args[0] if args else kwargs["hidden_states"]).reshape(-1, block.router.score.weight.shape[1])
        scores = block.router.score(x)
        chosen = scores.topk(2, dim=-1)
        row = torch.zeros_like(scores).scatter_(-1, chosen.indices, chosen.values.softmax(dim=-1))
        weights[block.site] = row

    def add(layer, args, y):
        x, owner = args[0], layer.site.rpartition(".")[0]
        for expert in range(layer.bank.num_experts):
            w = weights[owner][:, expert].view(*x.shape[:-1], 1) if owner in weights else 1.0
            y = y + w * (x @ layer.bank.delta(expert).to(x.dtype).T)
        return y

    hooks = [b.register_forward_pre_hook(note, with_kwargs=True) for b in routed.blocks.values()]
    hooks += [
        layer.base.register_forward_hook(lambda base, args, y, layer=layer: add(layer, args, y))
        for layer in routed.layers.values()
    ]
    try:
        with routed.context.override("off"):
            return routed.model(ids, use_cache=False).logits
    finally:
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize("plain", [(), PLAIN], ids=["alone", "beside plain LoRA"])
def test_values_and_gradients_equal_loops(plain):
    routed, _ = make(*plain)
    routed.model.double()
    routed.model.train()
    ids = ids_of(2, 5, seed=1)
    groups = {name: p for group in routed.groups.values() for name, p in group.items()}
    assert any(name.endswith("mlp.router.score.weight") for name in groups)
    found = []
    for run in (lambda: routed.model(ids, use_cache=False).logits, lambda: forward_as_loops(routed, ids)):
        with routed.context.open(facts(ids, [0, 1])):
            logits = run()
            logits.square().sum().backward()
        found.append((logits.detach(), {name: p.grad.clone() for name, p in groups.items()}))
        for p in groups.values():
            p.grad = None
    (one, ours), (two, loops) = found
    torch.testing.assert_close(one, two)
    for name, gradient in ours.items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(gradient, loops[name], msg=name)


def test_one_record_a_block_and_none_for_plain_sites():
    routed, config = make(*PLAIN)
    routed.model.train()
    ids = ids_of(2, 5, seed=1)
    with routed.context.open(facts(ids, [0, 1])) as records:
        routed.model(ids, use_cache=False)
        seen = dict(records)
    assert sorted(seen) == sorted(routed.recorded) == sorted(routed.blocks)
    assert all(name.endswith(".mlp") for name in seen)
    config = composed("router=topk", *BLOCK, *SMALL, *PLAIN, "aux_loss=load_balance")
    (term,) = build_aux(config, routed.plan).values()
    given = facts(ids, [0, 1])
    assert term.loss(seen, given, term.loss.statistics(seen, given)) > 0


@pytest.mark.parametrize("mode", ["by_domain", "uniform", "off"])
def test_modes_without_a_router(mode):
    routed, _ = make(*PLAIN)
    ids = ids_of(2, 5, seed=1)
    base = make_llama(vocab_size=50)
    with routed.context.open(facts(ids, [0, 1])) as records, routed.context.override(mode), torch.no_grad():
        logits = routed.model.eval()(ids, use_cache=False).logits
        assert bool(records) == (mode != "off")
    assert torch.equal(logits, base.eval()(ids, use_cache=False).logits) == (mode == "off")


def test_generation_with_a_cache_is_generation_without():
    routed, _ = make(*PLAIN)
    routed.model.eval()
    ids = ids_of(2, 5, seed=1)
    options = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(ids), "pad_token_id": 0}
    with torch.no_grad():
        cached, plain = (routed.model.generate(ids, use_cache=use, **options) for use in (True, False))
    assert torch.equal(cached, plain)


def test_the_base_model_still_finds_what_it_looks_for():
    routed, _ = make()
    (name, block), *_ = routed.blocks.items()
    assert isinstance(routed.model.get_submodule(name), RoutedBlock)
    assert routed.model.get_submodule(f"{name}.gate_proj") is block.base.gate_proj
    assert not hasattr(block, "no_such_thing")


def test_a_site_called_around_its_block():
    routed, _ = make()
    site = next(iter(routed.layers.values()))
    with pytest.raises(RuntimeError, match="called outside"):
        site.eval()(torch.zeros(1, 1, site.in_features))


def test_refusals():
    config = composed("router=topk", *BLOCK, *SMALL, "+experts.plain={sites:[down_proj],rank:3,alpha:6}")
    with pytest.raises(ConfigError, match=r"experts\.plain\.sites and experts\.sites both select .*down_proj"):
        plan_sites(config, make_llama(vocab_size=50), ["a"])
    routed, _ = make()
    plan = dict(routed.plan)
    site, spec = next(iter(plan.items()))
    plan[site] = type(spec)(spec.site, spec.ranks[:2], spec.scales[:2], spec.top_k)
    with pytest.raises(ConfigError, match="hold different numbers of experts"):
        plan_decisions(plan, "block")


def test_compiled_is_uncompiled():
    """One graph per layer, the decision recorded under the block's own name."""
    from loramoe_train.experts.compiled import compile_layers

    found = []
    for compiled in (False, True):
        routed, _ = make(*PLAIN)
        routed.model.train()
        if compiled:
            deciding = (*routed.layers.values(), *routed.blocks.values())
            compile_layers(routed.model.model.layers, deciding, backend="eager")
        ids = ids_of(2, 5, seed=1)
        with routed.context.open(facts(ids, [0, 1])) as records:
            loss = routed.model(ids, use_cache=False).logits.square().mean()
            loss.backward()
            weights = {name: routing.weights_NE.detach() for name, routing in records.items()}
        grads = {name: p.grad for group in routed.groups.values() for name, p in group.items()}
        found.append((loss.detach(), weights, grads))
    (loss, weights, grads), (other_loss, other_weights, other_grads) = found
    torch.testing.assert_close(other_loss, loss)
    torch.testing.assert_close(other_weights, weights)
    torch.testing.assert_close(other_grads, grads)


def test_checkpointed_layers_change_no_bit():
    from loramoe_train.models.loading import checkpoint_activations

    found = []
    for on in (False, True):
        routed, _ = make(*PLAIN)
        if on:
            checkpoint_activations(routed.model)
        routed.model.train()
        ids = ids_of(2, 5, seed=1)
        with routed.context.open(facts(ids, [0, 1])):
            routed.model(ids, use_cache=False).logits.square().mean().backward()
        found.append({name: p.grad for group in routed.groups.values() for name, p in group.items()})
    assert all(torch.equal(gradient, found[1][name]) for name, gradient in found[0].items())
