"""Every projection of a state-space mixer that is wrapped takes part, whatever kernels are installed.

The stand-in wrapper is all that `adapt_mixers` may rely on: a module with `base` and no weight. Merging its low-rank
delta into the base weight gives the reference.
"""

import copy
import importlib

import pytest
import torch
from torch import Tensor, nn

from loramoe_train.errors import ConfigError
from loramoe_train.experts.bank import ExpertBank
from loramoe_train.experts.linear import ExpertLinear
from loramoe_train.experts.ssm import SERVED, adapt_mixers, restore_mixers
from loramoe_train.routing.context import RoutingContext
from loramoe_train.routing.types import Tokens

PROJECTIONS = ("in_proj", "x_proj", "dt_proj", "out_proj")
COMMON = {"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 2, "pad_token_id": 0, "eos_token_id": 1}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48}
MAMBA1 = {"state_size": 4, "time_step_rank": 6, "expand": 2, "conv_kernel": 3}
MAMBA2 = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 8, "mamba_expand": 2}
CONFIGS = {
    "mamba": COMMON | MAMBA1,
    "falcon_mamba": COMMON | MAMBA1,
    "jamba": COMMON
    | HEADS
    | {"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 1, "mamba_d_state": 4, "mamba_dt_rank": 5},
    "zamba": COMMON
    | HEADS
    | {"n_mamba_heads": 2, "mamba_d_state": 4, "mamba_dt_rank": 5, "layers_block_type": ["mamba", "mamba"]},
    "mamba2": COMMON | {"state_size": 8, "num_heads": 8, "head_dim": 8, "n_groups": 1, "chunk_size": 4},
    "bamba": COMMON | HEADS | MAMBA2 | {"attn_layer_indices": [1], "mamba_chunk_size": 4},
    "falcon_h1": COMMON | HEADS | MAMBA2 | {"mamba_d_ssm": 64, "mamba_chunk_size": 4, "head_dim": 8},
    "granitemoehybrid": COMMON
    | HEADS
    | MAMBA2
    | {
        "layer_types": ["mamba", "attention"],
        "mamba_chunk_size": 4,
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
        "shared_intermediate_size": 32,
        "position_embedding_type": "rope",
    },
    "nemotron_h": COMMON
    | HEADS
    | {"hybrid_override_pattern": "M*", "mamba_num_heads": 8, "mamba_head_dim": 8, "n_groups": 1, "ssm_state_size": 8}
    | {"chunk_size": 4, "head_dim": 8},
    "zamba2": COMMON
    | HEADS
    | {"n_mamba_heads": 8, "mamba_headdim": 8, "mamba_ngroups": 1, "mamba_d_state": 8, "mamba_expand": 2}
    | {"chunk_size": 4, "layers_block_type": ["mamba", "mamba"], "num_mem_blocks": 1, "kv_channels": 8},
}
TOKENS = torch.randint(2, 40, (2, 8), generator=torch.Generator().manual_seed(1))


class Wrapped(nn.Module):
    """y = base(x) + up down x, with both factors random."""

    def __init__(self, base: nn.Linear, rank: int = 2) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Parameter(torch.randn(rank, base.in_features) * 0.3)
        self.up = nn.Parameter(torch.randn(base.out_features, rank) * 0.3)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.down.T @ self.up.T


def tiny(model_type: str, **changes: int) -> nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **CONFIGS[model_type] | changes))
    for parameter in model.parameters():
        if parameter.ndim == 2:  # larger than the usual initial values, so that effects are visible
            nn.init.normal_(parameter, std=0.2)
    return model.requires_grad_(False).eval()


def mixers(model: nn.Module) -> dict[str, nn.Module]:
    """By name: all mixers, adapted or not."""
    classes = {name: {base.__name__ for base in type(module).__mro__} for name, module in model.named_modules()}
    return {name: model.get_submodule(name) for name in classes if classes[name] & SERVED.keys()}


def wrap(model: nn.Module, projections: tuple[str, ...], only: int | None = None) -> list[str]:
    """Wrap the projections of all mixers, or of the one numbered `only`; returns the site names."""
    torch.manual_seed(7)
    chosen = list(mixers(model))
    sites = []
    for name in chosen if only is None else [chosen[only]]:
        for projection in projections:
            site = f"{name}.{projection}"
            model.set_submodule(site, Wrapped(model.get_submodule(site)))
            sites.append(site)
    return sites


