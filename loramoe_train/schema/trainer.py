"""Group `trainer`: steps, learning rates, stages, checkpoints, trackers."""

from typing import Literal

from pydantic import Field, model_validator

from loramoe_train.schema.base import Strict

Trainable = Literal["experts", "routers", "base"]  # base: all weights of a model without experts
RoutingMode = Literal["learned", "by_domain", "uniform"]


class StageConfig(Strict):
    """One leg of a run: what trains, who routes, on how much data. Anything null falls back to the trainer's value."""

    train: list[Trainable] = Field(default_factory=lambda: ["experts", "routers"])
    routing: RoutingMode = "learned"  # by_domain: hard, each sample to its domain's expert
    examples: int | None = Field(default=None, gt=0)  # distinct examples of the mixture; null: all
    epochs: float | None = Field(default=None, gt=0)  # passes over those examples
    steps: int | None = Field(default=None, gt=0)  # optimizer steps; wins over epochs
    lr: float | None = Field(default=None, gt=0)
    router_lr: float | None = Field(default=None, gt=0)
    aux_loss: list[str] | None = None  # names of configured terms; null: all of them
    anchor: float = Field(default=0.0, ge=0)  # preservation: anchor * sum ||theta - theta_start||^2 over experts


class EarlyStoppingConfig(Strict):
    patience: int = Field(default=3, gt=0)  # evaluations without improvement
    min_delta: float = Field(default=0.0, ge=0)  # nats of evaluation loss


class WatchConfig(Strict):
    """When routers raise a warning, in a line of the log and, after several in a row, on the screen and in the end; and
    when the end of a stage does."""

    dead_load: float = Field(default=0.01, ge=0, lt=1)  # an expert with less than this share of an even load is dead
    top_load: float = Field(default=0.95, gt=0, le=1)  # a site is collapsed where one expert has this share of the load
    load_entropy: float = Field(default=0.1, ge=0, lt=1)  # or where the entropy of its load, 1 if even, is lower
    patience: int = Field(default=3, gt=0)  # lines in a row
    loss_rise: float = Field(default=0.1, gt=0)  # nats of evaluation loss that a stage may add to the one before it


class TrainerConfig(Strict):
    """The optimisation of a run."""

    batch_size: int = Field(default=32, gt=0)  # examples per optimizer step, over all processes
    micro_batch_size: int = Field(default=8, gt=0)  # examples per forward pass and process
    epochs: float = Field(default=1.0, gt=0)  # passes over the mixture, for stages that do not say
    max_steps: int | None = Field(default=None, gt=0)  # of the whole run, shared by its stages; wins over epochs
    optimizer: Literal["adamw", "adamw_8bit"] = "adamw"
    lr: float = Field(default=2e-4, gt=0)  # of the experts, or of the base
    router_lr: float | None = Field(default=None, gt=0)  # of the routers; null: lr
    up_lr_ratio: float = Field(default=1.0, gt=0)  # learning rate of the experts' up factors over that of their down
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.0, ge=0)  # 0: an idle expert must not shrink
    clip_norm: float | None = Field(default=1.0, gt=0)
    max_skipped_steps: int = Field(default=0, ge=0)  # of a stage, left out for a loss or gradient that is not finite
    schedule: Literal["cosine", "linear", "constant"] = "cosine"  # per stage
    warmup_fraction: float = Field(default=0.03, ge=0, lt=1)  # of a stage's steps
    mixed_precision: Literal["no", "bf16"] = "no"  # autocast around the forward pass
    parallel: Literal["ddp", "fsdp2"] = "ddp"  # several processes: a whole model each, or the frozen base shared out
    deterministic: bool = False
    compile: bool = False  # torch.compile of the decoder layers in training passes; evaluation runs as it is
    num_workers: int = Field(default=0, ge=0)  # processes that tokenise ahead
    log_every: int = Field(default=10, gt=0)  # steps
    eval_every: int | None = Field(default=None, gt=0)  # steps between evaluation losses; null: at each stage's end
    checkpoint_every: int | None = Field(default=None, gt=0)  # steps; null: at each stage's end
    keep: int = Field(default=2, gt=0)  # newest checkpoints kept, besides the best and each stage's last
    early_stopping: EarlyStoppingConfig | None = None
    watch: WatchConfig = Field(default_factory=WatchConfig)
    trackers: list[Literal["wandb", "tensorboard"]] = Field(default_factory=list)
    stages: dict[str, StageConfig] = Field(default_factory=dict)  # in order; empty: one stage named "train"

    @model_validator(mode="after")
    def _batches_divide(self) -> "TrainerConfig":
        if not self.stages:
            object.__setattr__(self, "stages", {"train": StageConfig()})
        return self
