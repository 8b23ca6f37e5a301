"""PEFT LoRA folders, in and out: `adapter_config.json` and `adapter_model.safetensors`, never a pickle file.

A LoRA adds `scale * up @ down` to a weight, with scale alpha / r, or alpha / sqrt(r) for rsLoRA; `rank_pattern` and
`alpha_pattern` change r and alpha for single modules. Here the scale is folded into `up`, so that adapters of any
recipe stand side by side. Whatever makes an adapter more than that (DoRA, biases, whole modules, embeddings, changed
base weights) is refused: leaving it out would give wrong numbers. Format: peft 0.21.

Legend: R rank, D in, O out.
"""

import json
import math
import os
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loramoe_train.errors import ConfigError, DataError, MissingFileError, nearest
from loramoe_train.files import read_json, sync
from loramoe_train.models.files import safetensors_header

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
PREFIX = "base_model.model."
_KEY = re.compile(r"(?P<module>.+)\.lora_(?P<part>[AB])\.weight")

# Settings under which an adapter is more, or something else, than `scale * up @ down` beside an unchanged base.
_UNSUPPORTED = {
    "use_dora": "DoRA rescales the whole weight",
    "lora_bias": "it has biases of its own",
    "modules_to_save": "it carries whole modules besides its factors",
    "trainable_token_indices": "it changes embedding rows",
    "target_parameters": "it adapts bare parameters",
    "layer_replication": "it repeats layers of the base",
    "alora_invocation_tokens": "it acts only behind certain tokens (aLoRA)",
    "use_qalora": "QA-LoRA pools the input",
    "use_bdlora": "its factors are block-diagonal",
    "arrow_config": "it routes among further adapters (Arrow)",
    "kasa_config": "KaSA adds singular values",
    "monteclora_config": "it samples its weights",
}
# Settings that do not change what trained factors mean.
_HARMLESS = frozenset(
    "alpha_pattern auto_mapping base_model_name_or_path bias corda_config ensure_weight_tying eva_config"
    " exclude_modules fan_in_fan_out inference_mode init_lora_weights layers_pattern layers_to_transform loftq_config"
    " lora_alpha lora_dropout lora_ga_config megatron_config megatron_core peft_type peft_version qalora_group_size r"
    " rank_pattern revision runtime_config target_modules task_type use_rslora velora_config".split()
)
# Initialisations after which PEFT trains against, and when loading again changes, the base weights.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True)
class LoraFactors:
    """One module's pair; the delta of its weight is `up @ down`."""

    down: Tensor  # (R, D) float32
    up: Tensor  # (O, R) float32, the scale folded in
    magnitude: Tensor | None = None  # (O,) float32: the length of every row of the adapted weight (DoRA); written only

    @property
    def rank(self) -> int:
        return self.down.shape[0]


@dataclass(frozen=True)
class LoraAdapter:
    """A LoRA adapter as read from its folder."""

    name: str  # of the folder
    base_model: str | None  # name or path of the base it was trained on, if it says so
    modules: dict[str, LoraFactors]  # full module name in the base model -> factors, in the order of the names
    task_type: str | None
    config: dict[str, Any]  # adapter_config.json as it stands


@dataclass(frozen=True)
class CoverageRow:
    """How many modules of one kind each adapter has factors for."""

    kind: str  # last part of the module names, such as q_proj
    counts: tuple[int, ...]  # one per adapter
    total: int  # modules of this kind that any adapter covers


