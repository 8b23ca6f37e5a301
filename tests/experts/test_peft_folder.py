"""PEFT itself is the oracle: what we read adds what PEFT adds, and what we write PEFT loads, digit for digit."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from loramoe_train.errors import ConfigError, DataError, LoramoeError, MissingFileError
from loramoe_train.experts.peft_folder import (
    CONFIG,
    WEIGHTS,
    CoverageRow,
    LoraFactors,
    coverage,
    pattern_value,
    read_peft_folder,
    write_peft_folder,
)

TOKENS = torch.randint(3, 50, (2, 7), generator=torch.Generator().manual_seed(0))
PLAIN: dict[str, Any] = {"r": 4, "lora_alpha": 12, "target_modules": ["q_proj", "v_proj"]}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": PLAIN,
    "rslora": PLAIN | {"use_rslora": True},
    "rank_pattern": PLAIN | {"rank_pattern": {"v_proj": 2, "layers.1.self_attn.q_proj": 7}},
    "alpha_pattern": PLAIN | {"alpha_pattern": {"^model.layers.0.self_attn.v_proj": 3, "q_proj": 5}},
    "both_patterns_rslora": PLAIN
    | {"rank_pattern": {r"layers\.1\..*_proj": 3}, "alpha_pattern": {"v_proj": 9}, "use_rslora": True},
    "one_layer": PLAIN | {"layers_to_transform": [1]},
    "regex_targets": PLAIN | {"target_modules": r".*layers\.0\.mlp\.(up|down)_proj"},
    "all_linear": PLAIN | {"target_modules": "all-linear"},
    "unexcluded": PLAIN | {"target_modules": "all-linear", "exclude_modules": ["down_proj"]},
    "gaussian": PLAIN | {"init_lora_weights": "gaussian"},
}


@pytest.fixture(scope="module")
def base() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).requires_grad_(False).eval()


@pytest.fixture(scope="module")
def peft_folder(base: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Makes a folder with PEFT's own save_pretrained, all factors random."""

    def make(**settings: Any) -> Path:
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(1)
        model = get_peft_model(copy.deepcopy(base), LoraConfig(task_type="CAUSAL_LM", **settings))
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                nn.init.normal_(parameter, std=0.3)
        folder = tmp_path_factory.mktemp("adapter") / "expert"
        model.save_pretrained(folder)
        return folder

    return make


@pytest.fixture
def folder(peft_folder: Callable[..., Path]) -> Path:
    return peft_folder(**PLAIN)


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(TOKENS, use_cache=False).logits


def with_peft(base: nn.Module, folder: Path) -> nn.Module:
    from peft import PeftModel

    return PeftModel.from_pretrained(copy.deepcopy(base), folder).eval()


def with_ours(base: nn.Module, modules: dict[str, LoraFactors]) -> nn.Module:
    model = copy.deepcopy(base)
    for name, pair in modules.items():
        model.get_submodule(name).weight += pair.up @ pair.down
    return model


def edit_config(folder: Path, **changes: Any) -> Path:
    path = folder / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


def edit_weights(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> Path:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / WEIGHTS)
    return folder


@pytest.mark.parametrize("variant", VARIANTS)
def test_our_factors_add_what_peft_adds(
    variant: str, base: nn.Module, peft_folder: Callable[..., Path], tmp_path: Path
) -> None:
    folder = peft_folder(**VARIANTS[variant])
    adapter, oracle = read_peft_folder(folder), with_peft(base, folder)
    wrapped = {n.removeprefix("base_model.model."): m for n, m in oracle.named_modules() if hasattr(m, "lora_A")}
    assert set(adapter.modules) == set(wrapped)
    for name, module in wrapped.items():
        pair = adapter.modules[name]
        assert pair.down.dtype == pair.up.dtype == torch.float32
        torch.testing.assert_close(pair.up @ pair.down, module.get_delta_weight("default"), rtol=1e-5, atol=1e-6)
    expected = logits(oracle)
    assert (expected - logits(base)).abs().max() > 0.01
    torch.testing.assert_close(logits(with_ours(base, adapter.modules)), expected, rtol=1e-4, atol=1e-4)

    written = write_peft_folder(tmp_path / "again", adapter.modules, base_model="some/base")
    torch.testing.assert_close(logits(with_peft(base, written)), expected, rtol=1e-4, atol=1e-4)


