"""What the stages of a run share, where a stage stands, and how both go into a checkpoint and come back."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor

from loramoe_train.errors import ConfigError, DataError, LoramoeError
from loramoe_train.schema.trainer import TrainerConfig
from loramoe_train.training import rng
from loramoe_train.training.checkpoint import Checkpoint, checkpoint_path, rotate, write_checkpoint
from loramoe_train.training.metrics import Metrics, Window
from loramoe_train.training.parts import TrainingParts
from loramoe_train.training.progress import Progress
from loramoe_train.training.snapshot import snapshot
from loramoe_train.training.stages import StagePlan
from loramoe_train.training.summary import StageSummary
from loramoe_train.training.validation import EvalResult
from loramoe_train.training.writer import Writer

ADAPTER = "adapter"  # the snapshot's name for what `save_adapter` writes; no file of state/ is called so


@dataclass
class StageState:
    """Where a stage stands: plain numbers, so that JSON can hold them exactly."""

    window: Window
    done: int = 0  # optimizer steps of this stage
    pending: bool = False  # the evaluation and checkpoint that are due after step `done` are still to come
    seconds: float = 0.0
    tokens: int = 0
    last_losses: dict[str, Any] = field(default_factory=lambda: {"loss": None, "task_loss": {}})
    last_eval: EvalResult | None = None
    best_step: int | None = None  # of the run
    best_loss: float | None = None
    patience_loss: float | None = None  # what early stopping compares with
    evals_without_gain: int = 0
    skipped: int = 0  # steps that were left out, not finite
    alarms: list[str] = field(default_factory=list)  # about routers, from the last line of the log
    alarmed: int = 0  # lines in a row that had any
    recorded: dict[str, int] = field(default_factory=dict)  # site -> number of its experts

    def plain(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_plain(cls, values: Mapping[str, Any]) -> "StageState":
        last_eval = values["last_eval"]
        return cls(
            **{
                **values,
                "window": Window(**values["window"]),
                "last_eval": None if last_eval is None else EvalResult(**last_eval),
            }
        )


@dataclass
class RunState:
    """What the stages of a run share."""

    parts: TrainingParts
    accelerator: Accelerator
    trainer: TrainerConfig
    stages: tuple[StagePlan, ...]
    run_dir: Path
    seed: int
    progress: Progress
    metrics: Metrics
    history: list[StageSummary] = field(default_factory=list)  # of the completed stages
    last_checkpoint: Path | None = None  # complete, once `settle` has returned
    writer: Writer = field(default_factory=Writer)
    changed: bool = False  # the configuration may differ from that of the checkpoint, as the user knows
    unsettled: bool = False  # a save was begun and nobody has asked how it went; the same on every rank

    def restore(self, checkpoint: Checkpoint) -> None:
        """Take the weights and the history of a checkpoint. Raises ConfigError if its stages so far were others."""
        with readable_state(checkpoint):
            refuse_other_plan(checkpoint, self.stages, self.seed, changed=self.changed)
            self.history = [StageSummary.from_plain(values) for values in checkpoint.state["history"]]
        self.parts.load_adapter(checkpoint.path)
        self.last_checkpoint = checkpoint.path

    def restore_generators(self, checkpoint: Checkpoint) -> None:
        """Put this rank's random generators back, if there are as many ranks as then."""
        states, rank = checkpoint.state["rng"], self.accelerator.process_index
        if len(states) == self.accelerator.num_processes:
            rng.restore(checkpoint.tensors(f"rng_{rank}"), states[rank])

    def save(
        self,
        plan: StagePlan,
        state: StageState,
        *,
        tensors: Mapping[str, Mapping[str, Tensor]],
        optimizer_numbers: Mapping[str, Any],
        finished: StageSummary | None,
    ) -> Path:
        """Begin a checkpoint: copy what it holds, and let the main process write it while training goes on.

        A save that was begun before is waited for first. Call it on every rank, between steps.

        Args:
            tensors: file name in state/ -> tensors, which may go on changing. Those of the main process are written.
            finished: the stage's summary if it is complete.

        Returns:
            where the checkpoint will be once `settle` has returned.

        Raises:
            LoramoeError: the save before this one could not be written; on every rank.
        """
        self.settle()
        step = plan.first_step + state.done
        generators = gather_object([rng.capture()])
        history = [*self.history, *([finished] if finished else [])]
        if self.accelerator.is_main_process:
            content = {
                "seed": self.seed,
                "stages": [entry.plain() for entry in self.stages],
                "stage": plan.index,
                "stage_done": finished is not None,
                "step": step,
                "history": [summary.plain() for summary in history],
                "stage_state": state.plain(),
                "optimizer": dict(optimizer_numbers),
                "rng": [numbers for _, numbers in generators],
            }
            rngs = {f"rng_{rank}": entry for rank, (entry, _) in enumerate(generators)}
            copies = snapshot({**tensors, **rngs, ADAPTER: self.parts.adapter_tensors()})
            self.writer.start(partial(self._write, step, copies, content, self._protected(state, history)))
        self.last_checkpoint, self.unsettled = checkpoint_path(self.run_dir, step), True
        return self.last_checkpoint

    def settle(self) -> None:
        """Wait until the save in flight, if any, is on the disk. Call it on every rank.

        Raises:
            LoramoeError: it could not be written; on every rank.
        """
        if not self.unsettled:
            return
        self.unsettled = False
        error: Exception | None = None
        if self.accelerator.is_main_process:
            try:
                self.writer.wait()
            except Exception as problem:  # whatever it is, the other ranks must hear of it or they wait for ever
                error = problem
        (text,) = broadcast_object_list([None if error is None else str(error)])
        if text is not None:
            raise error or LoramoeError(text)

    def close(self) -> None:
        """End of the run, by an error too: what is being written is finished, what failed is said. Nothing is shared
        with other ranks, which may be gone."""
        try:
            error = self.writer.close()
            if error is not None:
                self.progress.say(f"warning: {error}")
        finally:
            self.metrics.close()

    def _write(
        self, step: int, copies: dict[str, dict[str, Tensor]], content: dict[str, Any], protected: set[str]
    ) -> None:
        """In the writer's thread: log, checkpoint, rotation. Touches nothing that training changes."""
        self.metrics.sync()
        adapter = copies.pop(ADAPTER)
        write_checkpoint(
            self.run_dir,
            step,
            save_adapter=lambda folder: self.parts.save_adapter(folder, adapter),
            tensors=copies,
            state=content,
        )
        rotate(self.run_dir, step=step, keep=self.trainer.keep, protected=protected)

    def _protected(self, state: StageState, history: list[StageSummary]) -> set[str]:
        """Names of the checkpoints that rotation spares: each completed stage's last, and each stage's best."""
        steps = {state.best_step}
        for plan, summary in zip(self.stages, history, strict=False):
            steps |= {summary.best_step, plan.first_step + summary.steps}
        return {f"step_{step:06d}" for step in steps if step is not None}


