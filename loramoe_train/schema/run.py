"""`RunConfig`: the whole of a run, as one typed object. Past the CLI nobody sees anything else."""

from typing import Any

from pydantic import Field

from loramoe_train.schema.base import Strict
from loramoe_train.schema.data import DataConfig
from loramoe_train.schema.evaluation import EvalConfig, LauncherConfig
from loramoe_train.schema.experts import AuxLossConfig, ExpertsConfig, RouterConfig
from loramoe_train.schema.model import ModelConfig
from loramoe_train.schema.trainer import TrainerConfig


class RunConfig(Strict):
    """Everything that a run needs; `config.resolved.yaml` is its dump."""

    seed: int = Field(default=0, ge=0)
    run_dir: str | None = None  # folder of the run; null: outputs/DATE/TIME
    resume: str | None = None  # "auto": continue the newest complete checkpoint of run_dir; or a checkpoint folder
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