def read_peft_folder(path: str | Path) -> LoraAdapter:
    """Read one adapter; the tensors are on the CPU.

    Raises MissingFileError (folder, config or safetensors file absent), DataError (damaged, contradictory or not
    finite) or ConfigError (a kind of adapter that is more than a plain LoRA), each naming the file and the remedy.
    """
    folder = Path(path)
    file = _require(folder)
    config = _read_config(folder / CONFIG)
    _check_kind(folder, config)
    pairs: dict[str, dict[str, Tensor]] = {}
    for key, tensor in _read_tensors(file).items():
        module, part = _parse(file, key)
        pairs.setdefault(module, {})[part] = _as_float(file, key, tensor)
    if not pairs:
        raise DataError(f"{file} holds no LoRA factors")
    modules = {name: _factors(file, name, pairs[name], config) for name in sorted(pairs, key=_natural)}
    own = folder.resolve().name
    return LoraAdapter(own, config.get("base_model_name_or_path") or None, modules, config.get("task_type"), config)


def read_peft_config(
    path: str | Path, *, allowed: Sequence[str] = ()
) -> tuple[dict[str, Any], dict[str, tuple[int, int, int, float]]]:
    """The checked config of an adapter folder, and (in, out, rank, alpha) of every module; no tensor is read.

    Sizes are those of the weights file. `allowed`: settings beyond a plain LoRA that the caller can serve. Raises as
    `read_peft_folder` does.
    """
    folder = Path(path)
    file = _require(folder)
    config = _read_config(folder / CONFIG)
    _check_kind(folder, {key: value for key, value in config.items() if key not in allowed})
    pairs: dict[str, dict[str, tuple[int, ...]]] = {}
    for key, entry in safetensors_header(file)[0].items():
        if config.get("use_dora") and key.endswith(".lora_magnitude_vector"):
            continue
        module, part = _parse(file, key)
        pairs.setdefault(module, {})[part] = tuple(entry["shape"])
    if not pairs:
        raise DataError(f"{file} holds no LoRA factors")
    modules = {}
    for name in sorted(pairs, key=_natural):
        rank, alpha = _rank_and_alpha(file, name, pairs[name], config)
        modules[name] = pairs[name]["A"][1], pairs[name]["B"][0], rank, alpha
    return config, modules


def write_peft_folder(
    path: str | Path,
    modules: Mapping[str, LoraFactors],
    *,
    base_model: str,
    revision: str | None = None,
    task_type: str | None = "CAUSAL_LM",
) -> Path:
    """Write a folder that `PeftModel.from_pretrained` loads as exactly `up @ down` per module; returns its path.

    The most common rank becomes `r`, others go into `rank_pattern`; alpha equals the rank, so that PEFT's scale is 1.
    Pairs with magnitudes, which all have to have then, become a DoRA adapter.
    The folder appears whole or not at all. Raises ConfigError if it exists already with something in it, or if there is
    nothing to write.
    """
    target = Path(path)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(f"{target} exists already; give a new folder for the adapter")
    modules = {name: pair for name, pair in modules.items() if pair.rank > 0}
    if not modules:
        raise ConfigError(f"nothing to write to {target}: the adapter has no module of rank 1 or more")
    common = Counter(pair.rank for pair in modules.values()).most_common(1)[0][0]
    uncommon = {name: pair.rank for name, pair in modules.items() if pair.rank != common}
    config = {
        "peft_type": "LORA",
        "task_type": task_type,
        "base_model_name_or_path": base_model,
        "revision": revision,
        "inference_mode": True,
        "r": common,
        "lora_alpha": common,
        "rank_pattern": uncommon,
        "alpha_pattern": uncommon,
        "target_modules": list(modules),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": any(pair.magnitude is not None for pair in modules.values()),
    }
    tensors: dict[str, Tensor] = {}
    for name, pair in modules.items():
        if pair.up.shape[1] != pair.rank:
            raise ValueError(f"{name}: down {tuple(pair.down.shape)} and up {tuple(pair.up.shape)} do not multiply")
        parts = {"lora_A.weight": pair.down, "lora_B.weight": pair.up, "lora_magnitude_vector": pair.magnitude}
        for part, tensor in parts.items():
            if tensor is not None:
                # a copy each: safetensors refuses tensors that share storage, and slices of a bank do
                copied = tensor.detach().to("cpu", torch.float32, copy=True).contiguous()
                tensors[f"{PREFIX}{name}.{part}"] = copied
    _write_folder(target, config, tensors)
    return target


