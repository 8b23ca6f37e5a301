"""`RunConfig`: the whole of a run, as one typed object. Past the CLI nobody sees anything else."""

from collections.abc import Iterator
from typing import Any, get_origin

from pydantic import BaseModel, Field

from loramoe_train.schema.base import Strict
from loramoe_train.schema.data import DataConfig
from loramoe_train.schema.evaluation import EvalConfig
from loramoe_train.schema.experts import AuxLossConfig, ExpertsConfig, RouterConfig
from loramoe_train.schema.launcher import LauncherConfig
from loramoe_train.schema.model import ModelConfig, SuggestConfig
from loramoe_train.schema.trainer import TrainerConfig

SEEDS = 2**63  # generators of random numbers take no more


class RowsConfig(Strict):
    """Where the rows of benchmarks are."""

    root: str | None = None  # folder of local files; null: hub


class ScoringConfig(Strict):
    """What scoring needs of a model that no run of this program made."""

    seed: int = Field(default=0, ge=0, lt=SEEDS)
    run_dir: str | None = Field(default=None, min_length=1)  # folder of the results; null: outputs/eval/NAME-HASH
    offline: bool = False  # fetch nothing: sets the hub libraries' offline switches
    model: ModelConfig
    data: RowsConfig = Field(default_factory=RowsConfig)
    eval: EvalConfig = Field(default_factory=EvalConfig)

    def plain(self) -> dict[str, Any]:
        """A dict of plain values."""
        return self.model_dump(mode="json")


class RunConfig(Strict):
    """Everything that a run needs; `config.resolved.yaml` is its dump."""

    seed: int = Field(default=0, ge=0, lt=SEEDS)
    run_dir: str | None = Field(default=None, min_length=1)  # folder of the run; null: outputs/DATE/TIME
    resume: str | None = None  # "auto": continue the newest complete checkpoint of run_dir; or a checkpoint folder
    resume_changes: list[str] = Field(default_factory=list)  # keys that may differ from the run that is continued
    init_from: str | None = None  # run folder, checkpoint or adapter whose weights a new run starts from
    offline: bool = False  # fetch nothing: sets the hub libraries' offline switches
    trusted_modules: list[str] = Field(default_factory=list)  # further module prefixes that `_target_` may name
    model: ModelConfig
    experts: ExpertsConfig
    router: RouterConfig
    aux_loss: dict[str, AuxLossConfig] = Field(default_factory=dict)
    data: DataConfig
    trainer: TrainerConfig
    eval: EvalConfig = Field(default_factory=EvalConfig)
    launcher: LauncherConfig = Field(default_factory=LauncherConfig)

    def plain(self) -> dict[str, Any]:
        """A dict of plain values, ready for YAML."""
        return self.model_dump(mode="json")


def defaults(model: type[BaseModel] = RunConfig) -> dict[str, Any]:
    """Every key of the schema with its default, `???` where a value must be given: Hydra's own picture of the schema.

    Laid below the YAML groups, it makes every key known to Hydra, so that an override needs no `+`.
    """
    values: dict[str, Any] = {}
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, SuggestConfig):
            values[name] = {}  # an entry that is null would hide the default of `oc.select`
        elif isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            values[name] = defaults(field.annotation)
        elif field.is_required():
            values[name] = "???"
        else:
            default = field.get_default(call_default_factory=True)
            values[name] = list(default) if isinstance(default, tuple) else default
    return values


def free_mappings(model: type[BaseModel] = RunConfig, prefix: str = "") -> Iterator[str]:
    """Dotted names of the fields whose keys the user chooses, such as `trainer.stages`."""
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from free_mappings(field.annotation, f"{prefix}{name}.")
        elif get_origin(field.annotation) is dict or "dict[" in str(field.annotation):
            yield f"{prefix}{name}"
