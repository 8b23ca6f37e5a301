"""Where the files of a base model are, and whether they are whole. No torch in here, and no weight is read.

A model is a local folder (`model.path`), one that ships with the package (its name is enough), or a hub repository,
whose files are taken from the hub's cache when they are there.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from loramoe_train.errors import ConfigError, DataError, MissingFileError, nearest
from loramoe_train.paths import ASSETS
from loramoe_train.schema.model import ModelConfig

CONFIG, INDEX, SINGLE = "config.json", "model.safetensors.index.json", "model.safetensors"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")  # one of them is enough
MAX_HEADER = 100_000_000  # bytes; the limit of the safetensors library


@dataclass(frozen=True)
class NeededFile:
    """One file that a run reads, for the plan."""

    name: str  # inside the folder or hub repository
    source: str  # the folder, or the hub repository's name
    present: bool


def offline() -> bool:
    """Whether the hub libraries were told to stay off the network. Read each time: a run may switch it on."""
    switches = (os.environ.get(name, "") for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"))
    return any(switch.strip().upper() in {"1", "ON", "YES", "TRUE"} for switch in switches)


def model_folder(config: ModelConfig) -> Path | str:
    """The folder that holds the model: `path`, an embedded model, a snapshot in the hub's cache, or else the hub name.

    Raises MissingFileError for a path that is not there, and offline for a hub model that was never fetched.
    """
    if config.path is not None:
        return _local_folder(config.path)
    embedded = ASSETS / config.name / "model"
    if "/" not in config.name and embedded.is_dir():
        return embedded
    cached = cached_file(config, config.gguf_file or CONFIG)
    lacking = [config.gguf_file or CONFIG] if cached is None else missing_files(cached.parent, config.gguf_file)
    if cached is not None and not lacking:
        return cached.parent
    if "/" not in config.name:
        known = (folder.parent.name for folder in ASSETS.glob("*/model"))
        raise ConfigError(
            f"model.name='{config.name}' is neither an embedded model nor a hub name (OWNER/NAME)"
            f"{nearest(config.name, known)}; or give model.path=FOLDER"
        )
    if offline():
        raise MissingFileError(
            f"model.name={config.name}: {lacking[0]} is not in the hub cache, and the run is offline;"
            f" fetch it with: {fetch_command(config)}; or give model.path=FOLDER"
        )
    return config.name


def fetch_command(config: ModelConfig) -> str:
    """The shell command that puts a hub model into the cache."""
    file = f" {config.gguf_file}" if config.gguf_file else ""
    return f"hf download {config.name}{file}" + (f" --revision {config.revision}" if config.revision else "")


def _local_folder(path: str) -> Path:
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    if folder.is_file():
        raise MissingFileError(f"model.path={path} is a file; give its folder (and model.gguf_file for a GGUF file)")
    parent = folder.parent
    siblings = [entry.name for entry in parent.iterdir() if entry.is_dir()] if parent.is_dir() else []
    hint = nearest(folder.name, siblings) if parent.is_dir() else f"; neither is {parent}"
    raise MissingFileError(f"model.path={path}: there is no such folder{hint}")


def cached_file(config: ModelConfig, name: str) -> Path | None:
    """A file of the hub repository if the cache holds it."""
    if "/" not in config.name:
        return None
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(config.name, name, revision=config.revision)
    except HFValidationError as error:
        raise ConfigError(f"model.name='{config.name}' is no valid hub name (OWNER/NAME)") from error
    return Path(found) if isinstance(found, str) else None


def missing_files(folder: Path, gguf_file: str | None = None) -> list[str]:
    """Names of the config and weight files that a folder lacks; the tokenizer is looked for when it is loaded."""
    if gguf_file is not None:
        return [] if (folder / gguf_file).is_file() else [gguf_file]
    missing = [] if (folder / CONFIG).is_file() else [CONFIG]
    if (folder / INDEX).is_file():
        return missing + [name for name in _shards(folder / INDEX) if not (folder / name).is_file()]
    return missing if (folder / SINGLE).is_file() else [*missing, SINGLE]


def files_needed(config: ModelConfig) -> list[NeededFile]:
    """What a run will read of the model, and whether it is there; fetches nothing and raises only for a bad path."""
    local: Path | None = None
    if config.path is not None:
        local = _local_folder(config.path)
    elif "/" not in config.name and (ASSETS / config.name / "model").is_dir():
        local = ASSETS / config.name / "model"
    else:
        cached = cached_file(config, config.gguf_file or CONFIG)
        local = cached.parent if cached is not None else None
    source = str(local) if config.path is not None or "/" not in config.name else config.name
    if config.gguf_file is not None:
        names = [config.gguf_file]
    elif local is not None and (local / INDEX).is_file():
        names = [CONFIG, INDEX, *_shards(local / INDEX)]
    else:
        names = [CONFIG, SINGLE]
    found = [NeededFile(name, source, local is not None and (local / name).is_file()) for name in names]
    if config.gguf_file is None:
        tokenizer = next((n for n in TOKENIZER_FILES if local is not None and (local / n).is_file()), None)
        found.append(NeededFile(tokenizer or TOKENIZER_FILES[0], source, tokenizer is not None))
    return found


def weight_files(folder: Path, gguf_file: str | None = None) -> list[Path]:
    """The weight files of a complete folder, in order. Raises MissingFileError for the first one that is absent."""
    missing = missing_files(folder, gguf_file)
    if missing:
        raise MissingFileError(f"{folder} lacks {missing[0]}{_hint(folder, missing, gguf_file)}")
    if gguf_file is not None:
        return [folder / gguf_file]
    return [folder / name for name in _shards(folder / INDEX)] if (folder / INDEX).is_file() else [folder / SINGLE]


def _hint(folder: Path, missing: Sequence[str], gguf_file: str | None) -> str:
    if gguf_file is not None:
        return nearest(gguf_file, (path.name for path in folder.glob("*.gguf")))
    gguf = sorted(path.name for path in folder.glob("*.gguf"))
    if gguf:
        return f"; it holds {gguf[0]}: set model.gguf_file={gguf[0]}"
    pickled = sorted(path.name for path in folder.glob("*.bin"))
    if pickled and SINGLE in missing:
        return (
            f"; it holds {pickled[0]}, a pickle file, which is never opened; convert it where you trust it, with"
            " model.save_pretrained(FOLDER) of transformers"
        )
    return "; it must hold config.json, model.safetensors (or its index and shards) and tokenizer files"


def _shards(index: Path) -> list[str]:
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"{index} is damaged: it holds no weight_map") from error
    for name in names:
        if not isinstance(name, str) or name != PurePath(name).name or not name.endswith(".safetensors"):
            raise DataError(f"{index}: weight_map names {name!r}, which is no safetensors file in that folder")
    return sorted(names)


def safetensors_header(path: Path) -> tuple[dict[str, Any], int]:
    """The header of a safetensors file (tensor name -> dtype, shape, data_offsets) and where the data begins, in bytes.

    Raises DataError when the header is damaged or the file is not exactly as long as the header says.
    Format: 8 bytes little-endian header length, JSON, data (https://huggingface.co/docs/safetensors).
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, MAX_HEADER):
            raise DataError(f"{path} is damaged: {size} bytes cannot hold its header; fetch or copy it again")
        text = file.read(length)
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise DataError(f"{path} is damaged: its header is not readable; fetch or copy it again") from error
    if 8 + length + end != size:
        raise DataError(
            f"{path} is damaged: {size:,} bytes, but its header describes {8 + length + end:,}; fetch or copy it again"
        )
    return header, 8 + length