def coverage(adapters: Sequence[LoraAdapter]) -> list[CoverageRow]:
    """Module kinds against adapters: how many modules each covers, so that partial coverage is seen at a glance."""
    kinds: dict[str, set[str]] = {}
    for adapter in adapters:
        for name in adapter.modules:
            kinds.setdefault(name.rpartition(".")[2], set()).add(name)
    return [
        CoverageRow(kind, tuple(len(names & adapter.modules.keys()) for adapter in adapters), len(names))
        for kind, names in sorted(kinds.items())
    ]


def _require(folder: Path) -> Path:
    """The weights file of an adapter folder, after a look at what the folder holds."""
    if not folder.is_dir():
        parent = folder.parent
        siblings = [entry.name for entry in parent.iterdir() if entry.is_dir()] if parent.is_dir() else []
        raise MissingFileError(f"adapter folder {folder} does not exist{nearest(folder.name, siblings)}")
    if not (folder / CONFIG).is_file():
        raise MissingFileError(f"{folder} lacks {CONFIG}; give the folder that peft's save_pretrained wrote")
    if not (folder / WEIGHTS).is_file():
        if (folder / PICKLE).is_file():
            raise MissingFileError(
                f"{folder} holds only {PICKLE}, a pickle file, which is never opened; convert it where you trust it:"
                " load it with peft and call save_pretrained(FOLDER, safe_serialization=True)"
            )
        raise MissingFileError(f"{folder} lacks {WEIGHTS}")
    return folder / WEIGHTS


def _read_config(path: Path) -> dict[str, Any]:
    config = read_json(path)
    for key, default in (("rank_pattern", {}), ("alpha_pattern", {})):
        config[key] = config.get(key) or default
        if not isinstance(config[key], dict):
            raise DataError(f"{path}: {key} must be a mapping of module names to numbers, got {config[key]!r}")
    return config


def _check_kind(folder: Path, config: Mapping[str, Any]) -> None:
    path = folder / CONFIG
    if config.get("peft_type") != "LORA":
        raise ConfigError(f"{path}: peft_type is {config.get('peft_type')!r}; only LORA adapters are served")
    if config.get("bias") not in (None, "none"):
        raise ConfigError(f"{path}: bias={config['bias']!r} trains biases of the base; only bias='none' is served")
    for key, why in _UNSUPPORTED.items():
        if config.get(key):
            raise ConfigError(f"{path}: {key}={_shown(config[key])} is not served: {why}")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.startswith(_CHANGES_BASE):
        raise ConfigError(
            f"{path}: init_lora_weights={start!r} is relative to changed base weights; convert it with peft:"
            " save_pretrained(FOLDER, path_initial_model_for_weight_conversion=INITIAL)"
        )
    unknown = [key for key, value in config.items() if value and key not in _HARMLESS and key not in _UNSUPPORTED]
    if unknown:
        raise ConfigError(
            f"{path}: the setting {unknown[0]}={_shown(config[unknown[0]])} is not known here, and may change what the"
            " factors mean; set it to null if it does not"
        )


