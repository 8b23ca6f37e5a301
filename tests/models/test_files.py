"""Folders, the hub's cache, damaged files: everything wrong is one line before a weight is read."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from loramoe_train.errors import ConfigError, DataError, MissingFileError
from loramoe_train.models import files
from loramoe_train.models.architecture import max_positions, num_layers, read_architecture
from loramoe_train.models.files import NeededFile, files_needed, model_folder, safetensors_header, weight_files
from loramoe_train.schema.model import ModelConfig

HUB = "some/model"


def make_folder(folder: Path, **facts: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "num_hidden_layers": 2} | facts))
    (folder / "tokenizer.json").write_text("{}")
    save_file({"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4)}, folder / "model.safetensors")
    return folder


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty hub cache; returns the snapshot folder that HUB would have in it."""
    from huggingface_hub import constants, file_download

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    assert file_download.constants is constants
    repository = tmp_path / "hub" / "models--some--model"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("c0ffee")
    snapshot = repository / "snapshots" / "c0ffee"
    snapshot.mkdir(parents=True)
    return snapshot


def test_a_local_path_is_taken_as_it_is(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "llama")
    assert model_folder(ModelConfig(name=HUB, path=str(folder))) == folder


def test_a_missing_path_names_the_nearest_sibling(tmp_path: Path) -> None:
    make_folder(tmp_path / "llama-8b")
    with pytest.raises(MissingFileError, match="no such folder; did you mean 'llama-8b'") as caught:
        model_folder(ModelConfig(name=HUB, path=str(tmp_path / "lama-8b")))
    assert caught.value.exit_code == 3
    with pytest.raises(MissingFileError, match="neither is"):
        model_folder(ModelConfig(name=HUB, path=str(tmp_path / "nowhere" / "x")))
    with pytest.raises(MissingFileError, match="is a file; give its folder"):
        model_folder(ModelConfig(name=HUB, path=str(tmp_path / "llama-8b" / "config.json")))


def test_embedded_models_go_by_their_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "ASSETS", tmp_path)
    folder = make_folder(tmp_path / "tiny" / "model")
    assert model_folder(ModelConfig(name="tiny")) == folder
    assert read_architecture(ModelConfig(name="tiny"))["num_hidden_layers"] == 2
    assert all(file.present for file in files_needed(ModelConfig(name="tiny")))
    with pytest.raises(ConfigError, match="'tinny' is neither an embedded model nor a hub name .*did you mean 'tiny'"):
        model_folder(ModelConfig(name="tinny"))


def test_offline_without_the_files_names_the_command(hub_cache: Path) -> None:
    config = ModelConfig(name=HUB, revision="v2")
    for ask in (model_folder, read_architecture):
        with pytest.raises(
            MissingFileError, match="offline; fetch it with: hf download some/model --revision v2"
        ) as caught:
            ask(config)
        assert caught.value.exit_code == 3 and "\n" not in str(caught.value)


def test_offline_with_half_the_files_names_the_missing_one(hub_cache: Path) -> None:
    make_folder(hub_cache)
    (hub_cache / "model.safetensors").unlink()
    with pytest.raises(MissingFileError, match="some/model: model.safetensors is not in the hub cache"):
        model_folder(ModelConfig(name=HUB))
    assert read_architecture(ModelConfig(name=HUB))["num_hidden_layers"] == 2  # that much is there
    present = {file.name: file.present for file in files_needed(ModelConfig(name=HUB))}
    assert present == {"config.json": True, "model.safetensors": False, "tokenizer.json": True}


def test_a_cached_model_is_its_snapshot(hub_cache: Path) -> None:
    make_folder(hub_cache)
    assert model_folder(ModelConfig(name=HUB)) == hub_cache


