"""The base arrives frozen, whole, in the wished precision; or not at all, with one line."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from loramoe_train.errors import ConfigError, DataError, MissingFileError
from loramoe_train.models import find_sites, load_model, meta_model
from loramoe_train.schema.model import ModelConfig

LLAMA_SITES = {"attn_in": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]}


@pytest.fixture
def folder(tiny_model_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model_dir, tmp_path / "base"))


@pytest.fixture(scope="module")
def quantisable(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sizes that the 4-bit kernels of the CPU take: multiples of a quantisation block."""
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("base64")
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    facts = AutoConfig.for_model("llama", vocab_size=96, num_key_value_heads=2, **shape)
    AutoModelForCausalLM.from_config(facts).save_pretrained(folder)
    return folder


def config_for(folder: Path, **settings: Any) -> ModelConfig:
    return ModelConfig(name="some/base", path=str(folder), sites=LLAMA_SITES, **settings)


def tokens() -> Tensor:
    return torch.randint(3, 90, (2, 9), generator=torch.Generator().manual_seed(0))


def test_the_base_is_frozen_and_ready_to_evaluate(folder: Path) -> None:
    model = load_model(config_for(folder))
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not model.training and model.config.use_cache
    assert model.config._attn_implementation == "sdpa"
    stored = load_file(folder / "model.safetensors")
    for name, parameter in model.named_parameters():
        assert parameter.dtype == torch.float32 and torch.equal(parameter, stored[name])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_precision_and_attention(dtype: str, attention: str, folder: Path) -> None:
    reference = load_model(config_for(folder))(tokens()).logits
    model = load_model(config_for(folder, dtype=dtype, attention=attention), device="cpu")
    assert {parameter.dtype for parameter in model.parameters()} == {getattr(torch, dtype)}
    assert model.config._attn_implementation == attention
    tolerance = 1e-5 if dtype == "float32" else 3e-2
    torch.testing.assert_close(model(tokens()).logits.float(), reference, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("quantization", "kind", "error"), [("nf4", "Linear4bit", 0.3), ("int8", "Linear8bitLt", 0.05)]
)
def test_quantised_bases_on_the_cpu(quantization: str, kind: str, error: float, quantisable: Path) -> None:
    pytest.importorskip("bitsandbytes")
    full = load_model(config_for(quantisable))
    model = load_model(config_for(quantisable, quantization=quantization))
    layer = model.get_submodule("model.layers.0.self_attn.q_proj")
    assert type(layer).__name__ == kind and not isinstance(model.lm_head, type(layer))
    assert find_sites(model, "model.layers", LLAMA_SITES, "attn_in") == find_sites(
        full, "model.layers", LLAMA_SITES, "attn_in"
    )
    assert not any(parameter.requires_grad for parameter in model.parameters())
    with torch.no_grad():
        exact, rough = full(tokens()).logits, model(tokens()).logits
    assert 0 < (rough - exact).norm() / exact.norm() < error


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_gradients_pass_a_quantised_base_after_an_evaluation(quantization: str, quantisable: Path) -> None:
    """On a CPU with AVX512-BF16 bitsandbytes packs 4-bit weights for inference, and then has no backward pass."""
    pytest.importorskip("bitsandbytes")
    model = load_model(config_for(quantisable, quantization=quantization))
    layer = model.get_submodule("model.layers.0.self_attn.q_proj")
    with torch.no_grad():
        model(tokens())
    model.train()
    x = torch.randn(3, layer.in_features, generator=torch.Generator().manual_seed(0)).requires_grad_()
    layer(x).sum().backward()
    weight_OD = torch.cat([layer(row[None]).detach() for row in torch.eye(layer.in_features)]).T
    expected_D = weight_OD.sum(dim=0)  # the layer is linear: the gradient of the sum, column by column
    assert x.grad is not None and expected_D.norm() > 0
    error = (x.grad - expected_D).norm() / (expected_D.norm() * 3**0.5)
    assert error < 0.05, error


