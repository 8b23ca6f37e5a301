"""The story of a training run: stage after stage, with a log, evaluations and checkpoints.

Everything that a step depends on is a function of (configuration, seed, stage, step) and of the weights, moments and
counters in a checkpoint: batches are seekable, random numbers are seeded per micro-batch, learning rates are computed.
A run that is stopped anywhere and resumed therefore goes on as if nothing had happened, bit for bit on a CPU.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate import Accelerator
from torch import nn

from loramoe_train.errors import ConfigError, Interrupted
from loramoe_train.schema.trainer import TrainerConfig
from loramoe_train.training.checkpoint import Checkpoint, checkpoint_path, read_checkpoint
from loramoe_train.training.metrics import Metrics
from loramoe_train.training.parts import TrainingParts
from loramoe_train.training.progress import Progress
from loramoe_train.training.run_state import RunState
from loramoe_train.training.signals import StopSignals
from loramoe_train.training.stage_run import StageRun
from loramoe_train.training.stages import StagePlan
from loramoe_train.training.summary import TrainingSummary, stage_table

if TYPE_CHECKING:
    from rich.console import Console


def fit(
    parts: TrainingParts,
    accelerator: Accelerator,
    trainer: TrainerConfig,
    stages: Sequence[StagePlan],
    *,
    run_dir: Path,
    seed: int,
    resume: Path | None = None,
    changed: bool = False,
    made_with: Mapping[str, Any] | None = None,
    console: "Console | None" = None,
) -> TrainingSummary:
    """Train all stages; leaves `metrics.jsonl` and `checkpoints/` in `run_dir`, and the model as after the last step.

    Args:
        accelerator: as `make_accelerator` makes it; its trackers, if any, are started.
        stages: from `plan_stages`.
        resume: a checkpoint folder to continue from (see `checkpoint.find_latest`).
        changed: the configuration may differ from that of the checkpoint.
        made_with: plain facts that the numbers of the log carry.
        console: where to show progress; None is silent. Only the main process uses it.

    Raises:
        ConfigError: a stage that cannot train what it says, a checkpoint of another configuration, a launcher that
            wants to do the step's work, or a model that recomputes activations the reentrant way.
        DivergedError, OutOfMemoryError, DataError: see `step.py`.
        SavedOnSignal, Interrupted: asked to stop; a checkpoint was saved.
        LoramoeError: a checkpoint or the log could not be written.
    """
    _refuse(parts, accelerator, trainer)
    checkpoint = None if resume is None else read_checkpoint(resume)
    run = RunState(
        parts=parts,
        accelerator=accelerator,
        trainer=trainer,
        stages=tuple(stages),
        run_dir=run_dir,
        seed=seed,
        progress=Progress(console if accelerator.is_main_process else None),
        metrics=Metrics(run_dir, accelerator),
        changed=changed,
    )
    if checkpoint is not None:
        run.restore(checkpoint)
    run.metrics.open(resumed_at=None if checkpoint is None else checkpoint.state["step"], made_with=made_with)
    with StopSignals(lambda: run.progress.say("Ctrl-C: saving after this step; again to stop at once")) as signals:
        try:
            with run.progress:
                _train(run, checkpoint, signals)
        except KeyboardInterrupt:
            raise Interrupted("stopped at once by Ctrl-C; resume=auto continues the last checkpoint") from None
        finally:
            run.close()
    return _summary(run)


def _refuse(parts: TrainingParts, accelerator: Accelerator, trainer: TrainerConfig) -> None:
    if accelerator.mixed_precision != "no" or accelerator.gradient_accumulation_steps != 1:
        raise ConfigError(
            "the launcher sets mixed precision or gradient accumulation for accelerate; set trainer.mixed_precision, "
            "trainer.batch_size and trainer.micro_batch_size instead"
        )
    if trainer.early_stopping is not None and not any(parts.validation.values()):
        raise ConfigError("trainer.early_stopping needs an evaluation loss; set data.validation_examples above 0")
    if any(_recomputes_reentrantly(module) for module in parts.model.modules()):
        raise ConfigError(
            "the model recomputes activations the reentrant way (use_reentrant=True), which drops the gradient of"
            " auxiliary losses; leave its checkpointing off and set model.gradient_checkpointing=true"
        )
    grouped = {id(parameter) for members in parts.groups.values() for parameter in members.values()}
    stray = [name for name, p in parts.model.named_parameters() if p.requires_grad and id(p) not in grouped]
    assert not stray, f"parameters outside the groups require gradient: {stray[:5]}"


def _recomputes_reentrantly(module: nn.Module) -> bool:
    """As transformers' switch leaves a module; what a model of foreign code does in its own forward is out of sight."""
    chosen = getattr(module, "_gradient_checkpointing_func", None)
    on = getattr(module, "gradient_checkpointing", False)
    return bool(on) and isinstance(chosen, partial) and chosen.keywords.get("use_reentrant") is True


def _train(run: RunState, checkpoint: Checkpoint | None, signals: StopSignals) -> None:
    unfinished = checkpoint if checkpoint is not None and not checkpoint.state["stage_done"] else None
    for plan in run.stages[len(run.history) :]:
        stage = StageRun(run, plan, signals)
        if unfinished is not None:
            stage.restore(unfinished)
            unfinished = None
        run.history.append(stage.train())
    run.progress.say(stage_table(run.history))


def _summary(run: RunState) -> TrainingSummary:
    best = run.history[-1].best_step
    return TrainingSummary(
        stages=tuple(run.history),
        steps=sum(stage.steps for stage in run.history),
        last_checkpoint=run.last_checkpoint,
        best_checkpoint=None if best is None else checkpoint_path(run.run_dir, best),
    )