@contextmanager
def readable_state(checkpoint: Checkpoint) -> Iterator[None]:
    """Turn what a checkpoint's state lacks, or holds in another form, into a DataError: its checksums only say that it
    is as somebody wrote it."""
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError) as error:
        reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        raise DataError(
            f"checkpoint {checkpoint.path} holds a state that this program did not write ({reason[:200]}); take"
            " another, or init_from= for its weights alone"
        ) from error


PLACE = ("name", "index", "first_step")  # what a checkpoint cannot do without


def refuse_other_plan(checkpoint: Checkpoint, stages: tuple[StagePlan, ...], seed: int, *, changed: bool) -> None:
    """Raise ConfigError unless the stages up to the checkpoint's own, and the seed, are what they were.

    Args:
        changed: the seed may be another, as may all of the stages but their places.
    """
    stored, index = checkpoint.state["stages"], checkpoint.state["stage"]
    cure = "set it back to resume, or use init_from to start from its weights"
    if not changed and checkpoint.state["seed"] != seed:
        raise ConfigError(f"seed is {seed}, but checkpoint {checkpoint.path} has {checkpoint.state['seed']}; {cure}")
    if index >= len(stages):
        raise ConfigError(
            f"trainer.stages has {len(stages)} stages, but checkpoint {checkpoint.path} is of stage {index + 1} "
            f"({stored[index]['name']}); {cure}"
        )
    for before, now in zip(stored[: index + 1], [plan.plain() for plan in stages[: index + 1]], strict=True):
        for key, value in before.items():
            if now.get(key) != value and (not changed or key in PLACE):
                raise ConfigError(
                    f"stage {before['name']} has {key}={now.get(key)}, but checkpoint {checkpoint.path} has {value}; "
                    f"{cure}"
                )
    done = checkpoint.state["stage_state"]["done"]
    if not checkpoint.state["stage_done"] and done > stages[index].steps:
        raise ConfigError(
            f"stage {stages[index].name} has {stages[index].steps} steps, but checkpoint {checkpoint.path} has taken "
            f"{done} of it; {cure}"
        )