@pytest.mark.parametrize("model_type", ["mamba", "falcon_mamba"])
def test_state_space_models_load_plain_and_quantised(model_type: str, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    from transformers import AutoConfig, AutoModelForCausalLM

    facts = AutoConfig.for_model(model_type, vocab_size=96, hidden_size=64, num_hidden_layers=2, state_size=16)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(facts).save_pretrained(tmp_path)
    plain = load_model(config_for(tmp_path))  # attention=sdpa, of which these models know nothing
    model = load_model(config_for(tmp_path, quantization="int8"))
    mixer = model.backbone.layers[0].mixer
    assert type(mixer.in_proj).__name__ == "Linear8bitLt" and type(mixer.dt_proj) is nn.Linear
    with torch.no_grad():
        exact, rough = plain(tokens()).logits, model(tokens()).logits
    assert 0 < (rough - exact).norm() / exact.norm() < 0.1


def test_gradient_checkpointing_is_non_reentrant_and_changes_no_gradient(folder: Path) -> None:
    def gradient(checkpointing: bool) -> Tensor:
        model = load_model(config_for(folder, gradient_checkpointing=checkpointing))
        assert model.is_gradient_checkpointing is checkpointing
        assert not model.get_input_embeddings()._forward_hooks  # the embeddings' output stays without gradient
        weight = model.get_submodule("model.layers.1.self_attn.q_proj").weight.requires_grad_()
        model.train()
        model(input_ids=tokens(), labels=tokens(), use_cache=False).loss.backward()
        return weight.grad

    torch.testing.assert_close(gradient(True), gradient(False), rtol=0, atol=0)


def test_checkpointing_recomputes_the_layers_that_train(folder: Path) -> None:
    model = load_model(config_for(folder, gradient_checkpointing=True)).train()
    model.get_submodule("model.layers.0.self_attn.q_proj").weight.requires_grad_()
    calls: list[int] = []
    model.model.layers[1].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    loss = model(input_ids=tokens(), labels=tokens(), use_cache=False).loss
    before = len(calls)
    loss.backward()
    assert (before, len(calls)) == (1, 2)


def test_the_meta_model_has_the_names_and_shapes_of_the_real_one(folder: Path) -> None:
    config = config_for(folder, dtype="bfloat16")
    meta, real = meta_model(config), load_model(config)
    shapes = {name: (p.shape, p.dtype) for name, p in real.named_parameters()}
    assert {name: (p.shape, p.dtype) for name, p in meta.named_parameters()} == shapes
    assert {p.device.type for p in meta.parameters()} == {"meta"}


def test_a_meta_model_of_impossible_facts_is_one_line() -> None:
    facts = {"model_type": "llama", "hidden_size": 30, "num_attention_heads": 4}
    for wrong, message in (
        (facts, "cannot be built: .* is not a multiple of the number of attention heads"),
        ({"model_type": "lama"}, r"model_type 'lama' is unknown to transformers .*; did you mean 'llama'\?"),
        ({"model_type": "llama", "hidden_size": "wide"}, "hidden_size"),
        ({"model_type": "clip"}, "cannot be built: Unrecognized configuration class"),
    ):
        with pytest.raises((ConfigError, DataError), match=f"model 'some/base'.*{message}") as caught:
            meta_model(ModelConfig(name="some/base", architecture=wrong))
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


@pytest.mark.parametrize("keep", [10, 3000, -1])
def test_corrupted_weights_are_one_line(keep: int, folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(DataError, match="model.safetensors is damaged") as caught:
        load_model(config_for(folder))
    assert "\n" not in str(caught.value)


def test_weights_that_lack_a_tensor_are_refused_not_filled_with_random_numbers(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    del tensors[name]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(DataError, match=f"do not fit its config.json: lacks {name}"):
        load_model(config_for(folder))


def test_weights_of_another_shape_are_refused(folder: Path) -> None:
    facts = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(facts | {"intermediate_size": 16}))
    with pytest.raises(DataError, match="has a wrong shape for model.layers.0.mlp.down_proj.weight and 5 more tensors"):
        load_model(config_for(folder))


def test_absent_weights_exit_with_3(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(MissingFileError, match="lacks model.safetensors") as caught:
        load_model(config_for(folder))
    assert caught.value.exit_code == 3


def test_contradictory_precision(folder: Path) -> None:
    (folder / "q.gguf").write_bytes(b"GGUF")
    with pytest.raises(ConfigError, match="model.quantization=nf4 and model.gguf_file exclude each other"):
        load_model(config_for(folder, quantization="nf4", gguf_file="q.gguf"))
    facts = json.loads((folder / "config.json").read_text())
    stored = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (folder / "config.json").write_text(json.dumps(facts | {"quantization_config": stored}))
    with pytest.raises(ConfigError, match="stored quantised already; set model.quantization=none"):
        load_model(config_for(folder, quantization="nf4"))


def test_an_absent_package_names_the_extra(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"nf4 needs the package bitsandbytes: pip install 'loramoe-train\[quant\]'"):
        load_model(config_for(folder, quantization="nf4"))


def test_attention_that_is_not_installed_is_one_line(folder: Path) -> None:
    if "flash_attn" in sys.modules:
        pytest.skip("flash_attn is installed")
    with pytest.raises(ConfigError, match="model.attention=flash_attention_2 does not work here") as caught:
        load_model(config_for(folder, attention="flash_attention_2"))
    assert "\n" not in str(caught.value)


def test_a_file_that_is_no_gguf(folder: Path) -> None:
    (folder / "q.gguf").write_bytes(b"PK\x03\x04 zipped")
    with pytest.raises(DataError, match="q.gguf is no GGUF file"):
        load_model(config_for(folder, gguf_file="q.gguf"))


def test_a_gguf_base_equals_the_model_it_was_written_from(tmp_path: Path) -> None:
    """A float32 GGUF written by hand with the tensor names of llama.cpp."""
    gguf = pytest.importorskip("gguf")
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    facts = AutoConfig.for_model("llama", vocab_size=96, num_key_value_heads=4, tie_word_embeddings=False, **shape)
    source = AutoModelForCausalLM.from_config(facts).eval()
    write_gguf(gguf, tmp_path / "base.gguf", source)
    config = config_for(tmp_path, gguf_file="base.gguf", architecture=facts.to_dict())
    model = load_model(config)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    with torch.no_grad():
        torch.testing.assert_close(model(tokens()).logits, source(tokens()).logits, rtol=1e-5, atol=1e-5)
    with pytest.raises(ConfigError, match="says num_hidden_layers=3, but what .* holds has 2"):
        load_model(config.model_copy(update={"architecture": facts.to_dict() | {"num_hidden_layers": 3}}))
    bare = config_for(tmp_path, gguf_file="base.gguf")  # no facts but those in the file's own header
    assert find_sites(meta_model(bare), "model.layers", LLAMA_SITES, "attn_in") == find_sites(
        model, "model.layers", LLAMA_SITES, "attn_in"
    )


def write_gguf(gguf: Any, path: Path, model: nn.Module) -> None:
    facts, writer = model.config, gguf.GGUFWriter(path, "llama")
    writer.add_context_length(facts.max_position_embeddings)
    writer.add_embedding_length(facts.hidden_size)
    writer.add_block_count(facts.num_hidden_layers)
    writer.add_feed_forward_length(facts.intermediate_size)
    writer.add_head_count(facts.num_attention_heads)
    writer.add_head_count_kv(facts.num_key_value_heads)
    writer.add_layer_norm_rms_eps(facts.rms_norm_eps)
    writer.add_rope_dimension_count(facts.hidden_size // facts.num_attention_heads)
    writer.add_rope_freq_base(facts.rope_parameters["rope_theta"])
    writer.add_vocab_size(facts.vocab_size)
    outside = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    inside = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.o_proj": "attn_output"}
    inside |= {f"self_attn.{p}_proj": f"attn_{p}" for p in "qkv"} | {
        f"mlp.{p}_proj": f"ffn_{p}" for p in ("gate", "up", "down")
    }
    names = outside | {
        f"model.layers.{i}.{ours}": f"blk.{i}.{theirs}" for i in (0, 1) for ours, theirs in inside.items()
    }
    for name, parameter in model.named_parameters():
        weight = parameter.detach()
        if name.endswith(("q_proj.weight", "k_proj.weight")):  # llama.cpp interleaves the halves of a rotated head
            heads = facts.num_attention_heads
            weight = weight.view(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)
        writer.add_tensor(f"{names[name.removesuffix('.weight')]}.weight", weight.numpy().copy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