def merged(model: nn.Module, sites: list[str]) -> nn.Module:
    """A plain copy of a wrapped model: delta in the base weight, original classes."""
    model = copy.deepcopy(model)
    restore_mixers(model)
    for site in sites:
        wrapper = model.get_submodule(site)
        wrapper.base.weight += wrapper.up.detach() @ wrapper.down.detach()
        model.set_submodule(site, wrapper.base)
    return model


def forward(model: nn.Module, training: bool = False, embeds: Tensor | None = None) -> Tensor:
    model.train(training)
    inputs = {"input_ids": TOKENS} if embeds is None else {"inputs_embeds": embeds}
    return model(**inputs, use_cache=False).logits


def fake_kernel(monkeypatch: pytest.MonkeyPatch, model: nn.Module) -> list[str]:
    """A fused kernel that is installed and returns zeros; the list tells how often it ran."""
    mixer = next(iter(mixers(model).values()))
    module, calls = importlib.import_module(type(mixer).__module__), []

    def kernel(projected: Tensor, *weights: object, **others: object) -> Tensor:
        for weight in [*weights, *others.values()]:
            assert not callable(getattr(weight, "__matmul__", None)) or isinstance(weight, Tensor)
        calls.append("fused")
        return torch.zeros(*TOKENS.shape, 32)

    for name in ("mamba_inner_fn", "mamba2_split_conv1d_scan_combined", "mamba_split_conv1d_scan_combined"):
        if hasattr(module, name):
            monkeypatch.setattr(module, name, kernel)
    return calls


@pytest.mark.parametrize("model_type", CONFIGS)
def test_the_table_of_mixers_names_real_classes_and_projections(model_type: str) -> None:
    found = mixers(tiny(model_type))
    assert found
    for mixer in found.values():
        linears = {name for name, module in mixer.named_children() if isinstance(module, nn.Linear)}
        assert linears == SERVED[type(mixer).__name__]


def test_every_class_of_the_table_is_tested() -> None:
    seen = {type(mixer).__name__ for model_type in CONFIGS for mixer in mixers(tiny(model_type)).values()}
    assert seen == set(SERVED)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("model_type", CONFIGS)
def test_all_projections_equal_the_merged_weights_and_receive_gradients(model_type: str, training: bool) -> None:
    model = tiny(model_type)
    base = forward(model, training)
    projections = tuple(sorted(SERVED[type(next(iter(mixers(model).values()))).__name__]))
    sites = wrap(model, projections)
    assert adapt_mixers(model, sites) == list(mixers_of(sites))
    reference = merged(model, sites)

    embeds = torch.randn(2, 8, 32, generator=torch.Generator().manual_seed(3), requires_grad=True)
    twin = embeds.detach().clone().requires_grad_()
    direction = torch.randn(2, 8, 40, generator=torch.Generator().manual_seed(4))
    ours, theirs = forward(model, training, embeds), forward(reference, training, twin)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    (ours * direction).sum().backward()
    (theirs * direction).sum().backward()
    torch.testing.assert_close(embeds.grad, twin.grad, rtol=1e-3, atol=1e-3 * float(twin.grad.abs().max()))
    for site in sites:
        wrapper = model.get_submodule(site)
        assert wrapper.down.grad.abs().max() > 0 and wrapper.up.grad.abs().max() > 0, site
    assert (forward(model, training) - base).abs().max() > 1e-3


def mixers_of(sites: list[str]) -> dict[str, None]:
    return dict.fromkeys(site.rpartition(".")[0] for site in sites)


