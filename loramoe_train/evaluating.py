"""`loramoe-eval PATH`: finds out what lies there, and scores what no run of this program made.

That is a plain model, which gets one column of scores, or a LoRA adapter of PEFT, which PEFT itself puts beside its
base. Neither stores a config, so the benchmarks have to be named; results go to a folder of this program's.
"""

import hashlib
import os
import re
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loramoe_train.errors import ConfigError, DataError, LoramoeError, MissingFileError, nearest
from loramoe_train.evaluation.check import check_benchmarks
from loramoe_train.evaluation.tasks import known_benchmarks
from loramoe_train.models.architecture import max_positions, read_architecture
from loramoe_train.models.files import CONFIG, model_folder, weight_files
from loramoe_train.paths import ASSETS
from loramoe_train.reuse import apply_overrides, earlier_results, evaluate_folder
from loramoe_train.rundir import RESOLVED
from loramoe_train.schema.run import ScoringConfig
from loramoe_train.settle import OFFLINE
from loramoe_train.trust import is_typed, refuse_outside_links
from loramoe_train.validation import typed

if TYPE_CHECKING:
    from torch import nn

MANIFEST, PEFT_CONFIG = "adapter.json", "adapter_config.json"
HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")
Modules = Mapping[str, tuple[int, int, int, float]]  # module of the base -> (in, out, rank, alpha)


@dataclass(frozen=True)
class Adapter:
    """A checked LoRA folder of PEFT."""

    folder: Path
    config: Mapping[str, Any]  # adapter_config.json
    modules: Modules

    @property
    def weights(self) -> Path:
        return self.folder / "adapter_model.safetensors"

    @property
    def settings(self) -> dict[str, Any]:
        """What PEFT is told: sizes as the weights have them, and nothing that names code or files."""
        ranks = {name: rank for name, (_, _, rank, _) in self.modules.items()}
        alphas = {name: alpha for name, (_, _, _, alpha) in self.modules.items()}
        flags = {key: bool(self.config.get(key)) for key in ("use_rslora", "use_dora", "fan_in_fan_out")}
        return {"target_modules": sorted(ranks), "rank_pattern": ranks, "alpha_pattern": alphas, **flags}


def evaluate_path(text: str, overrides: Sequence[str]) -> None:
    """Score a run, checkpoint or adapter folder, a PEFT adapter folder, a model folder, or a model by its name.

    Raises:
        MissingFileError, ConfigError, DataError: in one line, before a model is loaded, what is wrong with the path,
            the base, the benchmarks or their data.
    """
    path = Path(text).expanduser()
    if path.is_dir():
        if any((place / MANIFEST).is_file() for place in (path, path / "adapter")):
            evaluate_folder(path, overrides)
        elif (path / PEFT_CONFIG).is_file():
            _evaluate_peft(path, overrides)
        elif (path / CONFIG).is_file() or is_typed("model.gguf_file", overrides):
            config = _config({"name": path.resolve().name, "path": str(path)}, str(path), overrides)
            _evaluate(config, _place(config, path), str(path))
        else:
            raise MissingFileError(f"loramoe-eval: {path} {_what_is_missing(path)}")
    elif path.exists():
        raise ConfigError(f"loramoe-eval: {path} is a file; give its folder (and model.gguf_file for a GGUF file)")
    else:
        _evaluate_named(text, overrides)


def _what_is_missing(path: Path) -> str:
    checkpoints = sorted((path / "checkpoints").glob(f"*/{MANIFEST}"))
    if checkpoints:
        return f"is a run that has not ended; give one of its checkpoints, such as {checkpoints[-1].parent}"
    if (path / RESOLVED).is_file():
        return "is a run that has not ended, and has no checkpoint yet"
    found = [place.parent for name in (MANIFEST, PEFT_CONFIG, CONFIG) for place in sorted(path.glob(f"*/{name}"))]
    hint = f"; did you mean {found[0]}?" if found else ""
    return f"holds no {MANIFEST} (of a run or adapter), no {PEFT_CONFIG} (of PEFT) and no {CONFIG} (of a model){hint}"


