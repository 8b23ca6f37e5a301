"""Configs for tests, composed as the command line does it."""

from functools import cache
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from loramoe_train.composition import chosen_losses, normalised, register
from loramoe_train.data.definitions import load_definitions
from loramoe_train.paths import CONFIGS, RECIPES, recipe_files
from loramoe_train.schema.run import RunConfig
from loramoe_train.validation import validate

RECIPE_NAMES = list(recipe_files())


def recipe_file(recipe: str) -> dict[str, Any]:
    """What stands in the file. Tests are named by it, for composing takes long."""
    return yaml.safe_load((RECIPES / f"{recipe}.yaml").read_text(encoding="utf-8"))


def stages_of(recipe: str) -> dict[str, dict[str, Any]]:
    """A recipe's stages by name, with what its file says about them."""
    return recipe_file(recipe).get("trainer", {}).get("stages", {"train": {}})


@cache
def _registered() -> None:
    register()


@cache
def composed(*overrides: str) -> RunConfig:
    """The validated config of `loramoe-train OVERRIDES`; composed once, for it takes long and cannot be changed."""
    _registered()
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        values = OmegaConf.to_container(compose("train", normalised(overrides)), resolve=True, throw_on_missing=True)
    values["aux_loss"] = chosen_losses(values["aux_loss"], overrides)
    values["data"]["definitions"] = load_definitions(values["data"]["tasks"], [CONFIGS / "data" / "task"])
    return validate(values)
