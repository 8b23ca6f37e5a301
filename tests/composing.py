"""Configs for tests, composed as the command line does it."""

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from loramoe_train.cli import normalised, register
from loramoe_train.data.definitions import load_definitions
from loramoe_train.paths import CONFIGS
from loramoe_train.schema.run import RunConfig
from loramoe_train.validation import validate


def composed(*overrides: str) -> RunConfig:
    """The validated config of `loramoe-train OVERRIDES`."""
    register()
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        values = OmegaConf.to_container(compose("train", normalised(overrides)), resolve=True, throw_on_missing=True)
    values["data"]["definitions"] = load_definitions(values["data"]["tasks"], [CONFIGS / "data" / "task"])
    return validate(values)
