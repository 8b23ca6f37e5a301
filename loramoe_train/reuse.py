"""`loramoe-eval`: rebuild a routed model from what a run left, and score it."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from loramoe_train.errors import ConfigError, DataError
from loramoe_train.paths import CONFIGS
from loramoe_train.rundir import PLACES
from loramoe_train.schema.run import RunConfig
from loramoe_train.trust import is_typed, refuse_outside_links, refuse_untyped
from loramoe_train.validation import validate

KEPT = ("training", "recipe", "command")  # what results.json says about the training stays when it is scored again


def config_of(folder: Path, overrides: Sequence[str]) -> tuple[RunConfig, Path, dict[str, Any]]:
    """(config with `overrides` applied, adapter folder, manifest) of a run, checkpoint or adapter folder.

    `KEY=VALUE` sets a key, `GROUP=OPTION` lays the option's file over the group.
    """
    from loramoe_train.experts.adapters import find_adapter, read_manifest

    adapter = find_adapter(folder, "loramoe-eval")
    manifest = read_manifest(adapter)
    values = manifest.get("config")
    if not isinstance(values, dict):
        raise DataError(f"{adapter} stores no config in its manifest")
    values = {key: value for key, value in values.items() if key not in PLACES}  # a file does not say where to write
    for key, harmless in (("allow_code_execution", False), ("sandbox", "auto"), ("again", False)):
        if isinstance(values.get("eval"), dict) and not is_typed(f"eval.{key}", overrides):
            values["eval"] = {**values["eval"], key: harmless}  # what who trained allowed himself, or wished that time
    try:
        refuse_untyped(values, overrides)
    except ConfigError as error:
        raise ConfigError(f"{adapter}: {error}") from error
    return validate(apply_overrides(values, overrides)), adapter, manifest


def apply_overrides(values: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """A copy of plain config values with `key=value` and `group=option` applied in order.

    What is stored is plain: `${...}` in it is text, in a prompt perhaps, and not for OmegaConf to fill in.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    from loramoe_train.data.definitions import load_definitions

    plain = dict(values)
    for text in overrides:
        key, equals, value = text.lstrip("+").partition("=")
        if not equals:
            raise ConfigError(f"'{text}' is no override; write KEY=VALUE")
        option = CONFIGS / key / f"{value}.yaml"
        try:
            if option.is_file():
                layer = {key: yaml.safe_load(option.read_text(encoding="utf-8"))}
                if isinstance(layer[key], dict):
                    layer[key].pop("defaults", None)  # for Hydra: what the option is laid over is here already
            else:
                layer = OmegaConf.to_container(OmegaConf.from_dotlist([f"{key}={value}"]), resolve=True)
        except (OmegaConfBaseException, yaml.YAMLError, RecursionError) as error:
            raise ConfigError(f"{text}: {str(error).splitlines()[0]}") from error
        plain = _merged(plain, layer)
    data = plain.get("data")
    if isinstance(data, dict) and isinstance(data.get("tasks"), list) and isinstance(data.get("definitions"), dict):
        missing = [str(task) for task in data["tasks"] if str(task) not in data["definitions"]]
        found = load_definitions(missing, [CONFIGS / "data" / "task"])
        plain["data"] = {**data, "definitions": {**data["definitions"], **found}}
    return plain


def _merged(below: Any, above: Any) -> Any:
    """Mappings are laid over each other, anything else takes the place of what was there."""
    if not isinstance(below, dict) or not isinstance(above, dict):
        return above
    return {**below, **{key: _merged(below.get(key), value) for key, value in above.items()}}


def evaluate_folder(folder: Path, overrides: Sequence[str]) -> None:
    """Score the routed model of a folder and its base; results.json and samples go there, or to `run_dir`."""
    config, adapter, manifest = config_of(folder, overrides)
    out = Path(config.run_dir) if config.run_dir else folder
    if out.is_dir():
        refuse_outside_links(out)
    if not config.eval.enabled:
        config = config.model_copy(update={"eval": config.eval.model_copy(update={"enabled": True})})

    earlier = earlier_results(out)

    from loramoe_train.serving import served_by
    from loramoe_train.settle import benchmark_names, settle

    started = time.perf_counter()
    settle(config, trains=False)
    served = served_by(config, benchmark_names(config), tasks=manifest["tasks"], domains=manifest["domains"])

    from loramoe_train.models import load_tokenizer
    from loramoe_train.run import evaluate_routed, on_cpu, rebuild
    from loramoe_train.scoring import finish, merged
    from loramoe_train.screen import quiet_libraries, screen
    from loramoe_train.training.accelerator import make_accelerator

    quiet_libraries()
    accelerator = make_accelerator(config.trainer.model_copy(update={"trackers": []}), out, cpu=on_cpu())
    routed = rebuild(config, adapter, manifest, device=accelerator.device)
    console = screen(stderr=True) if accelerator.is_main_process else None
    tokenizer, benchmarks = load_tokenizer(config.model), {"served": served, "adapter": adapter}
    outcome = evaluate_routed(config, routed, tokenizer, out, accelerator, console, **benchmarks)
    if accelerator.is_main_process:
        outcome["scores"] = merged(earlier.get("scores", {}), outcome["scores"])
        kept = {name: earlier[name] for name in KEPT if name in earlier}
        finish(config, out, outcome, time.perf_counter() - started, {**kept, "adapter": str(adapter)})


def earlier_results(folder: Path) -> dict[str, Any]:
    """What the folder's results.json holds already, for `scoring.merged`. DataError where it cannot be read."""
    from loramoe_train.evaluation.results import read_results
    from loramoe_train.rundir import RESULTS

    try:
        return read_results(folder / RESULTS) if (folder / RESULTS).is_file() else {}
    except DataError as error:
        raise DataError(f"{error}, after removing it") from error