def _read_tensors(file: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(file)
    except (SafetensorError, OSError, ValueError) as error:
        raise DataError(f"{file} is damaged: {str(error).splitlines()[0]}; fetch or copy it again") from error


def _parse(file: Path, key: str) -> tuple[str, str]:
    """Module name and "A" or "B" of a tensor's key."""
    match = _KEY.fullmatch(key)
    if match and key.startswith(PREFIX):
        return match["module"].removeprefix(PREFIX), match["part"]
    for mark, what in (
        ("lora_embedding_", "LoRA on an embedding"),
        ("lora_magnitude_vector", "DoRA"),
        (".lora_B.bias", "a bias of the LoRA itself"),
        (".bias", "a trained bias"),
        ("modules_to_save", "a whole trained module"),
    ):
        if mark in key:
            raise ConfigError(f"{file}: {key} is {what}, which cannot be imported; only plain LoRA factors can")
    raise ConfigError(f"{file}: {key} is no LoRA factor; expected {PREFIX}MODULE.lora_A.weight or .lora_B.weight")


def _as_float(file: Path, key: str, tensor: Tensor) -> Tensor:
    if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        raise DataError(
            f"{file}: {key} is {tensor.dtype}; quantised factors cannot be imported, save them in a float dtype"
        )
    if tensor.ndim != 2:
        raise DataError(f"{file}: {key} has shape {tuple(tensor.shape)}; the factors of a linear layer are matrices")
    if not torch.isfinite(tensor).all():
        raise DataError(f"{file}: {key} holds a value that is not finite")
    return tensor.float()


def _factors(file: Path, name: str, pair: Mapping[str, Tensor], config: Mapping[str, Any]) -> LoraFactors:
    rank, alpha = _rank_and_alpha(file, name, {part: tuple(tensor.shape) for part, tensor in pair.items()}, config)
    scale = alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
    return LoraFactors(down=pair["A"].contiguous(), up=(pair["B"] * scale).contiguous())


def _rank_and_alpha(
    file: Path, name: str, pair: Mapping[str, tuple[int, ...]], config: Mapping[str, Any]
) -> tuple[int, float]:
    """As the config says them for a module, whose factors must have shapes that fit."""
    for part, other in (("A", "B"), ("B", "A")):
        if part not in pair:
            raise DataError(f"{file}: {name} has lora_{other} but no lora_{part}")
    down, up = pair["A"], pair["B"]
    rank = pattern_value(config["rank_pattern"], name, config.get("r"))
    alpha = pattern_value(config["alpha_pattern"], name, config.get("lora_alpha"))
    path = file.parent / CONFIG
    if not _number(rank) or int(rank) != rank or rank < 1:
        raise DataError(f"{path}: the rank of {name} is {rank!r}; it must be a whole number of at least 1")
    if not _number(alpha):
        raise DataError(f"{path}: the alpha of {name} is {alpha!r}; it must be a number")
    if len(down) != 2 or len(up) != 2 or not down[0] == up[1] == rank:
        raise DataError(f"{file}: {name} has lora_A {down} and lora_B {up}, but {CONFIG} says rank {rank}")
    return int(rank), float(alpha)


def pattern_value(pattern: Mapping[str, Any], module: str, default: Any) -> Any:
    """The value of the first key that PEFT would apply to a module: a regex for the whole name, or for its end."""
    for key, value in pattern.items():
        try:
            if re.match(rf"(.*\.)?({key})$", module):
                return value
        except re.error as error:
            raise DataError(f"{CONFIG}: the pattern {key!r} is no regular expression: {error}") from error
    return default


def _number(value: Any) -> bool:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number that no float can hold
        return False


def _natural(name: str) -> list[tuple[int, str]]:
    """Sort key with layer 2 before layer 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def _shown(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _write_folder(target: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Both files in a folder beside the target, flushed to disk, then one rename."""
    from safetensors.torch import save_file

    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as error:
        raise ConfigError(f"cannot write {target}: {error.strerror}") from error
    try:
        save_file(dict(tensors), aside / WEIGHTS, metadata={"format": "pt"})
        (aside / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        for name in (WEIGHTS, CONFIG):
            sync(aside / name)
        aside.chmod(0o777 & ~_umask())  # mkdtemp makes private folders
        os.replace(aside, target)
        sync(target.parent)
    except BaseException as error:
        shutil.rmtree(aside, ignore_errors=True)
        if isinstance(error, OSError):
            raise ConfigError(f"cannot write {target}: {error.strerror}") from error
        raise


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
