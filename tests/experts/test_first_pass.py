"""One decision for the whole model from a first pass of the base: its options against loops and PEFT's X-LoRA, packed,
cached; `tests/test_twins.py` compares the recipe."""

import copy
from functools import cache
from pathlib import Path

import pytest
import torch
from peft import XLoraConfig, get_peft_model

from loramoe_train.build import attach, build_aux
from loramoe_train.data.masks import block_causal_mask
from loramoe_train.errors import ConfigError
from loramoe_train.experts.adapters import load_weights, plan_of, read_manifest, read_weights, save_adapter
from loramoe_train.experts.peft_folder import read_peft_folder
from loramoe_train.planning import make_counts
from loramoe_train.site_plan import plan_sites
from tests.composing import composed
from tests.conftest import make_llama
from tests.test_routed_model import facts, ids_of, make_mamba, make_peft, route
from tests.twins.first_pass import FirstPass

RECIPE = ("+recipe=xlora", "router.make.score.depth=3", "router.make.score.width=16", "router.make.score.dropout=0")
TOP_2 = ("router.top_k=2", "router.make.train.select._target_=loramoe_train.routers.select.TopK")
PER_SITE = ("router.per_site=true",)
# of unequal rank and scale, on different projections
ADAPTERS = ({"target_modules": 0}, {"r": 2, "use_rslora": True, "target_modules": 1}, {"r": 3, "target_modules": 2})
TARGETS = {
    "attention": (["q_proj", "v_proj"], ["q_proj", "o_proj", "up_proj"], ["down_proj", "q_proj"]),
    "falcon_mamba": (["in_proj", "x_proj"], ["in_proj"], ["x_proj"]),
}