def test_what_we_write_peft_loads_without_any_difference(base: nn.Module, tmp_path: Path) -> None:
    """PEFT's own wrappers with our numbers put in by hand are the oracle: the difference is exactly zero."""
    from peft import LoraConfig, get_peft_model

    generator = torch.Generator().manual_seed(5)
    sizes = {"model.layers.0.self_attn.q_proj": (32, 32, 5), "model.layers.1.mlp.down_proj": (48, 32, 3)}
    modules = {
        name: LoraFactors(torch.randn(r, d, generator=generator), torch.randn(o, r, generator=generator))
        for name, (d, o, r) in sizes.items()
    }
    oracle = copy.deepcopy(base)
    ranks = {name: pair.rank for name, pair in modules.items()}
    settings = {"rank_pattern": ranks, "alpha_pattern": ranks, "target_modules": list(modules)}
    oracle = get_peft_model(oracle, LoraConfig(task_type="CAUSAL_LM", **settings)).eval()
    for name, pair in modules.items():
        module = oracle.get_submodule(f"base_model.model.{name}")
        module.lora_A["default"].weight.data, module.lora_B["default"].weight.data = pair.down, pair.up
    written = write_peft_folder(tmp_path / "out", modules, base_model="some/base", revision="main")
    loaded = with_peft(base, written)
    assert torch.equal(logits(loaded), logits(oracle))
    again = read_peft_folder(written)
    assert again.base_model == "some/base" and again.task_type == "CAUSAL_LM" and again.name == "out"
    for name, pair in modules.items():
        assert torch.equal(again.modules[name].down, pair.down) and torch.equal(again.modules[name].up, pair.up)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]  # nothing left beside it


def test_slices_of_a_bank_can_be_written(tmp_path: Path) -> None:
    """Experts of a bank share one storage, which safetensors would refuse."""
    down, up = torch.randn(6, 8), torch.randn(4, 6)
    modules = {f"layers.{e}.q_proj": LoraFactors(down[3 * e : 3 * e + 3], up[:, 3 * e : 3 * e + 3]) for e in (0, 1)}
    again = read_peft_folder(write_peft_folder(tmp_path / "out", modules, base_model="b")).modules
    assert all(torch.equal(again[name].up, pair.up) for name, pair in modules.items())


def test_empty_experts_are_left_out_and_an_empty_adapter_is_refused(tmp_path: Path) -> None:
    none = LoraFactors(torch.zeros(0, 4), torch.zeros(4, 0))
    one = LoraFactors(torch.ones(1, 4), torch.ones(4, 1))
    written = write_peft_folder(tmp_path / "out", {"a.q": none, "a.k": one}, base_model="b")
    assert list(read_peft_folder(written).modules) == ["a.k"]
    with pytest.raises(ConfigError, match="nothing to write"):
        write_peft_folder(tmp_path / "other", {"a.q": none}, base_model="b")
    assert not (tmp_path / "other").exists()


def test_an_existing_folder_is_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigError, match="exists already"):
        write_peft_folder(tmp_path / "out", {"a": LoraFactors(torch.ones(1, 2), torch.ones(2, 1))}, base_model="b")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.txt"]


def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(ConfigError, match="cannot write .*No space left"):
        write_peft_folder(tmp_path / "out", {"a": LoraFactors(torch.ones(1, 2), torch.ones(2, 1))}, base_model="b")
    assert list(tmp_path.iterdir()) == []


def test_modules_come_in_the_order_of_the_layers(tmp_path: Path) -> None:
    pair = LoraFactors(torch.ones(1, 2), torch.ones(2, 1))
    names = ["layers.10.q", "layers.2.q", "layers.0.q"]
    written = write_peft_folder(tmp_path / "out", dict.fromkeys(names, pair), base_model="b")
    assert list(read_peft_folder(written).modules) == names[::-1]


