"""Loads the frozen base model, or only its shape: in the wished precision, whole, or with one clear line.

Everything is checked before weights are read: files, their length against their headers, precision against what is
installed. What is loaded never trains: no parameter requires a gradient.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from loramoe_train.errors import ConfigError, DataError, MissingFileError, nearest
from loramoe_train.models.architecture import read_architecture
from loramoe_train.models.files import model_folder, safetensors_header, weight_files
from loramoe_train.schema.model import ModelConfig

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

ADAPTER = "adapter_config.json"
NUMBERS_PER_BYTE = 8  # at most: no format has fewer than one bit for each
SPARE = 1 << 28  # numbers: buffers such as masks and rotary tables are not stored
# transformers' mixers multiply dt_proj.weight themselves, which packed storage does not allow; it is a small matrix
UNQUANTISED = {kind: ["dt_proj", "lm_head"] for kind in ("mamba", "falcon_mamba", "jamba")}


def load_model(
    config: ModelConfig, *, device: torch.device | str | None = None, shapes: nn.Module | None = None
) -> "PreTrainedModel":
    """The base in evaluation mode on `device` (default: the CPU), frozen, in `config.dtype` and quantisation.

    `use_cache` of its config stays on, for generation; a training step passes `use_cache=False`. Gradient checkpointing
    is non-reentrant and takes effect in training mode. `shapes`: what `meta_model` made, where it is at hand.

    Raises MissingFileError (absent files), DataError (damaged or incomplete weights), ConfigError (what this model or
    this installation cannot do).
    """
    from transformers import AutoModelForCausalLM

    architecture = read_architecture(config)
    _check_model_type(config, architecture)
    arguments = _precision_arguments(config, architecture)
    source = check_weights(config)
    _check_size(config, source, meta_model(config) if shapes is None else shapes)
    arguments |= _source_arguments(config, source)
    if device is not None:
        arguments["device_map"] = {"": torch.device(device)}
    if _has_attention(architecture):  # a pure state-space model refuses to be told
        arguments["attn_implementation"] = config.attention
    with _one_line(config, source):
        model, report = AutoModelForCausalLM.from_pretrained(
            output_loading_info=True, ignore_mismatched_sizes=True, **arguments
        )
    _check_complete(report, source)
    _check_facts(architecture, model.config.to_dict(), source)
    model.requires_grad_(False)
    _keep_differentiable(model)
    model.config.use_cache = True
    if config.gradient_checkpointing:
        checkpoint_activations(model)
    return model.eval()


@contextmanager
def original_weights(model: nn.Module, config: ModelConfig) -> Iterator[None]:
    """For a while a model that was trained as a whole holds the weights that `config` names, read once more.

    Meanwhile its own are kept in host memory. Raises as `load_model` does.
    """
    original = load_model(config)
    trained = {name: parameter.detach().to("cpu", copy=True) for name, parameter in model.named_parameters()}
    _fill(model, dict(original.named_parameters()))
    del original
    try:
        yield
    finally:
        _fill(model, trained)


@torch.no_grad()
def _fill(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    for name, parameter in model.named_parameters():
        parameter.copy_(values[name])


def meta_model(config: ModelConfig, *, device: str = "meta") -> nn.Module:
    """The whole model on the meta device, in `config.dtype`, for plans: shapes and names, no weight and no memory.

    `device="cpu"` is for use under a fake-tensor mode, which runs operations that the meta device lacks.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    facts = read_architecture(config)
    _check_model_type(config, facts)
    attention = {"attn_implementation": config.attention} if _has_attention(facts) else {}
    with _one_line(config, config.path or config.name), torch.device(device):
        try:
            model = AutoModelForCausalLM.from_config(
                AutoConfig.for_model(**_buildable(facts)), dtype=_dtype(config), **attention
            )
        except RuntimeError as error:  # sizes that overflow; nothing is allocated here
            raise ValueError(str(error)) from error
    return model.requires_grad_(False).eval()


def gguf_config(config: ModelConfig) -> "PretrainedConfig":
    """What the header of a GGUF file says about the model."""
    from transformers import AutoConfig

    folder = model_folder(config)
    if isinstance(folder, Path):
        weight_files(folder, config.gguf_file)
    with _one_line(config, folder):
        return AutoConfig.from_pretrained(folder, gguf_file=config.gguf_file, revision=config.revision)


def _check_model_type(config: ModelConfig, architecture: dict[str, Any]) -> None:
    from transformers import CONFIG_MAPPING, __version__

    model_type = architecture["model_type"]
    if model_type not in CONFIG_MAPPING and not config.trust_remote_code:
        raise ConfigError(
            f"model '{config.name}': model_type '{model_type}' is unknown to transformers {__version__}"
            f"{nearest(model_type, CONFIG_MAPPING.keys()).split('; known')[0]}"
        )


def check_weights(config: ModelConfig) -> Path | str:
    """The folder of the weights, after a look at each file's presence and length; or a hub name, to be fetched."""
    source = model_folder(config)
    if isinstance(source, Path):
        if (source / ADAPTER).is_file():
            raise ConfigError(
                f"{source} holds {ADAPTER}: transformers would put that adapter over the base, or load another base;"
                " give the base's own folder, and the adapter as experts.adapters=[FOLDER]"
            )
        for path in weight_files(source, config.gguf_file):
            if config.gguf_file is None:
                safetensors_header(path)
            else:
                _check_gguf(path)
    return source


