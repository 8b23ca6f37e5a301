"""What identifies a frozen base, so that an adapter for another one is refused. No torch in here.

Same contents, same identity, whatever the folder, the name or the number of shards. The weights are identified by the
safetensors headers (names, dtypes, shapes) and some bytes of every tensor: milliseconds instead of minutes, and still
different for two models of one shape, or for a fine-tuned copy.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loramoe_train.errors import ConfigError
from loramoe_train.files import read_json
from loramoe_train.models.files import CONFIG, model_folder, safetensors_header, weight_files
from loramoe_train.schema.model import ModelConfig

SAMPLE = 256  # bytes out of the middle of every tensor
VOLATILE = ("transformers_version", "_name_or_path", "use_cache", "torch_dtype", "dtype")  # of config.json


def base_identity(config: ModelConfig) -> dict[str, str | None]:
    """`name`, `revision`, `config_sha256` and `weights_sha256` of the base that `config` loads.

    To be asked once the files are there. Raises MissingFileError or DataError like the loading itself.
    """
    folder = Path(model_folder(config))
    digest = hashlib.sha256()
    files = weight_files(folder, config.gguf_file)
    for line in sorted(_gguf_lines(files[0]) if config.gguf_file else _tensor_lines(files)):
        digest.update(line)
    facts = read_json(folder / CONFIG) if (folder / CONFIG).is_file() else None
    return {
        "name": config.name,
        "revision": config.revision,
        "config_sha256": None if facts is None else _facts_sha256(facts),
        "weights_sha256": digest.hexdigest(),
    }


def _facts_sha256(facts: Mapping[str, Any]) -> str:
    lasting = {key: value for key, value in facts.items() if key not in VOLATILE}
    return hashlib.sha256(json.dumps(lasting, sort_keys=True).encode()).hexdigest()


def _tensor_lines(files: list[Path]) -> list[bytes]:
    lines = []
    for path in files:
        header, start = safetensors_header(path)
        with path.open("rb") as file:
            for name, entry in header.items():
                first, last = entry["data_offsets"]
                file.seek(start + max(first, (first + last - SAMPLE) // 2))
                sample = file.read(min(SAMPLE, last - first))
                lines.append(f"{name} {entry['dtype']} {entry['shape']} ".encode() + sample)
    return lines


def _gguf_lines(path: Path) -> list[bytes]:
    """The size and 64 evenly spread samples; a GGUF header has no offsets that are this easy to read."""
    size = path.stat().st_size
    lines = [f"gguf {size}".encode()]
    with path.open("rb") as file:
        for part in range(64):
            position = max(0, (2 * part + 1) * size // 128 - SAMPLE // 2)
            file.seek(position)
            lines.append(f"{part:02} ".encode() + file.read(SAMPLE))
    return lines


def check_same_base(saved: Mapping[str, Any], current: Mapping[str, Any], source: str) -> None:
    """Raise ConfigError unless the base that `source` (a checkpoint or adapter) was made for is the current one.

    Contents decide where both are known; a name alone only where nothing better is.
    """
    own = f"'{current.get('name')}'"
    other = f"'{saved.get('name')}'" + (f" (revision {saved['revision']})" if saved.get("revision") else "")
    for field, what in (("config_sha256", "config.json"), ("weights_sha256", "weights")):
        if saved.get(field) and current.get(field) and saved[field] != current[field]:
            raise ConfigError(
                f"{source} was made for the base {other}, whose {what} differs from that of {own};"
                " give the same model (model=..., model.path=...)"
            )
    known = saved.get("weights_sha256") and current.get("weights_sha256")
    if not known and saved.get("name") != current.get("name"):
        raise ConfigError(f"{source} was made for the base {other}, not for {own}; give the same model")
