"""Sites are found on the meta device, so whole families can be tried at no cost."""

from typing import Any

import pytest
import torch
from torch import nn

from loramoe_train.errors import ConfigError
from loramoe_train.models.sites import find_sites, matches

LLAMA = {
    "attn_in": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    "attn_out": ["self_attn.o_proj"],
    "ffn": ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"],
    "ssm": [],
}
MAMBA = {"attn_in": [], "ffn": [], "ssm": ["mixer.in_proj", "mixer.x_proj", "mixer.dt_proj", "mixer.out_proj"]}
SHAPE = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
SHAPE |= {"num_key_value_heads": 2, "intermediate_size": 48, "pad_token_id": 0}


def meta(model_type: str, **changes: Any) -> nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **SHAPE | changes))


def names(
    model: nn.Module, wanted: Any, kinds: dict[str, list[str]] = LLAMA, layers: str = "model.layers"
) -> list[str]:
    return [site.name for site in find_sites(model, layers, kinds, wanted)]


def test_a_kind_gives_its_modules_layer_by_layer_with_sizes() -> None:
    sites = find_sites(meta("llama", attention_bias=True), "model.layers", LLAMA, "attn_in")
    assert [(s.name, s.layer, s.kind, s.in_features, s.out_features, s.has_bias) for s in sites] == [
        (f"model.layers.{layer}.self_attn.{name}", layer, "attn_in", 32, out, True)
        for layer in (0, 1)
        for name, out in (("q_proj", 32), ("k_proj", 16), ("v_proj", 16))
    ]


def test_names_patterns_and_kinds_together_give_each_site_once() -> None:
    model = meta("llama")
    assert names(model, ["q_proj", "attn_in", "self_attn.q_proj"]) == names(model, "attn_in")
    assert names(model, "mlp.*") == names(model, "ffn") == names(model, ["gate_proj", "up_proj", "mlp.down_proj"])
    assert names(model, "*.[qv]_proj") == [f"model.layers.{i}.self_attn.{p}_proj" for i in (0, 1) for p in ("q", "v")]


def test_all_linear_takes_the_layers_but_not_the_head_and_knows_the_kinds() -> None:
    sites = find_sites(meta("llama"), "model.layers", {"ffn": ["mlp.up_proj"]}, "all_linear")
    assert len(sites) == 2 * 7
    assert {site.kind for site in sites} == {"ffn", "other"}
    assert not any("lm_head" in site.name for site in sites)


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [("q_proj", True), ("self_attn.q_proj", True), ("self_attn.*", True), ("_proj", False), ("attn.q_proj", False)],
)
def test_matching(pattern: str, expected: bool) -> None:
    assert matches("self_attn.q_proj", pattern) is expected


def test_a_recipe_that_names_all_kinds_serves_llama_and_mamba() -> None:
    wanted = ["attn_in", "attn_out", "ssm"]
    assert len(names(meta("llama"), wanted)) == 2 * 4
    mamba = meta("mamba", state_size=4)
    assert len(names(mamba, wanted, MAMBA, "backbone.layers")) == 2 * 4
    with pytest.raises(ConfigError, match="experts.sites=attn_in,ffn selects nothing: .* it has ssm"):
        names(mamba, ["attn_in", "ffn"], MAMBA, "backbone.layers")


def test_a_hybrid_has_kinds_in_some_layers_only() -> None:
    kinds = {"attn_in": ["self_attn.q_proj"], "ssm": ["mamba.in_proj", "mamba.x_proj"]}
    model = meta("jamba", num_experts=1, attn_layer_period=2, attn_layer_offset=1)
    assert names(model, ["attn_in", "ssm"], kinds) == [
        "model.layers.0.mamba.in_proj",
        "model.layers.0.mamba.x_proj",
        "model.layers.1.self_attn.q_proj",
    ]


def test_a_fused_projection_is_one_site() -> None:
    kinds = {"attn_in": ["self_attn.qkv_proj"]}
    sites = find_sites(meta("phi3"), "model.layers", kinds, "attn_in")
    assert [(site.in_features, site.out_features) for site in sites] == [(32, 32 + 16 + 16)] * 2


@pytest.mark.parametrize("cls", ["Linear4bit", "Linear8bitLt"])
def test_quantised_layers_count_with_their_unpacked_sizes(cls: str) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    layer = getattr(bitsandbytes.nn, cls)(64, 128, bias=False).to("cpu")
    model = nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({"q_proj": layer})])})
    (site,) = find_sites(model, "layers", {"attn_in": ["q_proj"]}, "attn_in")
    assert (site.in_features, site.out_features, site.has_bias) == (64, 128, False)


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ("q_porj", "experts.sites: no site matches 'q_porj'; did you mean 'q_proj'"),
        ("self_atn.q_proj", "did you mean 'self_attn.q_proj'"),
        ("atn_in", "did you mean 'attn_in'"),
        ("all-linear", "did you mean 'all_linear'"),
        ("lm_head", "no site matches 'lm_head'; known: "),
        ("self_attn", "no site matches 'self_attn'"),
        ("mamba.*", "no site matches"),
    ],
)
def test_unknown_names(wanted: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        names(meta("llama"), [wanted])
    assert "\n" not in str(caught.value)


def test_the_wrong_model_group_is_named() -> None:
    with pytest.raises(
        ConfigError, match="model.sites.attn_in names 'self_attn.q_proj', which no layer .*'self_attn.qkv_"
    ):
        names(meta("phi3"), "attn_in")
    with pytest.raises(ConfigError, match="choose the model group of this model, or its names with model/sites"):
        names(meta("mamba", state_size=4), "attn_in", LLAMA, "backbone.layers")


def test_wrong_layers_are_named() -> None:
    with pytest.raises(
        ConfigError, match="model.layers='model.layer' is no list of layers .*did you mean 'model.layers'"
    ):
        names(meta("llama"), "attn_in", layers="model.layer")


@pytest.mark.parametrize("wanted", ["all_linear", "attn_in", "c_attn"])
def test_conv1d_is_refused_by_name(wanted: str) -> None:
    model = meta("gpt2", n_embd=32, n_layer=2, n_head=4)
    with pytest.raises(ConfigError, match="'attn.c_attn' is a Conv1D"):
        names(model, wanted, {"attn_in": ["attn.c_attn"]}, "transformer.h")


@pytest.mark.parametrize("wanted", ["all_linear", "ffn", "down_proj"])
@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe"])
def test_stacked_expert_weights_are_refused_by_class_while_attention_is_served(model_type: str, wanted: str) -> None:
    model = meta(model_type, num_local_experts=4, num_experts=4, moe_intermediate_size=16)
    with pytest.raises(ConfigError, match="is a (Mixtral|Qwen3Moe)Experts with 3-D expert weights .*attn_in"):
        names(model, wanted)
    assert len(names(model, ["attn_in", "attn_out"])) == 2 * 4