def _evaluate_named(name: str, overrides: Sequence[str]) -> None:
    """A model that ships with the package or lies on the hub."""
    parent = Path(name).parent
    siblings = [entry.name for entry in parent.iterdir()] if parent.is_dir() else []
    known = [*siblings, *(place.parent.name for place in ASSETS.glob("*/model"))]
    absent = f"loramoe-eval: there is no {name}{nearest(Path(name).name, known).split('; known')[0]}"
    if not (ASSETS / name / "model").is_dir() and not HUB_NAME.fullmatch(name):
        raise MissingFileError(absent)
    config = _config({"name": name}, name, overrides)
    try:
        read_architecture(config.model)
        model_folder(config.model)
    except LoramoeError as error:
        raise type(error)(f"{absent}; nor can it be had as a model: {error}") from error
    _evaluate(config, _place(config, None), name)


def _config(model: Mapping[str, Any], shown: str, overrides: Sequence[str]) -> ScoringConfig:
    """The config of something that stores none: defaults, and what was typed."""
    config = typed(ScoringConfig, apply_overrides({"model": dict(model)}, overrides))
    if not config.eval.tasks:
        raise ConfigError(
            f"{shown} says nothing about benchmarks; give eval.tasks=[NAME,...]; known: {', '.join(known_benchmarks())}"
        )
    if not config.eval.enabled:
        config = config.model_copy(update={"eval": config.eval.model_copy(update={"enabled": True})})
    if config.offline:
        os.environ.update(OFFLINE)
    return config


def _place(config: ScoringConfig, path: Path | None) -> Path:
    """Where results go: `run_dir`, or a folder that is the same for the same thing, so that a second start goes on."""
    if config.run_dir is not None:
        return Path(config.run_dir)
    what = f"{config.model.name}@{config.model.revision}" if path is None else str(path.resolve())
    name = config.model.name.rpartition("/")[2] if path is None else path.resolve().name
    return Path("outputs", "eval", f"{name}-{hashlib.sha256(what.encode()).hexdigest()[:8]}")


def _evaluate_peft(folder: Path, overrides: Sequence[str]) -> None:
    from loramoe_train.experts.peft_folder import read_peft_config

    adapter, modules = read_peft_config(folder, allowed=("use_dora",))
    if adapter.get("task_type") not in (None, "CAUSAL_LM"):
        raise ConfigError(f"{folder / PEFT_CONFIG}: task_type={adapter['task_type']} is no causal language model")
    config = _config(_base_of(folder, adapter, overrides), str(folder), overrides)
    try:
        model_folder(config.model)
    except LoramoeError as error:
        raise type(error)(f"the base of {folder} is not at hand: {error}") from error
    _evaluate(config, _place(config, folder), str(folder), Adapter(folder, adapter, modules))