def make_qwen3():
    """Normalised queries and keys, and heads whose widths do not add up to the hidden size."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    shape = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 12}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    return Qwen3ForCausalLM(Qwen3Config(**shape, **heads)).eval()


BASES = {"llama": lambda: make_llama(vocab_size=50), "qwen3": make_qwen3, "falcon_mamba": make_mamba}


@cache
def base_of(kind):
    return BASES[kind]()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """By kind of base: three PEFT folders."""

    @cache
    def make(kind) -> list[Path]:
        where, targets = tmp_path_factory.mktemp(kind), TARGETS.get(kind, TARGETS["attention"])
        return [
            make_peft(base_of(kind), where / str(n), n, **{**changes, "target_modules": targets[n]})
            for n, changes in enumerate(ADAPTERS)
        ]

    return make


def build(kind, folders, *overrides, recipe=RECIPE, count=3):
    paths = folders(kind)[:count]
    own = ("model=falcon_mamba_7b",) if kind == "falcon_mamba" else ()
    config = composed(*recipe, *own, f"experts.adapters=[{','.join(map(str, paths))}]", *overrides)
    routed = route(copy.deepcopy(base_of(kind)), config, [read_peft_folder(path) for path in paths])
    sharpen(routed)
    return routed, config


def sharpen(routed, seed=1):
    """Decisions far from uniform, so that a wrong one shows."""
    generator = torch.Generator().manual_seed(seed)
    (owner,) = routed.blocks.values()
    with torch.no_grad():
        for name, parameter in owner.router.named_parameters():
            parameter.normal_(0, 1.0 if name.endswith("bias") else 0.5, generator=generator)


# -- values and gradients ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "overrides"), [("llama", PER_SITE), ("qwen3", (*PER_SITE, *TOP_2)), ("qwen3", TOP_2)])
def test_options_equal_loops_in_values_and_gradients(kind, overrides, folders):
    routed, config = build(kind, folders, *overrides)
    routed.model.double().train()
    ids = ids_of(2, 4, seed=1)
    leaf = {name: t.detach().clone().requires_grad_() for name, t in routed.tensors().items()}
    experts = {}
    for site, spec in routed.plan.items():
        downs, ups = (leaf[f"{site}.bank.{name}"].split(spec.ranks) for name in ("down", "up"))
        experts[site] = [(down, up.T) for down, up in zip(downs, ups, strict=True)]
    twin = FirstPass(depth=3, per_site=config.router.per_site, chosen=2 if config.router.top_k else None)
    base = copy.deepcopy(base_of(kind)).double().requires_grad_(False)
    expected = twin.logits(base, ids, torch.ones_like(ids), leaf, experts)
    expected.square().sum().backward()
    with routed.context.open(facts(ids)) as records:
        logits = routed.model(ids, use_cache=False).logits
        logits.square().sum().backward()
        assert list(records) == routed.recorded
    # the norms compute in float32 in either
    torch.testing.assert_close(logits, expected, rtol=1e-6, atol=1e-6)
    plain = base_of(kind)(ids, use_cache=False).logits.double()
    assert not torch.allclose(expected, plain, atol=0.1)
    for group in routed.groups.values():
        for name, p in group.items():
            assert p.grad.abs().max() > 0, name
            torch.testing.assert_close(p.grad, leaf[name].grad, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize(
    ("overrides", "settings"),
    [
        ((), {}),
        ((*PER_SITE, "router.make.temperature=2"), {"layerwise_scalings": True, "softmax_temperature": 2.0}),
        ((*PER_SITE, *TOP_2), {"layerwise_scalings": True, "top_k_lora": 2}),
        (
            (*TOP_2, "router.make.train.weight=renormalised"),
            {"top_k_lora": 2, "enable_softmax": False, "enable_softmax_topk": True},
        ),
    ],
    ids=["shared", "per site", "top 2", "top 2 before the softmax"],
)
def test_peft_gives_the_same_logits(overrides, settings, folders):
    routed, _ = build("llama", folders, *overrides)
    base = copy.deepcopy(base_of("llama"))
    base.config.use_cache = False
    paths = {str(n): str(path) for n, path in enumerate(folders("llama"))}
    classifier = {"hidden_size": 32, "xlora_depth": 3, "xlora_size": 16, "xlora_dropout_p": 0.2}
    theirs = get_peft_model(base, XLoraConfig(task_type="CAUSAL_LM", adapters=paths, **classifier, **settings)).eval()
    linears = [m for m in theirs.base_model.internal_xlora_classifier.modules() if isinstance(m, torch.nn.Linear)]
    (owner,) = routed.blocks.values()
    with torch.no_grad():
        for ours, linear in zip(owner.router.score.layers, linears, strict=True):
            linear.weight.copy_(ours.weight), linear.bias.copy_(ours.bias)
        ids = ids_of(3, 6)
        mask = torch.ones_like(ids)
        mask[0, :2] = 0  # padding on the left
        expected = theirs(input_ids=ids, attention_mask=mask).logits
        logits = routed.model.eval()(ids, attention_mask=mask).logits
    torch.testing.assert_close(logits[mask.bool()], expected[mask.bool()], rtol=1e-4, atol=1e-5)


def test_packed_rows_equal_separate_ones(folders):
    routed, _ = build("llama", folders)
    routed.model.train()
    (owner,) = routed.blocks.values()
    first, second = ids_of(1, 4, seed=1), ids_of(1, 5, seed=2)
    segments = torch.tensor([[0] * 4 + [1] * 5])
    packed = torch.cat([first, second], dim=1)
    inputs = {"attention_mask": block_causal_mask(segments, torch.float32)}
    inputs["position_ids"] = torch.cat([torch.arange(4), torch.arange(5)])[None]
    found = []
    for rows in ([(packed, inputs)], [(first, {}), (second, {})]):
        logits = []
        for ids, given in rows:
            with routed.context.open(facts(ids)):
                logits.append(routed.model(ids, use_cache=False, **given).logits)
                logits[-1].square().sum().backward()
        found.append((torch.cat(logits, dim=1).detach(), [p.grad.clone() for p in owner.router.parameters()]))
        owner.router.zero_grad()
    (one, ours), (other, theirs) = found
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


# -- key-value cache ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("overrides", [(), PER_SITE], ids=["shared", "per site"])
@pytest.mark.parametrize("kind", BASES)
def test_decoding_with_a_cache_equals_the_whole_pass_token_by_token(kind, overrides, folders):
    routed, _ = build(kind, folders, *overrides)
    ids = ids_of(2, 7)
    with torch.no_grad():
        full = routed.model(ids, use_cache=False).logits
        out = routed.model(ids[:, :3], use_cache=True)
        steps = [out.logits]
        for position in range(3, ids.shape[1]):
            name = "cache_params" if kind == "falcon_mamba" else "past_key_values"
            out = routed.model(ids[:, position : position + 1], use_cache=True, **{name: getattr(out, name)})
            steps.append(out.logits)
    torch.testing.assert_close(torch.cat(steps, dim=1), full, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("kind", "beams"), [("llama", 1), ("llama", 3), ("qwen3", 2), ("falcon_mamba", 1)])
def test_generation_with_a_cache_is_generation_without(kind, beams, folders):
    """A batch of prompts padded on the left (not for a state-space model, whose states padding enters)."""
    routed, _ = build(kind, folders)
    prompts, mask = ids_of(3, 5, seed=4), torch.ones(3, 5, dtype=torch.long)
    if kind != "falcon_mamba":
        mask[0, :3], mask[1, :1] = 0, 0
    options = {"max_new_tokens": 6, "do_sample": False, "num_beams": beams, "pad_token_id": 0, "eos_token_id": 49}
    options |= {"num_return_sequences": beams, "output_scores": True, "return_dict_in_generate": True}
    with torch.no_grad():
        cached, plain = (
            routed.model.generate(prompts, attention_mask=mask, use_cache=use, **options) for use in (True, False)
        )
        with routed.context.override("off"):
            base = routed.model.generate(prompts, attention_mask=mask, use_cache=True, **options)
    assert torch.equal(cached.sequences, plain.sequences) and not torch.equal(cached.sequences, base.sequences)
    for ours, theirs in zip(cached.scores, plain.scores, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
    if mask.all():
        return
    alone = routed.model.generate(prompts[:1, 3:], attention_mask=mask[:1, 3:], use_cache=True, **options)
    assert torch.equal(alone.sequences[:, 2:], cached.sequences[:beams, 5:])


@pytest.mark.parametrize("kind", ["llama", "falcon_mamba"])
def test_a_cache_that_knows_no_first_pass_is_refused(kind, folders):
    routed, _ = build(kind, folders)
    ids, name = ids_of(1, 4), "cache_params" if kind == "falcon_mamba" else "past_key_values"
    with torch.no_grad(), routed.context.override("off"):
        filled = getattr(routed.model(ids, use_cache=True), name)
    # not asked for a cache, the first pass keeps none, though the model does
    unasked = getattr(routed.model(ids), name)
    for cache_ in (filled, unasked):
        with pytest.raises(RuntimeError, match=r"router\.scope=model: the cache holds .* took no decision"):
            routed.model(ids[:, :1], use_cache=True, **{name: cache_})
    if kind == "llama":
        with pytest.raises(RuntimeError, match=r"cannot go on beside a StaticCache; .* cache_implementation=None"):
            routed.model.generate(ids, max_new_tokens=2, cache_implementation="static", pad_token_id=0)
    with torch.no_grad():  # and a refusal leaves nothing behind
        torch.testing.assert_close(routed.model(ids).logits, routed.model(ids, use_cache=False).logits)


# -- life cycle --------------------------------------------------------------------------------------------------------


def test_a_decision_ends_with_its_pass_and_is_never_guessed(folders):
    routed, _ = build("llama", folders)
    ids, site = ids_of(1, 3), next(iter(routed.layers.values()))
    x = torch.zeros(1, 3, site.in_features)
    routed.model.eval()(ids)
    with pytest.raises(RuntimeError, match="called outside"):
        site(x)
    broken = routed.model.model.layers[1].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        routed.model(ids)
    broken.remove()
    with pytest.raises(RuntimeError, match="called outside"):
        site(x)
    routed.model.train()
    with pytest.raises(RuntimeError, match="outside `with context.open"):
        routed.model(ids)
    with routed.context.open(facts(ids)):
        routed.model(ids, use_cache=False)
        site(x)  # as a checkpointed layer does in backward
        with pytest.raises(RuntimeError, match="a second training forward"):
            routed.model(ids, use_cache=False)
    with routed.context.open(facts(ids)), pytest.raises(RuntimeError, match="called outside"):
        site(x)


def test_a_site_that_the_model_bypasses_is_named_in_training(folders):
    routed, _ = build("llama", folders)
    routed.model.model.layers[1].mlp.forward = lambda hidden_states: hidden_states
    routed.model.train()
    ids = ids_of(1, 3)
    message = r"experts\.sites: the model never called 2 of 10 sites, .*layers\.1\.mlp\.up_proj"
    with routed.context.open(facts(ids)), pytest.raises(ConfigError, match=message):
        routed.model(ids, use_cache=False)


@pytest.mark.parametrize("mode", ["by_domain", "uniform", "off"])
def test_modes_without_a_router(mode, folders):
    routed, _ = build("llama", folders)
    ids = ids_of(2, 4)
    calls = []
    routed.model.model.layers[0].register_forward_hook(lambda *_: calls.append(1))
    with routed.context.open(facts(ids, [0, 1])) as records, routed.context.override(mode), torch.no_grad():
        logits = routed.model(ids, use_cache=False).logits
        seen = dict(records)
    assert len(calls) == 1 and list(seen) == ([] if mode == "off" else ["model"])
    with torch.no_grad():
        assert torch.equal(logits, base_of("llama")(ids, use_cache=False).logits) == (mode == "off")
    if mode == "by_domain":
        assert torch.equal(seen["model"].weights_NE.argmax(dim=1), torch.tensor([0] * 4 + [1] * 4))


@pytest.mark.parametrize("overrides", [(), PER_SITE], ids=["shared", "per site"])
def test_saved_and_loaded_it_gives_the_same_logits(overrides, folders, tmp_path):
    routed, config = build("llama", folders, *overrides)
    ids = ids_of()
    with torch.no_grad():
        expected = routed.model(ids).logits
    trainable = {name for name, p in routed.model.named_parameters() if p.requires_grad}
    assert trainable == {name for group in routed.groups.values() for name in group}
    assert all(name.startswith("model.router.score.layers.") for name in routed.groups["routers"])
    save_adapter(tmp_path, routed.tensors(), routed.plan, {"base": {}, "domains": ["a", "b", "c"]})
    manifest = read_manifest(tmp_path)
    again = attach(config, copy.deepcopy(base_of("llama")), plan_of(manifest), num_domains=3)
    load_weights(again.tensors(), read_weights(tmp_path, manifest), "x")
    with torch.no_grad():
        assert torch.equal(again.model(ids).logits, expected)


def test_losses_take_the_records_that_there_are(folders):
    losses = ("load_balance", "routing_specialization", "router_z", "routing_entropy", "neg_log_mean")
    for overrides in ((), PER_SITE):
        routed, config = build("llama", folders, *overrides, f"aux_loss=[{','.join(losses)}]", "router.top_k=2")
        ids = ids_of()
        given = facts(ids, [0, 1, 2])
        routed.model.train()
        terms = build_aux(config, routed.plan)
        with routed.context.open(given) as records:
            routed.model(ids, use_cache=False)
            for name in losses:
                loss = terms[name].loss
                value = loss(records, given, loss.statistics(records, given))
                (gradient,) = torch.autograd.grad(
                    value, [routed.groups["routers"]["model.router.score.layers.0.weight"]], retain_graph=True
                )
                assert torch.isfinite(value) and gradient.abs().sum() > 0, name


# -- configuration -----------------------------------------------------------------------------------------------------


def test_counts_of_the_plan():
    """A classifier 4096 -> 2048 -> experts, or -> sites x experts."""
    model = ("model=llama3_8b", "router=mlp", "router.make.score.depth=2", "experts.layout=3", "experts.sites=[q_proj]")
    hidden = 4096 * 2048 + 2048
    assert make_counts(composed(*model))[0].routers == hidden + 2048 * 3 + 3
    assert make_counts(composed(*model, *PER_SITE))[0].routers == hidden + (2048 * 3 + 3) * 32


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("router=topk", "router.per_site=true"), "router.per_site=true goes with router.scope=model"),
        (("router=topk", "router.scope=model", "router.per_site=true"), "a score with a head for every site"),
        (("router=mlp", "experts.layout=2468"), "hold different numbers of experts"),
        (("router=topk", "router.scope=model", "router.top_k=[1,1,2,2]"), "choose another number of them"),
        (("router=mlp", "router.make.score.depth=0"), "depth and width must be at least 1"),
        (("router=topk", "router.scope=model", "experts.layout=2", "router.top_k=3"), "router.top_k=3 does not fit"),
    ],
)
def test_refusals(overrides, message):
    with pytest.raises(ConfigError, match=message):
        make_counts(composed(*overrides))


def test_top_k_above_the_number_of_adapters(folders):
    config = composed(*RECIPE, *TOP_2, "router.top_k=4", f"experts.adapters=[{','.join(map(str, folders('llama')))}]")
    with pytest.raises(ConfigError, match=r"router\.top_k=4 does not fit layer 0, which has 3 experts"):
        plan_sites(config, base_of("llama"), ["a"], [read_peft_folder(path) for path in folders("llama")])


def test_a_model_without_a_module_for_its_layers(folders):
    routed, config = build("llama", folders)
    renamed = {}
    for name, spec in routed.plan.items():
        site = type(spec.site)(**{**vars(spec.site), "name": name.removeprefix("model.")})
        renamed[site.name] = type(spec)(site, spec.ranks, spec.scales)
    with pytest.raises(ConfigError, match="decoder layers in a module of their own"):
        attach(config, copy.deepcopy(base_of("llama")).model, renamed, num_domains=1)
