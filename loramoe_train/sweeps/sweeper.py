"""Hydra's sweep with our own end: every run is composed and checked, then all are handed over at once.

Hydra's sweeper would write into the sweep's folder before anything is checked, and hand its own state, pickled, to
whoever starts the runs. Here the runs leave Hydra as typed configs, and nothing is written.
"""

import os
from collections.abc import Callable, Mapping
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper as HydrasSweeper
from omegaconf import DictConfig, open_dict, read_write

from loramoe_train.errors import ConfigError, LoramoeError
from loramoe_train.schema.run import RunConfig
from loramoe_train.sweeps.sweep import Composed, shown

Typed = Callable[[DictConfig], tuple[RunConfig, dict[str, Any]]]
HandOver = Callable[[list[Composed], dict[str, Any]], None]  # the runs, and the parameters of hydra.launcher


class Sweeper(HydrasSweeper):
    """Hydra makes it by name, so what it calls hangs on the class."""

    typed: Typed
    hand_over: HandOver

    def __init__(self, max_batch_size: int | None = None, params: Mapping[str, Any] | None = None) -> None:
        self.params = dict(params or {})  # overrides of hydra.sweeper.params; batches mean nothing here

    def setup(self, *, hydra_context: Any, task_function: Any, config: DictConfig) -> None:
        self.loader, self.config = hydra_context.config_loader, config
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> Any:
        given = [f"{key}={value}" for key, value in self.params.items()]
        overrides = OverridesParser.create(config_loader=self.loader).parse_overrides([*given, *arguments])
        (combinations,) = BasicSweeper.split_arguments(overrides, None)
        if not combinations:
            raise ConfigError(f"{shown(arguments)}: the sweep has no runs, for a list, range or glob in it is empty")
        runs = [self._composed(list(chosen), number) for number, chosen in enumerate(combinations)]
        self.hand_over(runs, dict(getattr(self.launcher, "params", {})))
        return []

    def _composed(self, overrides: list[str], number: int) -> Composed:
        config = self.loader.load_sweep_config(self.config, overrides)
        with read_write(config), open_dict(config):
            config.hydra.job.num, config.hydra.job.id = number, str(number)
            config.hydra.runtime.output_dir = ""
        before = HydraConfig.instance().cfg
        HydraConfig.instance().set_config(config)
        try:
            places = str(config.hydra.sweep.subdir), str(config.hydra.sweep.dir)
            recipe = config.hydra.runtime.choices.get("recipe")
            composed = config.copy()
            with read_write(composed), open_dict(composed):
                del composed["hydra"]
            run, extra = self.typed(composed)
        except LoramoeError as error:
            raise type(error)(f"run {number} ({shown(overrides)}): {error}") from error
        finally:
            HydraConfig.instance().cfg = before
        return Composed(tuple(overrides), run, extra, recipe, *places)


def take_over(typed: Typed, hand_over: HandOver) -> None:
    """From now on a sweep in this process ends in `hand_over`. A sweeper that the user chose stays Hydra's."""
    check_one_process(os.environ)
    Sweeper.typed, Sweeper.hand_over = staticmethod(typed), staticmethod(hand_over)
    # Hydra's registry goes by the name
    Plugins.instance().class_name_to_class[f"{BasicSweeper.__module__}.{BasicSweeper.__name__}"] = Sweeper


def check_one_process(environment: Mapping[str, str]) -> None:
    """Raise ConfigError where several processes would each start the same sweep."""
    if int(environment.get("WORLD_SIZE") or 1) > 1:
        raise ConfigError(
            "--multirun under a launcher of several processes would start the sweep several times; start it once and"
            " give every run its processes: launcher.gpus_per_node or launcher.tasks_per_node"
        )
