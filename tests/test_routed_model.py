"""A whole model with LoRA-Mixer's parts in place: start, hard and soft routing, imports, cache, life cycle."""

import copy
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from loramoe_train.build import RoutedModel, attach, build_aux
from loramoe_train.errors import ConfigError
from loramoe_train.experts.adapters import (
    load_weights,
    plan_of,
    read_manifest,
    read_weights,
    save_adapter,
)
from loramoe_train.experts.peft_folder import read_peft_folder
from loramoe_train.routers.router import Policy
from loramoe_train.routing.types import Tokens
from loramoe_train.schema.run import RunConfig
from loramoe_train.site_plan import plan_sites
from tests.composing import composed
from tests.conftest import make_falcon_mamba, make_llama

DOMAINS = ["a", "b", "c"]
OVERRIDES = ("+recipe=lora_mixer", "router.top_k=2", "experts.rank=2", "experts.alpha=4", "experts.dropout=0")


def make_mamba(**changes):
    return make_falcon_mamba(vocab_size=50, **changes)


def route(model, config: RunConfig, adapters=(), domains=tuple(DOMAINS)) -> RoutedModel:
    return attach(
        config, model, plan_sites(config, model, domains, adapters), num_domains=len(domains), adapters=adapters
    )


def stir(routed: RoutedModel, seed=1, routers=1.0, experts=True) -> None:
    """Random experts in place of the zeros that training starts from, and random routers of that standard deviation (0:
    as they are)."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, owner in {**routed.layers, **routed.blocks}.items():
            if experts and name in routed.layers:
                owner.bank.up.normal_(0, 0.1, generator=generator)
            for parameter in owner.router.parameters() if routers and owner.router is not None else ():
                parameter.normal_(0, routers, generator=generator)


def facts(ids, domains=None, valid=None) -> Tokens:
    valid = torch.ones_like(ids, dtype=torch.bool) if valid is None else valid
    domain = torch.zeros_like(ids) if domains is None else torch.tensor(domains).view(-1, 1).expand_as(ids)
    domain = domain.masked_fill(~valid, -1)
    sample = torch.arange(len(ids)).view(-1, 1).expand_as(ids).masked_fill(~valid, -1)
    flat_N, own_N = valid.reshape(-1), domain.reshape(-1)
    return Tokens(flat_N, own_N, own_N, flat_N, sample.reshape(-1), len(ids))


MODELS = {
    "llama": (lambda: make_llama(vocab_size=50), ()),
    "falcon_mamba": (make_mamba, ("model=falcon_mamba_7b",)),
}
both = pytest.mark.parametrize("kind", MODELS)


def build(kind, *overrides):
    make, own = MODELS[kind]
    model, config = make(), composed(*OVERRIDES, *own, *overrides)
    return model, config


def ids_of(rows=3, length=6, seed=0):
    return torch.randint(2, 50, (rows, length), generator=torch.Generator().manual_seed(seed))


@both
def test_it_starts_as_the_base(kind):
    model, config = build(kind)
    ids = ids_of()
    with torch.no_grad():
        before = model(ids, use_cache=False).logits
        routed = route(model, config)
        after = model(ids, use_cache=False).logits
    if kind == "llama":
        assert torch.equal(after, before)
    else:  # every layer's output is equal bit for bit, but the scan's small matmuls depend on how memory is aligned
        torch.testing.assert_close(after, before, rtol=0, atol=1e-6)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == {name for group in routed.groups.values() for name in group}
    names = {
        "llama": {"q_proj", "k_proj", "v_proj", "o_proj"},
        "falcon_mamba": {"in_proj", "x_proj", "dt_proj", "out_proj"},
    }
    assert {site.rpartition(".")[2] for site in routed.plan} == names[kind] and len(routed.plan) == 8


@both
def test_hard_routing_of_a_mixed_batch_is_separate_loras(kind):
    """Logits and gradients of each domain equal those of a model that has this domain's expert alone."""
    model, config = build(kind)
    base = copy.deepcopy(model)
    routed = route(model, config)
    stir(routed)
    ids, owners = ids_of(), [2, 0, 1]
    model.train()
    with routed.context.override("by_domain"), routed.context.open(facts(ids, owners)):
        logits = model(ids, use_cache=False).logits
        probe = torch.randn(logits.shape, generator=torch.Generator().manual_seed(3))
        (logits * probe).sum().backward()
    single_config = composed("+recipe=lora", *OVERRIDES[2:], *MODELS[kind][1])
    for row, domain in enumerate(owners):
        alone = route(copy.deepcopy(base), single_config, domains=("only",))
        with torch.no_grad():
            for site, layer in alone.layers.items():
                bank = routed.layers[site].bank
                layer.bank.down.copy_(bank.down[bank.rows(domain)])
                layer.bank.up.copy_(bank.up[bank.rows(domain)])
        alone.model.train()
        own = ids[row : row + 1]
        with alone.context.open(facts(own)):
            expected = alone.model(own, use_cache=False).logits
            (expected * probe[row : row + 1]).sum().backward()
        torch.testing.assert_close(logits[row : row + 1], expected, rtol=1e-4, atol=1e-5)
        for site, layer in alone.layers.items():
            bank = routed.layers[site].bank
            for ours, theirs in (
                (bank.down.grad[bank.rows(domain)], layer.bank.down.grad),
                (bank.up.grad[bank.rows(domain)], layer.bank.up.grad),
            ):
                assert theirs.abs().sum() > 0, site
                torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