def test_online_an_uncached_model_is_its_name(hub_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE")
    assert model_folder(ModelConfig(name=HUB)) == HUB
    assert files_needed(ModelConfig(name=HUB)) == [
        NeededFile(name, HUB, False) for name in ("config.json", "model.safetensors", "tokenizer.json")
    ]


def test_a_malformed_hub_name(hub_cache: Path) -> None:
    with pytest.raises(ConfigError, match="'a/b/c' is no valid hub name"):
        model_folder(ModelConfig(name="a/b/c"))


def test_shards_are_listed_and_a_missing_one_is_named(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "m")
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    shards = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(shards))
    with pytest.raises(MissingFileError, match="lacks model-2.safetensors"):
        weight_files(folder)
    (folder / "model-2.safetensors").write_bytes((folder / "model-1.safetensors").read_bytes())
    assert [path.name for path in weight_files(folder)] == ["model-1.safetensors", "model-2.safetensors"]
    (folder / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(DataError, match="index.json is damaged: it holds no weight_map"):
        weight_files(folder)


def test_pickled_and_gguf_weights_are_pointed_out(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "m")
    (folder / "model.safetensors").unlink()
    with pytest.raises(MissingFileError, match="lacks model.safetensors; it must hold"):
        weight_files(folder)
    (folder / "pytorch_model.bin").touch()
    with pytest.raises(MissingFileError, match="pytorch_model.bin, a pickle file, which is never opened"):
        weight_files(folder)
    (folder / "q4.gguf").touch()
    with pytest.raises(MissingFileError, match="set model.gguf_file=q4.gguf"):
        weight_files(folder)
    with pytest.raises(MissingFileError, match="lacks q5.gguf; did you mean 'q4.gguf'"):
        weight_files(folder, "q5.gguf")


def test_the_header_of_a_whole_file(tmp_path: Path) -> None:
    path = make_folder(tmp_path / "m") / "model.safetensors"
    header, start = safetensors_header(path)
    assert {name: (entry["dtype"], entry["shape"]) for name, entry in header.items()} == {
        "a": ("F32", [2, 3]),
        "b": ("F32", [4]),
    }
    assert start + 10 * 4 == path.stat().st_size


@pytest.mark.parametrize("keep", [0, 5, 8, 40, -1])
def test_truncated_weights_are_damaged(keep: int, tmp_path: Path) -> None:
    path = make_folder(tmp_path / "m") / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(DataError, match="model.safetensors is damaged: .*fetch or copy it again"):
        safetensors_header(path)


def test_garbage_and_surplus_bytes_are_damage(tmp_path: Path) -> None:
    path = make_folder(tmp_path / "m") / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole + b"x")
    with pytest.raises(DataError, match="but its header describes"):
        safetensors_header(path)
    path.write_bytes(whole[:8] + b"\xff" * 20 + whole[28:])
    with pytest.raises(DataError, match="its header is not readable"):
        safetensors_header(path)


def test_architecture_from_the_group_when_nothing_is_local(hub_cache: Path) -> None:
    facts = {"model_type": "llama", "num_hidden_layers": 7, "max_position_embeddings": 99}
    found = read_architecture(ModelConfig(name=HUB, architecture=facts))
    assert (num_layers(found), max_positions(found)) == (7, 99)


@pytest.mark.parametrize(
    ("facts", "layers", "positions"),
    [
        ({"n_layer": 12, "n_positions": 1024}, 12, 1024),
        ({"text_config": {"num_hidden_layers": 3, "max_position_embeddings": 5}}, 3, 5),
        ({"num_hidden_layers": 4}, 4, None),
    ],
)
def test_facts_go_by_several_names(facts: dict[str, Any], layers: int, positions: int | None) -> None:
    assert (num_layers(facts), max_positions(facts)) == (layers, positions)


def test_facts_that_are_not_there() -> None:
    with pytest.raises(ConfigError, match="says no number of layers; give num_hidden_layers"):
        num_layers({"model_type": "llama"})


def test_a_damaged_config_names_file_and_line(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "m")
    config = ModelConfig(name=HUB, path=str(folder))
    (folder / "config.json").write_text('{\n"model_type": llama}')
    with pytest.raises(DataError, match="config.json:2 is not JSON"):
        read_architecture(config)
    (folder / "config.json").write_text("[]")
    with pytest.raises(DataError, match="holds a list"):
        read_architecture(config)
    (folder / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="names no model_type"):
        read_architecture(config)
    (folder / "config.json").unlink()
    with pytest.raises(MissingFileError, match="lacks config.json"):
        read_architecture(config)


def test_facts_are_read_without_torch(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "m")
    code = (
        "import sys\n"
        "from loramoe_train.models import files_needed, max_positions, model_folder, num_layers, read_architecture\n"
        "from loramoe_train.models import base_identity\n"
        "from loramoe_train.schema.model import ModelConfig\n"
        f"config = ModelConfig(name='a/b', path={str(folder)!r})\n"
        "assert num_layers(read_architecture(config)) == 2 and model_folder(config) and files_needed(config)\n"
        "base_identity(config)\n"
        "assert not {'torch', 'transformers'} & sys.modules.keys()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
