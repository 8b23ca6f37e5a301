"""Facts of a base model that need no weight and no torch: its config.json, or what the model group says of it."""

from typing import Any

from loramoe_train.errors import ConfigError, MissingFileError
from loramoe_train.files import read_json
from loramoe_train.models.files import CONFIG, cached_file, fetch_command, model_folder, offline
from loramoe_train.schema.model import ModelConfig

# one fact, several names: `attribute_map` of transformers' config classes
MAX_LAYERS = 10_000
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_POSITIONS = ("max_position_embeddings", "n_positions", "n_ctx", "seq_length", "max_seq_len")


def read_architecture(config: ModelConfig) -> dict[str, Any]:
    """config.json of the local folder or the hub's cache; else the group's `architecture`; else fetched from the hub.

    Local files win over `architecture`, because they are what will be loaded. Raises MissingFileError (no folder;
    offline and nothing known), DataError (damaged JSON), ConfigError (no model_type).
    """
    found = _local_config(config)
    if found is None and config.architecture is not None:
        found = dict(config.architecture)
    if found is None:
        found = _gguf_config(config) if config.gguf_file else _fetched_config(config)
    if not isinstance(found.get("model_type"), str):
        raise ConfigError(f"model '{config.name}': config.json names no model_type; is it a transformers model?")
    return found


def _local_config(config: ModelConfig) -> dict[str, Any] | None:
    cached = None if config.path is not None else cached_file(config, CONFIG)
    if cached is not None:
        return read_json(cached)
    if config.path is None and "/" in config.name:
        return None
    file = model_folder(config) / CONFIG
    if file.is_file():
        return read_json(file)
    if config.gguf_file is None:
        raise MissingFileError(f"{file.parent} lacks {CONFIG}; a model folder holds it beside its weights")
    return None


def _gguf_config(config: ModelConfig) -> dict[str, Any]:
    """The facts in a GGUF file's own header; this one needs transformers."""
    from loramoe_train.models.loading import gguf_config

    return gguf_config(config).to_dict()


def _fetched_config(config: ModelConfig) -> dict[str, Any]:
    if offline():
        raise MissingFileError(
            f"model.name={config.name}: {CONFIG} is not in the hub cache, and the run is offline;"
            f" fetch it with: {fetch_command(config)}; or give model.path=FOLDER"
        )
    from huggingface_hub import hf_hub_download

    try:
        return read_json(hf_hub_download(config.name, CONFIG, revision=config.revision))
    except Exception as error:  # the hub raises its own, requests' and httpx's errors, by version
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise MissingFileError(f"model.name={config.name}: cannot fetch {CONFIG} from the hub: {reason}") from error


def _fact(architecture: dict[str, Any], names: tuple[str, ...]) -> int | None:
    nested = architecture.get("text_config")  # multimodal models keep the language model's facts there
    for facts in (architecture, nested if isinstance(nested, dict) else {}):
        for name in names:
            value = facts.get(name)
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return value
    return None


def num_layers(architecture: dict[str, Any]) -> int:
    """Number of decoder layers. Raises ConfigError when the facts do not say."""
    found = _fact(architecture, _LAYERS)
    if found is None:
        raise ConfigError(f"model.architecture says no number of layers; give {_LAYERS[0]}")
    if found > MAX_LAYERS:
        raise ConfigError(f"the base's config.json says {found:,} layers; no model has more than {MAX_LAYERS:,}")
    return found


def max_positions(architecture: dict[str, Any]) -> int | None:
    """The longest sequence, in tokens, that the positions allow; None where there is no limit (state-space models)."""
    return _fact(architecture, _POSITIONS)