def _check_size(config: ModelConfig, source: Path | str, shapes: nn.Module) -> None:
    """Raise DataError where config.json describes far more than the files hold: gaps are filled before they are
    reported, and would be made in whatever size it says."""
    if not isinstance(source, Path):
        return
    held = sum(path.stat().st_size for path in weight_files(source, config.gguf_file))
    described = sum(t.numel() for t in (*shapes.parameters(), *shapes.buffers()))
    if described > NUMBERS_PER_BYTE * held + SPARE:
        raise DataError(
            f"the weights in {source} do not fit its config.json: it describes {described:,} numbers, and the files"
            f" hold {held:,} bytes"
        )


def _check_gguf(path: Path) -> None:
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise DataError(f"{path} is no GGUF file: it does not begin with 'GGUF'")


def _source_arguments(config: ModelConfig, source: Path | str) -> dict[str, Any]:
    arguments: dict[str, Any] = {
        "pretrained_model_name_or_path": source,
        "revision": config.revision,
        "trust_remote_code": config.trust_remote_code,
        "dtype": _dtype(config),
    }
    if config.gguf_file is None:
        return arguments | {"use_safetensors": True}
    _require("gguf", f"model.gguf_file={config.gguf_file}", "gguf")
    from transformers import GgufConfig

    return arguments | {"gguf_file": config.gguf_file, "quantization_config": GgufConfig(dequantize=True)}


def _precision_arguments(config: ModelConfig, architecture: dict[str, Any]) -> dict[str, Any]:
    if config.quantization == "none":
        return {}
    setting = f"model.quantization={config.quantization}"
    if config.gguf_file is not None:
        raise ConfigError(f"{setting} and model.gguf_file exclude each other: a GGUF file is dequantised when loaded")
    if architecture.get("quantization_config"):
        raise ConfigError(f"{setting}: this model is stored quantised already; set model.quantization=none")
    _require("bitsandbytes", setting, "quant")
    from transformers import BitsAndBytesConfig

    skipped = UNQUANTISED.get(architecture["model_type"])
    if config.quantization == "int8":
        return {"quantization_config": BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skipped)}
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=_dtype(config),
        llm_int8_skip_modules=skipped,
    )
    return {"quantization_config": nf4}


def _keep_differentiable(model: nn.Module) -> None:
    """Forbid bitsandbytes its inference layout, into which the first evaluation on a CPU with AVX512-BF16 would turn
    4-bit weights for good: the kernel for it has no backward pass, and gradients were lost with a warning only.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def _require(package: str, setting: str, extra: str) -> None:
    from importlib.util import find_spec

    if find_spec(package) is None:
        raise ConfigError(f"{setting} needs the package {package}: pip install 'loramoe-train[{extra}]'")


def _dtype(config: ModelConfig) -> torch.dtype:
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[config.dtype]


def _has_attention(architecture: dict[str, Any]) -> bool:
    return any(key in architecture for key in ("num_attention_heads", "n_head", "n_heads", "text_config"))


def _buildable(facts: dict[str, Any]) -> dict[str, Any]:
    """config.json without what describes the file rather than the model."""
    return {key: value for key, value in facts.items() if key not in ("quantization_config", "dtype", "torch_dtype")}


def _check_complete(report: dict[str, Any], source: Path | str) -> None:
    """transformers fills gaps with random numbers and a warning; for a frozen base that is an error."""
    for what, names in (("lacks", report["missing_keys"]), ("has a wrong shape for", report["mismatched_keys"])):
        if names:
            first = min(str(name[0]) if isinstance(name, tuple) else str(name) for name in names)
            more = f" and {len(names) - 1} more tensors" if len(names) > 1 else ""
            raise DataError(f"the weights in {source} do not fit its config.json: {what} {first}{more}")


def _check_facts(said: dict[str, Any], loaded: dict[str, Any], source: Path | str) -> None:
    """A GGUF file may be of another model than the group's `architecture`, by which the run was planned."""
    for key in ("model_type", "num_hidden_layers", "hidden_size", "vocab_size"):
        if key in said and key in loaded and said[key] != loaded[key]:
            raise ConfigError(
                f"model.architecture says {key}={said[key]}, but what {source} holds has {loaded[key]};"
                " choose the model group of this file, or set model.architecture=null"
            )


def checkpoint_activations(model: "PreTrainedModel") -> None:
    """Keep only each layer's input in training. Raises ConfigError where transformers does not do that for a model."""
    if not model.supports_gradient_checkpointing:
        raise ConfigError(f"model.gradient_checkpointing=true: {type(model).__name__} does not support it")
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    # That also made the embeddings' output require a gradient, which only the reentrant kind needs. Without it the
    # backward pass ends at the first trained layer.
    model.disable_input_require_grads()


@contextmanager
def _one_line(config: ModelConfig, source: Path | str) -> Iterator[None]:
    """Turns what transformers raises for a user's mistake into one line; a MemoryError and ours pass through."""
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError

    try:
        yield
    except (ValueError, ImportError, KeyError, TypeError, StrictDataclassError) as error:
        reason = _first_line(error)
        if any(word in reason.lower() for word in ("flash", "scaled_dot_product_attention", "attn_implementation")):
            raise ConfigError(f"model.attention={config.attention} does not work here: {reason}") from error
        raise ConfigError(f"model '{config.name}' ({source}) cannot be built: {reason}") from error
    except OSError as error:  # also what the hub raises: not found, gated, no connection
        raise MissingFileError(f"model '{config.name}' cannot be read from {source}: {_first_line(error)}") from error
    except SafetensorError as error:
        raise DataError(f"model '{config.name}' ({source}) is damaged: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    """What an error says, on one line of at most 200 characters."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    line = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    return line if len(line) <= 200 else line[:197] + "..."
