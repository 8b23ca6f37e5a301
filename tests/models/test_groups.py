"""The shipped model groups: golden sizes on the meta device, and every name in them exists."""

from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from omegaconf.errors import MissingMandatoryValue

from loramoe_train.models import find_sites, max_positions, meta_model, num_layers, read_architecture
from loramoe_train.paths import CONFIGS
from loramoe_train.schema.model import ModelConfig

# published totals, tied embeddings counted once; layers; positions
GOLDEN = {
    "llama2_7b": (6_738_415_616, 32, 4096),
    "llama3_8b": (8_030_261_248, 32, 8192),
    "mistral_7b": (7_241_732_096, 32, 32768),
    "qwen3_0_6b": (596_049_920, 28, 40960),
    "smollm2_135m": (134_515_008, 30, 8192),
    "smollm2_360m": (361_821_120, 32, 8192),
    "smollm2_1_7b": (1_711_376_384, 24, 8192),
    "phi3_mini": (3_821_079_552, 32, 4096),
    "gemma2_2b": (2_614_341_888, 26, 8192),
    "falcon_mamba_7b": (7_272_665_088, 64, None),
    "mamba_130m": (129_135_360, 24, None),
}
NO_FACTS = {"tiny", "custom"}  # read from files


def group(name: str, *overrides: str) -> ModelConfig:
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        composed = compose(overrides=[f"+model={name}", *overrides])
    return ModelConfig(**OmegaConf.to_container(composed.model, resolve=True, throw_on_missing=True))


def test_every_group_has_a_golden_size() -> None:
    assert {path.stem for path in (CONFIGS / "model").glob("*.yaml")} == set(GOLDEN) | NO_FACTS


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_sizes(name: str) -> None:
    total, layers, positions = GOLDEN[name]
    config = group(name)
    architecture = read_architecture(config)
    assert (num_layers(architecture), max_positions(architecture)) == (layers, positions)
    model = meta_model(config)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert sum(parameter.numel() for parameter in model.parameters()) == total
    title = (CONFIGS / "model" / f"{name}.yaml").read_text().splitlines()[0]
    assert f"{total:,} parameters" in title


@pytest.mark.parametrize("name", GOLDEN)
def test_every_named_site_exists_and_together_they_are_all_linear_layers(name: str) -> None:
    config = group(name)
    model = meta_model(config)
    assert set(config.sites) == {"attn_in", "attn_out", "ffn", "ssm"}
    sites = find_sites(model, config.layers, config.sites, list(config.sites))
    assert sites == find_sites(model, config.layers, config.sites, "all_linear")
    assert {site.layer for site in sites} == set(range(GOLDEN[name][1]))


def test_lora_parameters_of_llama3_attention_in_closed_form() -> None:
    """One expert of rank 64 on q, k, v, o: 32 * 64 * (8192 + 5120 + 5120 + 8192) = 54.53M."""
    config = group("llama3_8b")
    sites = find_sites(meta_model(config), config.layers, config.sites, ["attn_in", "attn_out"])
    assert sum(64 * (site.in_features + site.out_features) for site in sites) == 32 * 64 * (8192 + 5120 + 5120 + 8192)


def test_lora_parameters_of_falcon_mamba_in_closed_form() -> None:
    config = group("falcon_mamba_7b")
    sites = find_sites(meta_model(config), config.layers, config.sites, "ssm")
    per_layer = (4096 + 16384) + (8192 + 256 + 32) + (256 + 8192) + (8192 + 4096)
    assert sum(8 * (site.in_features + site.out_features) for site in sites) == 64 * 8 * per_layer


def test_soft_capped_attention_is_not_left_to_sdpa() -> None:
    assert "attn_logit_softcapping" in read_architecture(group("gemma2_2b"))
    assert group("gemma2_2b").attention == "eager" and group("llama3_8b").attention == "sdpa"


def test_custom_wants_a_name_and_takes_other_sites() -> None:
    with pytest.raises(MissingMandatoryValue):
        group("custom")
    config = group("custom", "model.name=some/model", "model/sites=phi3")
    assert config.name == "some/model" and config.sites["attn_in"] == ["self_attn.qkv_proj"]


def test_a_local_folder_wins_over_the_facts_of_the_group(tiny_model_dir: Path) -> None:
    config = group("llama3_8b", f"+model.path={tiny_model_dir}")
    assert num_layers(read_architecture(config)) == 2
    assert sum(parameter.numel() for parameter in meta_model(config).parameters()) < 100_000