def _base_of(folder: Path, adapter: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """`name`, and perhaps `path` and `revision`, of the base that an adapter names; overrides come later."""
    name = adapter.get("base_model_name_or_path")
    if any(is_typed(key, overrides) for key in ("model.name", "model.path", "model")):
        return {"name": str(name or folder.resolve().name)}
    cure = "give model.path=FOLDER or model.name=OWNER/NAME"
    if not isinstance(name, str) or not name:
        raise ConfigError(f"{folder / PEFT_CONFIG} does not name its base (base_model_name_or_path); {cure}")
    if Path(name).expanduser().is_dir():
        return {"name": Path(name).name, "path": name}
    if not HUB_NAME.fullmatch(name) and not (ASSETS / name / "model").is_dir():
        raise MissingFileError(f"the base of {folder}, '{name}' (base_model_name_or_path), is not there; {cure}")
    return {"name": name, "revision": adapter.get("revision")}


def _evaluate(config: ScoringConfig, out: Path, shown: str, peft: Adapter | None = None) -> None:
    """Score a base, and the adapter of PEFT beside it."""
    started, names = time.perf_counter(), list(config.eval.tasks or ())
    positions = max_positions(read_architecture(config.model))
    check_benchmarks(names, config.eval, config.data.root, positions)
    source = model_folder(config.model)
    if isinstance(source, Path):
        weight_files(source, config.model.gguf_file)
    if out.is_dir():
        refuse_outside_links(out)
    earlier = earlier_results(out)

    from loramoe_train.evaluation.units import facts_sha256
    from loramoe_train.files import sha256
    from loramoe_train.models import load_model, load_tokenizer, meta_model
    from loramoe_train.run import on_cpu
    from loramoe_train.schema.trainer import TrainerConfig
    from loramoe_train.scoring import base_facts, finish, merged, score
    from loramoe_train.screen import quiet_libraries, screen
    from loramoe_train.training.accelerator import make_accelerator

    quiet_libraries()
    shapes = meta_model(config.model)
    if peft is not None:
        _check_fit(peft, shapes, config.model.name)
    accelerator = make_accelerator(TrainerConfig(), out, cpu=on_cpu())
    tokenizer = load_tokenizer(config.model)
    model = load_model(config.model, device=accelerator.device, shapes=shapes)
    facts, base_mode = base_facts(config.model, tokenizer), nullcontext
    tuned = facts
    if peft is not None:
        base_mode = _beside(model, peft, accelerator.device).disable_adapter
        tuned = facts | {"adapter_sha256": sha256(peft.weights), "settings_sha256": facts_sha256(peft.settings)}
    outcome = score(
        config,
        model,
        tokenizer,
        names,
        out,
        facts=lambda name, side: tuned if side == "tuned" else facts,
        accelerator=accelerator,
        console=screen(stderr=True) if accelerator.is_main_process else None,
        base_mode=base_mode,
        tuned=peft is not None,
    )
    if accelerator.is_main_process:
        outcome["scores"] = merged(earlier.get("scores", {}), outcome["scores"])
        finish(config, out, outcome, time.perf_counter() - started, {"evaluated": shown})


def _check_fit(adapter: Adapter, shapes: "nn.Module", base: str) -> None:
    """ConfigError unless the base has every module that the adapter has factors for, in their size."""
    from torch import nn

    found = dict(shapes.named_modules())
    for name, (d_in, d_out, _, _) in adapter.modules.items():
        module = found.get(name)
        if module is None:
            hint = nearest(name, found).split("; known")[0]
            raise ConfigError(f"{adapter.folder} was made for another base: {base} has no module {name}{hint}")
        if isinstance(module, nn.Linear) and (module.in_features, module.out_features) != (d_in, d_out):
            raise ConfigError(
                f"{adapter.folder} was made for another base: its {name} is {d_in} x {d_out}, and that of {base} is"
                f" {module.in_features} x {module.out_features}"
            )


def _beside(model: Any, adapter: Adapter, device: Any) -> Any:
    """PEFT's model around `model`, whose modules then have the adapter in them; every stored number is in its place."""
    from peft import LoraConfig, PeftModel, get_peft_model_state_dict
    from safetensors.torch import load_file

    try:
        config = LoraConfig(**adapter.settings, task_type="CAUSAL_LM")
        made = PeftModel.from_pretrained(model, str(adapter.folder), config=config, torch_device=str(device))
    except (ValueError, TypeError, KeyError, RuntimeError, AttributeError) as error:
        lines = str(error).splitlines() or [type(error).__name__]
        raise ConfigError(f"{adapter.folder} cannot be put beside its base by PEFT: {' '.join(lines[:2])}") from error
    stored, placed = load_file(adapter.weights), get_peft_model_state_dict(made)
    for name in sorted(stored.keys() ^ placed.keys()):
        what = "has no place in the model" if name in stored else "is missing"
        raise DataError(f"{adapter.weights} does not fit its base and {PEFT_CONFIG}: {name} {what}")
    for name, tensor in stored.items():
        if not tensor.isfinite().all():
            raise DataError(f"{adapter.weights}: {name} holds a value that is not finite")
        if not tensor.to(placed[name]).equal(placed[name]):
            raise DataError(f"{adapter.weights}: {name} was not loaded as it stands")
    return made.eval()