@pytest.mark.parametrize("projection", PROJECTIONS)
@pytest.mark.parametrize("model_type", ["mamba", "falcon_mamba"])
@pytest.mark.parametrize("fused", [False, True])
def test_each_projection_alone_takes_part(
    model_type: str, projection: str, fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny(model_type)
    plain = forward(model, training=True).detach()
    sites = wrap(model, (projection,))
    adapt_mixers(model, sites)
    if fused and projection != "in_proj":  # for in_proj alone the fused kernel stays right, and stays in use
        fake_kernel(monkeypatch, model)
    for training in (False, True):
        logits = forward(model, training)
        assert (logits - plain).abs().max() > 1e-3
        torch.testing.assert_close(logits, forward(merged(model, sites), training=False), rtol=1e-4, atol=1e-4)
        model.zero_grad()
        logits.square().sum().backward()
        for site in sites:
            assert model.get_submodule(site).up.grad.abs().max() > 0


@pytest.mark.parametrize("model_type", CONFIGS)
def test_a_fused_kernel_serves_the_unrouted_mixers_only(model_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny(model_type)
    calls = fake_kernel(monkeypatch, model)
    forward(model, training=True)
    uses_kernel, total = len(calls), len(mixers(model))
    assert uses_kernel in (0, total)  # jamba and zamba never ask for one
    calls.clear()
    adapt_mixers(model, wrap(model, ("out_proj",), only=0))
    forward(model, training=True)
    assert len(calls) == max(uses_kernel - 1, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("model_type", ["mamba", "falcon_mamba", "jamba"])
def test_wrappers_that_add_nothing_leave_the_model_as_it_was_bit_for_bit(model_type: str, dtype: torch.dtype) -> None:
    model = tiny(model_type).to(dtype)
    before = forward(model)
    sites = wrap(model, PROJECTIONS)
    for site in sites:
        nn.init.zeros_(model.get_submodule(site).up)
    model.to(dtype)
    adapt_mixers(model, sites)
    assert torch.equal(forward(model), before)
    assert torch.equal(forward(model, training=True), before)


@pytest.mark.parametrize("model_type", ["mamba", "falcon_mamba"])
def test_cached_generation_equals_uncached(model_type: str) -> None:
    model = tiny(model_type)
    adapt_mixers(model, wrap(model, PROJECTIONS))
    arguments = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(TOKENS)}
    with torch.no_grad():
        cached = model.generate(TOKENS, use_cache=True, output_logits=True, return_dict_in_generate=True, **arguments)
        assert torch.equal(cached.sequences, model.generate(TOKENS, use_cache=False, **arguments))
        whole = model(cached.sequences[:, :-1], use_cache=False).logits
    torch.testing.assert_close(torch.stack(cached.logits, dim=1), whole[:, TOKENS.shape[1] - 1 :], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("model_type", ["mamba", "falcon_mamba"])
def test_gradient_checkpointing_gives_the_same_gradients(model_type: str) -> None:
    model = tiny(model_type)
    sites = wrap(model, PROJECTIONS)
    adapt_mixers(model, sites)

    def gradients() -> list[Tensor]:
        model.zero_grad()
        forward(model, training=True).square().sum().backward()
        return [parameter.grad.clone() for site in sites for parameter in model.get_submodule(site).parameters(False)]

    plain = gradients()
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    for ours, reference in zip(gradients(), plain, strict=True):
        torch.testing.assert_close(ours, reference, rtol=0, atol=0)


@pytest.mark.parametrize("model_type", ["mamba", "falcon_mamba"])
def test_a_quantised_dt_proj_is_served(model_type: str) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    rank = 64  # one quantisation block, the narrowest that the CPU kernel takes
    model = tiny(model_type, time_step_rank=rank)
    sites = wrap(model, ("dt_proj",))
    reference = copy.deepcopy(model)
    for site in sites:
        wrapper = model.get_submodule(site)
        quantised = bitsandbytes.nn.Linear4bit(rank, 64, bias=True, compute_dtype=torch.float32, quant_type="nf4")
        quantised.load_state_dict(wrapper.base.state_dict())
        wrapper.base = quantised.to("cpu")
        dense = nn.Linear(rank, 64)
        packed = quantised.weight
        dense.weight.data = bitsandbytes.functional.dequantize_4bit(packed.data, packed.quant_state)
        assert (dense.weight - reference.get_submodule(site).base.weight).abs().max() > 1e-3  # really 4-bit
        dense.weight.data += wrapper.up.data @ wrapper.down.data
        dense.bias.data = quantised.bias.data
        reference.set_submodule(site, dense)
    adapt_mixers(model, sites)
    # in training mode: in evaluation the CPU kernel of bitsandbytes may multiply in bf16
    torch.testing.assert_close(forward(model, training=True), forward(reference), rtol=1e-4, atol=1e-4)
    assert all(model.get_submodule(site).base.bias is not None for site in sites)


@pytest.mark.parametrize("model_type", ["mamba", "falcon_mamba"])
def test_the_program_s_own_wrappers_start_as_the_identity_and_learn(model_type: str) -> None:
    """ExpertLinear instead of the stand-in: fresh banks change nothing, and then every bank gets a gradient."""
    model = tiny(model_type)
    before = forward(model)
    context, layers = RoutingContext(), {}
    for mixer in mixers(model):
        for projection in PROJECTIONS:
            site = f"{mixer}.{projection}"
            base = model.get_submodule(site)
            bank = ExpertBank(base.in_features, base.out_features, ranks=[2, 3], scales=[1.0, 2.0])
            layers[site] = ExpertLinear(base, bank, None, site=site, context=context)
            model.set_submodule(site, layers[site])
    assert len(adapt_mixers(model, layers)) == 2
    assert torch.equal(forward(model), before)
    some = torch.ones(TOKENS.numel(), dtype=torch.bool)
    with context.open(Tokens(valid_N=some, task_N=some.long(), domain_N=some.long(), supervised_N=some)) as records:
        loss = forward(model, training=True).square().sum()
        assert set(records) == set(layers)
        loss.backward()
    assert all(layer.bank.up.grad.abs().max() > 0 for layer in layers.values())
    with context.override("off"):
        assert torch.equal(forward(model), before)


def test_adapting_twice_is_adapting_once_and_restoring_undoes_it() -> None:
    model = tiny("mamba")
    classes = {name: type(mixer) for name, mixer in mixers(model).items()}
    sites = wrap(model, ("x_proj",))
    assert len(adapt_mixers(model, sites)) == 2
    assert adapt_mixers(model, sites) == []
    assert restore_mixers(model) == list(classes)
    assert {name: type(mixer) for name, mixer in mixers(model).items()} == classes


def test_only_in_proj_leaves_the_mixer_alone() -> None:
    model = tiny("mamba")
    assert adapt_mixers(model, wrap(model, ("in_proj",))) == []


def test_attention_parents_are_left_alone() -> None:
    model = tiny("jamba")
    sites = [name for name, _ in model.named_modules() if name.endswith("self_attn.q_proj")]
    assert sites and adapt_mixers(model, sites) == []


def test_an_unknown_mixer_class_is_refused() -> None:
    class NovelMixer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.A_log, self.out_proj = nn.Parameter(torch.zeros(2)), Wrapped(nn.Linear(2, 2))

    model = nn.ModuleDict({"mixer": NovelMixer()})
    with pytest.raises(ConfigError, match="mixer is a NovelMixer, a state-space mixer that routed layers cannot serve"):
        adapt_mixers(model, ["mixer.out_proj"])


def test_a_projection_that_the_mixer_class_does_not_serve_is_refused() -> None:
    with pytest.raises(ConfigError, match="'x_proj' of .* cannot be routed; did you mean 'in_proj'"):
        adapt_mixers(tiny("mamba2"), ["backbone.layers.0.mixer.x_proj"])


def test_a_forward_replaced_on_the_instance_is_refused() -> None:
    model = tiny("mamba")
    sites = wrap(model, ("out_proj",), only=0)
    mixer = model.get_submodule(sites[0].rpartition(".")[0])
    mixer.forward = mixer.forward
    with pytest.raises(ConfigError, match="load a state-space model onto one device"):
        adapt_mixers(model, sites)


def test_setting_an_attribute_during_a_routed_forward_fails_loudly() -> None:
    class MambaMixer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.out_proj = Wrapped(nn.Linear(2, 2))

        def forward(self, x: Tensor) -> Tensor:
            self.seen = x
            return self.out_proj(x)

    model = nn.ModuleDict({"mixer": MambaMixer()})
    adapt_mixers(model, ["mixer.out_proj"])
    with pytest.raises(AttributeError, match="must not set 'seen'"):
        model["mixer"](torch.zeros(1, 2))
