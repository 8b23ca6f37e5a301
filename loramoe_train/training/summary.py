"""What a run did, stage by stage: for the screen, for results.json and for checkpoints. No torch in here."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class StageSummary:
    """One stage. Losses are nats per supervised token."""

    name: str
    steps: int
    planned_steps: int
    seconds: float  # of its steps, without evaluation and checkpoints
    tokens: int  # real tokens, over all processes
    loss: float | None  # of the last logging window
    task_loss: dict[str, float]
    eval_loss: float | None = None  # at the stage's end
    eval_task_loss: dict[str, float] = field(default_factory=dict)
    best_step: int | None = None  # of the run, where the evaluation loss of this stage was lowest
    best_eval_loss: float | None = None
    stopped_early: bool = False
    warnings: tuple[str, ...] = ()

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0

    def plain(self) -> dict[str, Any]:
        """As JSON would give it back."""
        return {**asdict(self), "warnings": list(self.warnings)}

    @classmethod
    def from_plain(cls, values: dict[str, Any]) -> "StageSummary":
        return cls(**{**values, "warnings": tuple(values["warnings"])})


@dataclass(frozen=True)
class TrainingSummary:
    """A whole run."""

    stages: tuple[StageSummary, ...]
    steps: int  # optimizer steps taken
    last_checkpoint: Path
    best_checkpoint: Path | None  # lowest evaluation loss of the last stage; None without evaluation

    @property
    def seconds(self) -> float:
        return sum(stage.seconds for stage in self.stages)

    @property
    def warnings(self) -> tuple[str, ...]:
        return tuple(f"{stage.name}: {text}" for stage in self.stages for text in stage.warnings)

    def plain(self) -> dict[str, Any]:
        """For results.json."""
        return {
            "steps": self.steps,
            "seconds": self.seconds,
            "stages": [{**stage.plain(), "tokens_per_second": stage.tokens_per_second} for stage in self.stages],
            "last_checkpoint": self.last_checkpoint.name,
            "best_checkpoint": self.best_checkpoint.name if self.best_checkpoint else None,
        }


def stage_table(stages: Sequence[StageSummary]) -> "Table":
    """One row a stage, for a rich console."""
    from rich.table import Table

    table = Table(title="training", title_justify="left")
    for heading in ("stage", "steps", "seconds", "tokens/s", "loss", "eval loss", "best (step)"):
        table.add_column(heading, justify="left" if heading == "stage" else "right")
    for stage in stages:
        early = " early" if stage.stopped_early else ""
        best = "-" if stage.best_step is None else f"{_number(stage.best_eval_loss)} ({stage.best_step})"
        table.add_row(
            stage.name,
            f"{stage.steps}/{stage.planned_steps}{early}",
            f"{stage.seconds:.1f}",
            f"{stage.tokens_per_second:,.0f}",
            _number(stage.loss),
            _number(stage.eval_loss),
            best,
        )
    return table


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
