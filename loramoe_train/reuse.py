"""`loramoe-eval`: rebuild a routed model from what a run left, and score it."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from loramoe_train.errors import ConfigError, DataError
from loramoe_train.experts.adapters import find_adapter, read_manifest
from loramoe_train.paths import CONFIGS
from loramoe_train.schema.run import RunConfig
from loramoe_train.validation import validate

KEPT = ("training", "recipe", "command")  # what results.json says about the training stays when it is scored again


def config_of(folder: Path, overrides: Sequence[str]) -> tuple[RunConfig, Path, dict[str, Any]]:
    """(config with `overrides` applied, adapter folder, manifest) of a run, checkpoint or adapter folder.

    `KEY=VALUE` sets a key, `GROUP=OPTION` lays the option's file over the group.
    """
    adapter = find_adapter(folder, "loramoe-eval")
    manifest = read_manifest(adapter)
    values = manifest.get("config")
    if not isinstance(values, dict):
        raise DataError(f"{adapter} stores no config in its manifest")
    if values.get("trusted_modules") and not any(text.startswith("trusted_modules=") for text in overrides):
        raise ConfigError(
            f"{adapter} wants code of {values['trusted_modules']}; if you trust it, say so:"
            f" trusted_modules=[{','.join(map(str, values['trusted_modules']))}]"
        )
    return validate(apply_overrides(values, overrides)), adapter, manifest


def apply_overrides(values: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """A copy of plain config values with `key=value` and `group=option` applied in order."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    from loramoe_train.data.definitions import load_definitions

    config = OmegaConf.create(values)
    for text in overrides:
        key, equals, value = text.lstrip("+").partition("=")
        if not equals:
            raise ConfigError(f"'{text}' is no override; write KEY=VALUE")
        option = CONFIGS / key / f"{value}.yaml"
        try:
            if option.is_file():
                layer = {key: yaml.safe_load(option.read_text(encoding="utf-8"))}
                config = OmegaConf.merge(config, layer)
            else:
                config = OmegaConf.merge(config, OmegaConf.from_dotlist([f"{key}={value}"]))
        except (OmegaConfBaseException, yaml.YAMLError) as error:
            raise ConfigError(f"{text}: {str(error).splitlines()[0]}") from error
    plain: dict[str, Any] = OmegaConf.to_container(config, resolve=True)  # type: ignore[assignment]
    data = plain["data"]
    missing = [task for task in data["tasks"] if task not in data["definitions"]]
    data["definitions"].update(load_definitions(missing, [CONFIGS / "data" / "task"]))
    return plain


def evaluate_folder(folder: Path, overrides: Sequence[str]) -> None:
    """Score the routed model of a folder and its base; results.json and samples go there, or to `run_dir`."""
    config, adapter, manifest = config_of(folder, overrides)
    if not config.eval.enabled:
        config = config.model_copy(update={"eval": config.eval.model_copy(update={"enabled": True})})

    from loramoe_train.serving import served_by
    from loramoe_train.settle import benchmark_names, settle

    started = time.perf_counter()
    settle(config, trains=False)
    served = served_by(config, benchmark_names(config), tasks=manifest["tasks"], domains=manifest["domains"])

    from loramoe_train.models import load_tokenizer
    from loramoe_train.run import evaluate_routed, finish, on_cpu, rebuild
    from loramoe_train.screen import quiet_libraries, screen
    from loramoe_train.training.accelerator import make_accelerator

    quiet_libraries()
    out = Path(config.run_dir) if config.run_dir else folder
    accelerator = make_accelerator(config.trainer.model_copy(update={"trackers": []}), out, cpu=on_cpu())
    routed = rebuild(config, adapter, manifest, device=accelerator.device)
    console = screen(stderr=True) if accelerator.is_main_process else None
    outcome = evaluate_routed(config, routed, load_tokenizer(config.model), out, accelerator, console, served=served)
    if accelerator.is_main_process:
        earlier = _earlier_results(out)
        outcome["scores"] = {**earlier.get("scores", {}), **outcome["scores"]}
        kept = {name: earlier[name] for name in KEPT if name in earlier}
        finish(config, out, outcome, time.perf_counter() - started, {**kept, "adapter": str(adapter)})


def _earlier_results(folder: Path) -> dict[str, Any]:
    """What the folder's results.json holds already; scores of benchmarks that were not run again are kept."""
    from loramoe_train.evaluation.results import read_results
    from loramoe_train.rundir import RESULTS

    return read_results(folder / RESULTS) if (folder / RESULTS).is_file() else {}
