"""From Hydra's composed values to a typed `RunConfig`: recipes and schema told to Hydra, its errors told in our words.

Nothing heavy is imported here, nor Hydra before it is needed.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from loramoe_train.choices import MALFORMED
from loramoe_train.errors import ConfigError, nearest, shown
from loramoe_train.paths import CONFIGS, recipe_files
from loramoe_train.schema.run import RunConfig
from loramoe_train.trust import refuse_untyped

Extras = Mapping[str, Mapping[str, type]]  # a command's own keys by group: name -> int, float or bool
OWN = ("plan", "show")  # those groups


def is_sweep() -> bool:
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    return HydraConfig.get().mode == RunMode.MULTIRUN


def normalised(arguments: Sequence[str]) -> list[str]:
    """The arguments with Hydra's `+` where it is a formality: before `recipe=`, a command's own keys (`plan.batch=8`)
    and those below a free mapping (`trainer.stages.mine.steps=5`, `data.sampling.weights.gsm8k=2`), which no schema
    lists.

    A free mapping that is given whole (`trainer.stages={...}`) replaces the recipe's, where Hydra would merge the two.
    """
    from loramoe_train.schema.run import free_mappings

    free = tuple(free_mappings())
    found: list[str] = []
    for argument in arguments:
        key, equals, value = argument.partition("=")
        whole = key in free and "." in key
        if key == "recipe" or (equals and key.partition(".")[0] in OWN and "." in key):
            found.append(f"+{argument}")
        elif whole and value.startswith("{"):
            found += [f"~{key}", f"++{argument}"]
        elif equals and (whole or any(key.startswith(f"{name}.") for name in free)):
            found.append(f"++{argument}")
        else:
            found.append(argument)
    return found


def chosen_losses(terms: dict[str, Any] | None, overrides: Sequence[str]) -> dict[str, Any]:
    """The terms of `aux_loss` without what a recipe sets of a loss that is not chosen: after `aux_loss=none` nothing is
    left of its coefficients. What an override itself sets stays, and is refused later: its loss must have been meant.
    """

    def is_chosen(term: Any) -> bool:
        return not isinstance(term, dict) or "_target_" in (term.get("make") or {})

    keys = [text.lstrip("+~").partition("=")[0].split(".") for text in overrides]
    named = {key[1] for key in keys if key[0] == "aux_loss" and len(key) > 1}
    return {name: term for name, term in (terms or {}).items() if name in named or is_chosen(term)}


def ordered(arguments: Sequence[str]) -> list[str]:
    """Options such as `--multirun` before the overrides: Hydra's parser cannot take one in their midst."""

    def is_override(argument: str) -> bool:
        return not argument.startswith("-") and ("=" in argument or argument.startswith("~"))

    return sorted(arguments, key=is_override)


def register() -> None:
    """Tell Hydra the schema's keys and defaults, and every recipe as an option of `recipe` over the whole config."""
    import yaml
    from hydra.core.config_store import ConfigStore

    from loramoe_train.schema.run import defaults

    ConfigStore.instance().store(name="schema", node=defaults())
    for name, path in recipe_files().items():
        group, _, leaf = f"recipe/{name}".rpartition("/")
        ConfigStore.instance().store(
            group=group, name=leaf, node=yaml.safe_load(path.read_text(encoding="utf-8")), package="_global_"
        )


def typed_run(composed: Any, extras: Extras, *, numbered: bool = False) -> tuple[RunConfig, dict[str, Any]]:
    """The run's config with the tasks' definitions filled in, and the command's own keys.

    `numbered`: its folder is below the one given, as Hydra's own sweeps have it.
    """
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    from loramoe_train.validation import validate

    try:
        values: dict[str, Any] = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)  # type: ignore[assignment]
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None) or "the config"
        raise ConfigError(f"{key}: {str(error).splitlines()[0]}") from error
    own = {group: own_keys(group, kinds, values.pop(group, {})) for group, kinds in extras.items()}
    hydra_config = HydraConfig.get()
    overrides = list(hydra_config.overrides.task)
    refuse_untyped(values, overrides)
    folders = [Path(s.path) / "data" / "task" for s in hydra_config.runtime.config_sources if s.schema == "file"]
    values["aux_loss"] = chosen_losses(values["aux_loss"], overrides)
    define_tasks(values["data"], folders)
    if numbered:
        parent = values.get("run_dir")
        values["run_dir"] = f"{parent}/{hydra_config.job.num}" if parent else hydra_config.runtime.output_dir
    return validate(values), own


