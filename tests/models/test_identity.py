"""Same contents, same identity; another base is told apart even when it has the same shape."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from loramoe_train.errors import ConfigError
from loramoe_train.models.identity import base_identity, check_same_base
from loramoe_train.schema.model import ModelConfig


@pytest.fixture
def folder(tiny_model_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model_dir, tmp_path / "base"))


def identity(folder: Path, name: str = "some/base") -> dict[str, str | None]:
    return base_identity(ModelConfig(name=name, path=str(folder)))


def test_a_copy_under_another_name_is_the_same_base(folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    facts = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(facts | {"transformers_version": "9", "use_cache": False}))
    saved, current = identity(folder), identity(copy, "other/name")
    assert saved["weights_sha256"] == current["weights_sha256"] and saved["name"] != current["name"]
    check_same_base(saved, current, "adapter")


def test_sharding_does_not_matter(folder: Path) -> None:
    before = identity(folder)
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    parts = {"x-1.safetensors": names[::2], "x-2.safetensors": names[1::2]}
    for file, own in parts.items():
        save_file({name: tensors[name] for name in own}, folder / file)
    weight_map = {name: file for file, own in parts.items() for name in own}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert identity(folder) == before


@pytest.mark.parametrize("name", ["model.layers.1.self_attn.v_proj.weight", "model.norm.weight", "lm_head.weight"])
def test_a_tensor_trained_further_is_another_base(folder: Path, name: str) -> None:
    before = identity(folder)
    tensors = load_file(folder / "model.safetensors")
    tensors[name] += torch.full_like(tensors[name], 1e-3)
    save_file(tensors, folder / "model.safetensors")
    after = identity(folder)
    assert after["config_sha256"] == before["config_sha256"]
    with pytest.raises(
        ConfigError, match="runs/a was made for the base 'some/base', whose weights differs from that of"
    ):
        check_same_base(before, after, "runs/a")


def test_another_configuration_is_another_base(folder: Path) -> None:
    before = identity(folder)
    facts = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(facts | {"rms_norm_eps": 0.1}))
    with pytest.raises(ConfigError, match="config.json differs"):
        check_same_base(before, identity(folder), "runs/a")


def test_without_hashes_the_name_decides() -> None:
    check_same_base({"name": "a/b"}, {"name": "a/b", "weights_sha256": "0"}, "adapter")
    with pytest.raises(ConfigError, match="adapter was made for the base 'a/b', not for 'a/c'"):
        check_same_base({"name": "a/b"}, {"name": "a/c", "weights_sha256": "0"}, "adapter")
