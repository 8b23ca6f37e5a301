"""The tokenizer pads on the right with a token that is not the end token, and never grows."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest

from loramoe_train.errors import DataError, MissingFileError
from loramoe_train.models import load_tokenizer
from loramoe_train.schema.model import ModelConfig


@pytest.fixture
def folder(tiny_model_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model_dir, tmp_path / "base"))


def load(folder: Path) -> Any:
    return load_tokenizer(ModelConfig(name="some/base", path=str(folder)))


def change(folder: Path, **values: Any) -> None:
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text()) | values
    path.write_text(json.dumps({key: value for key, value in settings.items() if value is not None}))


def test_a_good_padding_token_is_kept(folder: Path) -> None:
    tokenizer = load(folder)
    assert (tokenizer.pad_token, tokenizer.eos_token, tokenizer.padding_side) == ("<|pad|>", "<|end|>", "right")


@pytest.mark.parametrize(("pad", "why"), [(None, "there was none"), ("<|end|>", "it was the end token")])
def test_a_missing_or_shared_padding_token_is_replaced_by_one_of_the_vocabulary(
    pad: str | None, why: str, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    size = len(load(folder))
    change(folder, pad_token=pad, padding_side="left")
    with caplog.at_level(logging.INFO):
        tokenizer = load(folder)
    assert tokenizer.pad_token == "<|pad|>" and tokenizer.pad_token_id != tokenizer.eos_token_id
    assert len(tokenizer) == size and tokenizer.padding_side == "right"
    assert f"because {why}" in caplog.text


def test_unknown_then_begin_then_end_token_when_no_token_is_set_aside(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    text = (folder / "tokenizer.json").read_text().replace("<|pad|>", "<|other|>")
    (folder / "tokenizer.json").write_text(text)
    change(folder, pad_token=None, unk_token="<|other|>", bos_token="<|begin|>")
    assert load(folder).pad_token == "<|other|>"
    change(folder, unk_token="<|end|>")
    assert load(folder).pad_token == "<|begin|>"
    change(folder, unk_token=None, bos_token=None)
    with caplog.at_level(logging.INFO):
        assert load(folder).pad_token == "<|end|>"
    assert "no other token to spare" in caplog.text


def test_no_end_token_is_an_error(folder: Path) -> None:
    change(folder, eos_token=None)
    with pytest.raises(DataError, match="has no end-of-sequence token"):
        load(folder)


def test_a_tokenizer_of_another_model_is_an_error(folder: Path) -> None:
    facts = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(facts | {"vocab_size": 100}))
    with pytest.raises(DataError, match="token ids up to [0-9]+, but the model embeds 100 tokens"):
        load(folder)


def test_damaged_and_absent_files(folder: Path) -> None:
    (folder / "tokenizer.json").write_text('{"model": ')
    with pytest.raises(DataError, match="cannot be read") as caught:
        load(folder)
    assert "\n" not in str(caught.value)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(MissingFileError, match="lacks a tokenizer: none of tokenizer.json") as missing:
        load(folder)
    assert missing.value.exit_code == 3