def test_half_precision_factors_become_float32(folder: Path) -> None:
    expected = read_peft_folder(folder).modules
    edit_weights(folder, lambda tensors: tensors.update({k: v.bfloat16() for k, v in tensors.items()}))
    for name, pair in read_peft_folder(folder).modules.items():
        assert pair.up.dtype == torch.float32
        torch.testing.assert_close(pair.up, expected[name].up, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize(
    "module", ["model.layers.1.self_attn.q_proj", "model.layers.11.mlp.up_proj", "q_proj", "x.eq_proj"]
)
def test_patterns_match_as_in_peft(module: str) -> None:
    from peft.utils.other import get_pattern_key

    pattern = {r"layers\.1\..*": 1, "q_proj": 2, "^model.layers.11.mlp.up_proj": 3, "layers.11": 4}
    assert pattern_value(pattern, module, 0) == pattern.get(get_pattern_key(pattern.keys(), module), 0)


def test_coverage_counts_modules_by_kind(peft_folder: Callable[..., Path]) -> None:
    adapters = [read_peft_folder(peft_folder(**VARIANTS[name])) for name in ("plain", "one_layer", "regex_targets")]
    assert coverage(adapters) == [
        CoverageRow("down_proj", (0, 0, 1), 1),
        CoverageRow("q_proj", (2, 1, 0), 2),
        CoverageRow("up_proj", (0, 0, 1), 1),
        CoverageRow("v_proj", (2, 1, 0), 2),
    ]


KEY = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
REFUSED_CONFIGS: dict[str, tuple[dict[str, Any], type[LoramoeError], str]] = {
    "dora": ({"use_dora": True}, ConfigError, "use_dora=True is not served: DoRA"),
    "bias": ({"bias": "lora_only"}, ConfigError, "bias='lora_only' trains biases"),
    "lora_bias": ({"lora_bias": True}, ConfigError, "lora_bias=True is not served"),
    "modules_to_save": ({"modules_to_save": ["lm_head"]}, ConfigError, r"modules_to_save=\['lm_head'\] is not"),
    "token_rows": ({"trainable_token_indices": [1]}, ConfigError, "trainable_token_indices"),
    "parameters": ({"target_parameters": ["experts.down_proj"]}, ConfigError, "target_parameters"),
    "replication": ({"layer_replication": [[0, 2]]}, ConfigError, "layer_replication"),
    "alora": ({"alora_invocation_tokens": [1, 2]}, ConfigError, "aLoRA"),
    "qalora": ({"use_qalora": True}, ConfigError, "QA-LoRA"),
    "bdlora": ({"use_bdlora": {"nblocks": 2}}, ConfigError, "block-diagonal"),
    "arrow": ({"arrow_config": {"top_k": 1}}, ConfigError, "Arrow"),
    "kasa": ({"kasa_config": {"x": 1}}, ConfigError, "KaSA"),
    "monteclora": ({"monteclora_config": {"x": 1}}, ConfigError, "samples"),
    "pissa": ({"init_lora_weights": "pissa_niter_4"}, ConfigError, "path_initial_model_for_weight_conversion"),
    "other_type": ({"peft_type": "IA3"}, ConfigError, "peft_type is 'IA3'; only LORA"),
    "no_type": ({"peft_type": None}, ConfigError, "peft_type is None"),
    "future": ({"use_wonderlora": True}, ConfigError, "use_wonderlora=True is not known here"),
    "rank": ({"r": 5}, DataError, r"lora_A \(4, 32\) and lora_B \(32, 4\), but adapter_config.json says rank 5"),
    "no_rank": ({"r": None}, DataError, "the rank of model.layers.0.self_attn.q_proj is None"),
    "rank_zero": ({"rank_pattern": {"q_proj": 0}}, DataError, "rank of .* is 0; it must be a whole number"),
    "alpha": ({"lora_alpha": "16"}, DataError, "the alpha of .* is '16'; it must be a number"),
    "alpha_nan": ({"alpha_pattern": {"q_proj": float("nan")}}, DataError, "the alpha of .* is nan"),
    "pattern_list": ({"rank_pattern": [4]}, DataError, r"rank_pattern must be a mapping .* got \[4\]"),
    "pattern_regex": ({"rank_pattern": {"(": 4}}, DataError, r"'\(' is no regular expression"),
}


@pytest.mark.parametrize("case", REFUSED_CONFIGS)
def test_config_refusals(case: str, folder: Path) -> None:
    changes, error, message = REFUSED_CONFIGS[case]
    with pytest.raises(error, match=message) as caught:
        read_peft_folder(edit_config(folder, **changes))
    assert "\n" not in str(caught.value) and caught.value.exit_code == 2


REFUSED_WEIGHTS: dict[str, tuple[Callable[[dict[str, Tensor]], Any], type[LoramoeError], str]] = {
    "missing_pair": (lambda t: t.pop(KEY), DataError, "q_proj has lora_B but no lora_A"),
    "no_factors": (lambda t: t.clear(), DataError, "holds no LoRA factors"),
    "nan": (lambda t: t[KEY].__setitem__((0, 0), float("nan")), DataError, "lora_A.weight holds a value that is not f"),
    "inf": (lambda t: t[KEY].__setitem__((0, 0), float("inf")), DataError, "not finite"),
    "quantised": (lambda t: t.update({KEY: t[KEY].to(torch.int8)}), DataError, "int8; quantised factors"),
    "shape": (lambda t: t.update({KEY: t[KEY][:2]}), DataError, r"lora_A \(2, 32\) and lora_B \(32, 4\)"),
    "vector": (lambda t: t.update({KEY: t[KEY][0]}), DataError, r"shape \(32,\)"),
    "embedding": (
        lambda t: t.update({"base_model.model.model.embed_tokens.lora_embedding_A": torch.ones(2, 2)}),
        ConfigError,
        "LoRA on an embedding",
    ),
    "magnitude": (
        lambda t: t.update({KEY.replace("lora_A.weight", "lora_magnitude_vector"): torch.ones(2)}),
        ConfigError,
        "is DoRA",
    ),
    "bias": (lambda t: t.update({KEY.replace("lora_A.weight", "bias"): torch.ones(2)}), ConfigError, "a trained bias"),
    "lora_bias": (
        lambda t: t.update({KEY.replace("lora_A.weight", "lora_B.bias"): torch.ones(2)}),
        ConfigError,
        "a bias of the LoRA itself",
    ),
    "whole_module": (lambda t: t.update({"base_model.model.lm_head.weight": torch.ones(2, 2)}), ConfigError, "no LoRA"),
    "no_prefix": (lambda t: t.update({"q_proj.lora_A.weight": torch.ones(2, 2)}), ConfigError, "is no LoRA factor"),
}


@pytest.mark.parametrize("case", REFUSED_WEIGHTS)
def test_weight_refusals(case: str, folder: Path) -> None:
    change, error, message = REFUSED_WEIGHTS[case]
    with pytest.raises(error, match=message) as caught:
        read_peft_folder(edit_weights(folder, change))
    assert "\n" not in str(caught.value) and WEIGHTS in str(caught.value)


@pytest.mark.parametrize("keep", [4, 100, 2000])
def test_truncated_weights(keep: int, folder: Path) -> None:
    content = (folder / WEIGHTS).read_bytes()
    assert len(content) > 2000
    (folder / WEIGHTS).write_bytes(content[:keep])
    with pytest.raises(DataError, match=f"{WEIGHTS} is damaged: .*fetch or copy it again"):
        read_peft_folder(folder)


def test_damaged_config_names_the_line(folder: Path) -> None:
    (folder / CONFIG).write_text('{\n "r": 4,\n "lora_alpha": \n}')
    with pytest.raises(DataError, match=f"{CONFIG}:4 is not JSON"):
        read_peft_folder(folder)
    (folder / CONFIG).write_text("[1]")
    with pytest.raises(DataError, match="holds a list, not a JSON object"):
        read_peft_folder(folder)


def test_absent_files_exit_with_3(folder: Path) -> None:
    with pytest.raises(MissingFileError, match="does not exist; did you mean 'expert'") as caught:
        read_peft_folder(folder.parent / "exprt")
    assert caught.value.exit_code == 3
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")
    with pytest.raises(MissingFileError, match="pickle file, which is never opened.*safe_serialization=True"):
        read_peft_folder(folder)
    (folder / "adapter_model.bin").unlink()
    with pytest.raises(MissingFileError, match=f"lacks {WEIGHTS}"):
        read_peft_folder(folder)
    (folder / CONFIG).unlink()
    with pytest.raises(MissingFileError, match=f"lacks {CONFIG}"):
        read_peft_folder(folder)