@both
def test_soft_routing_trains_every_router_at_every_site(kind):
    model, config = build(kind)
    routed = route(model, config)
    stir(routed, routers=0)
    model.train()
    ids = ids_of()
    (term,) = build_aux(config, routed.plan).values()
    with routed.context.open(facts(ids)) as records:
        model(ids, use_cache=False).logits.square().mean().backward(retain_graph=True)
        assert set(records) == set(routed.plan)
        for layer in routed.layers.values():
            assert layer.router.score.weight.grad.abs().sum() > 0, layer.site
        value = term.loss(records, routed.context.tokens, term.loss.statistics(records, routed.context.tokens))
    assert torch.isfinite(value)


def make_peft(base, folder: Path, seed: int, **changes) -> Path:
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"} | changes
    torch.manual_seed(seed)
    model = get_peft_model(copy.deepcopy(base), LoraConfig(init_lora_weights=False, **settings))
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def imported(tmp_path):
    base = make_llama(vocab_size=50)
    folders = [
        make_peft(base, tmp_path / "one", 1),
        make_peft(base, tmp_path / "two", 2, r=2, use_rslora=True, target_modules=["q_proj", "o_proj", "up_proj"]),
        make_peft(base, tmp_path / "three", 3, rank_pattern={"q_proj": 6}, alpha_pattern={"v_proj": 2}),
    ]
    config = composed(
        "+recipe=lora_mixer_plug_and_play", "router.top_k=2", f"experts.adapters=[{','.join(map(str, folders))}]"
    )
    return base, folders, config


def peft_logits(base, folder, ids):
    with torch.no_grad():
        return PeftModel.from_pretrained(copy.deepcopy(base), folder).eval()(ids).logits


def test_each_imported_adapter_alone_is_what_peft_makes_of_it(imported):
    base, folders, config = imported
    ids = ids_of()
    for number, folder in enumerate(folders):
        adapters = [read_peft_folder(path) for path in folders]
        routed = route(copy.deepcopy(base), config, adapters)
        with torch.no_grad():
            for layer in routed.layers.values():
                only = Policy(lambda p, e=number: torch.arange(p.shape[-1]).expand_as(p) == e, "unit")
                layer.router.policies = {True: only, False: only}
            torch.testing.assert_close(
                routed.model.eval()(ids).logits, peft_logits(base, folder, ids), rtol=1e-4, atol=1e-5
            )


def test_zero_initialised_routers_start_at_the_uniform_average(imported):
    """While training all experts count equally: the sum of deltas over three, as PEFT's weighted adapter has it."""
    base, folders, config = imported
    routed = route(copy.deepcopy(base), config, [read_peft_folder(path) for path in folders])
    merged = copy.deepcopy(base)
    for folder in folders:
        alone = PeftModel.from_pretrained(copy.deepcopy(base), folder).merge_and_unload()
        with torch.no_grad():
            for (_, p), (_, q), (_, r) in zip(
                merged.named_parameters(), alone.named_parameters(), base.named_parameters(), strict=True
            ):
                p.add_((q - r) / len(folders))
    ids = ids_of()
    with torch.no_grad(), routed.context.open(facts(ids)):
        ours = routed.model.train()(ids).logits
    with torch.no_grad():
        torch.testing.assert_close(ours, merged(ids).logits, rtol=1e-4, atol=1e-5)


def test_imported_experts_may_differ_in_rank_and_coverage(imported):
    base, folders, config = imported
    routed = route(copy.deepcopy(base), config, [read_peft_folder(path) for path in folders])
    ranks = {name.split(".", 3)[-1]: spec.ranks for name, spec in routed.plan.items() if ".0." in name}
    assert ranks["self_attn.q_proj"] == (4, 2, 6)
    assert ranks["self_attn.v_proj"] == (4, 0, 4)
    assert ranks["self_attn.o_proj"] == ranks["mlp.up_proj"] == (0, 2, 0)


def test_adapter_weights_are_never_dropped_unseen(imported):
    base, folders, config = imported
    adapters = [read_peft_folder(path) for path in folders]
    narrow = config.model_copy(update={"experts": config.experts.model_copy(update={"sites": ["attn_in"]})})
    with pytest.raises(ConfigError, match="o_proj|up_proj"):
        plan_sites(narrow, base, DOMAINS, adapters)
    other = make_llama(vocab_size=50, hidden_size=64)
    with pytest.raises(ConfigError, match="the base has"):
        plan_sites(config, other, DOMAINS, adapters)


@both
def test_saved_and_loaded_it_gives_the_same_logits(kind, tmp_path):
    model, config = build(kind)
    routed = route(model, config)
    stir(routed)
    ids = ids_of()
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
    save_adapter(tmp_path, routed.tensors(), routed.plan, {"base": {}, "domains": DOMAINS})
    manifest = read_manifest(tmp_path)
    assert plan_of(manifest) == routed.plan
    again = attach(config, MODELS[kind][0](), plan_of(manifest), num_domains=3)
    load_weights(again.tensors(), read_weights(tmp_path, manifest), "x")
    with torch.no_grad():
        assert torch.equal(again.model.eval()(ids, use_cache=False).logits, expected)


def test_bf16_base_with_float32_experts():
    model, config = build("llama")
    exact = route(copy.deepcopy(model), config)
    half = route(model.to(torch.bfloat16), config)
    stir(exact), stir(half)
    ids = ids_of()
    assert all(p.dtype == torch.float32 for group in half.groups.values() for p in group.values())
    with torch.no_grad():
        torch.testing.assert_close(half.model(ids).logits.float(), exact.model(ids).logits, rtol=0.1, atol=0.05)
    half.model.train()
    with half.context.open(facts(ids)):
        half.model(ids, use_cache=False).logits.float().square().mean().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for g in half.groups.values() for p in g.values())