def own_keys(group: str, kinds: Mapping[str, type], given: Any) -> dict[str, Any]:
    """A command's own keys that were given a value. Raises ConfigError for another key, and for a value that is no
    positive number, or true or false, as it should be."""
    if not isinstance(given, dict):
        raise ConfigError(f"{group}={shown(given)}: give +{group}.KEY=VALUE{nearest('', kinds)}")
    for name, value in given.items():
        if name not in kinds:
            raise ConfigError(f"unknown key {group}.{name}{nearest(name, kinds)}")
        kind = kinds[name]
        if value is None or (kind is bool and isinstance(value, bool)):
            continue
        number = isinstance(value, int if kind is int else int | float) and not isinstance(value, bool)
        if kind is bool or not (number and 0 < value < math.inf):
            wanted = {bool: "true or false", int: "a whole number above 0", float: "a number above 0"}[kind]
            raise ConfigError(f"{group}.{name}={shown(value)} must be {wanted}")
    return {name: value for name, value in given.items() if value is not None}


def define_tasks(data: dict[str, Any], folders: Sequence[Path]) -> None:
    """Fill in `data.definitions` for the tasks that have none. What is no list of names is left for validation."""
    from loramoe_train.data.definitions import load_definitions

    tasks, own = data.get("tasks"), data.get("definitions") or {}
    if isinstance(tasks, list) and isinstance(own, dict) and all(isinstance(task, str) for task in tasks):
        data["definitions"] = {**load_definitions([task for task in tasks if task not in own], folders), **own}


def with_hydra_errors(job: Callable[[], None]) -> None:
    """Run a Hydra job; turn what Hydra says about the command line into our one line."""
    from hydra.errors import HydraException, MissingConfigException, OverrideParseException
    from omegaconf.errors import OmegaConfBaseException

    try:
        job()
    except MissingConfigException as error:
        wanted = str(error.missing_cfg_file or "")
        if not wanted:  # --config-path
            raise ConfigError(str(error).splitlines()[0]) from error
        if wanted.startswith("hydra/launcher/submitit"):
            raise ConfigError("launcher=slurm needs hydra-submitit-launcher; install loramoe-train[slurm]") from error
        group, _, name = wanted.rpartition("/")
        options = [str(o) for o in error.options or []]
        missing = f"{group}={name}" if group else wanted
        raise ConfigError(f"unknown option {missing}{nearest(name, options)}") from error
    except OverrideParseException as error:
        raise ConfigError(f"{shown(error.override)}: {_unreadable(error.override)}") from error
    except (HydraException, OmegaConfBaseException) as error:
        merging, cause = "Error merging override ", error.__cause__
        if str(error).startswith(merging) and cause is not None:
            reason = str(cause).splitlines()[0]
            raise ConfigError(f"{shown(str(error).removeprefix(merging).strip())}: {reason}") from error
        raise ConfigError(_override_error(str(error))) from error


def _unreadable(override: str) -> str:
    return MALFORMED if "=" in override else "is neither an option nor KEY=VALUE"


def _override_error(text: str) -> str:
    """One line for a refused override, with the nearest key or group that exists."""
    unknown = re.search(r"Could not override '([^']+)'", text) or re.search(r"Key '([^']+)' is not in struct", text)
    if unknown:
        key = unknown.group(1)
        known = _known_keys()
        return f"unknown key or group '{key}'{nearest(key, known).split('; known')[0]}"
    twice = re.search(r"Multiple values for ([^.]+)\.", text)
    if twice:
        group = twice.group(1)
        return f"{group} is chosen already; give {group}=OPTION without +, or in a file `override /{group}: OPTION`"
    several = re.search(r"Ambiguous value for argument '(.+)'", text)
    if several:
        given = several.group(1)
        key, _, values = given.partition("=")
        return f"{shown(given)}: several values are a sweep (loramoe-train --multirun); a list is {key}=[{values}]"
    return " ".join(line.strip() for line in text.splitlines()[:3])


def _known_keys() -> list[str]:
    """Every key of the composed defaults, dotted, and every group."""
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from omegaconf import OmegaConf

    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        values = OmegaConf.to_container(compose("train"))
    found = [path.name for path in CONFIGS.iterdir() if path.is_dir()] + ["recipe"]

    def walk(value: Any, prefix: str) -> None:
        if isinstance(value, dict):
            for name, entry in value.items():
                found.append(f"{prefix}{name}")
                walk(entry, f"{prefix}{name}.")

    walk(values, "")
    return found
