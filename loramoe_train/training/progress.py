"""What a person sees while a run trains: a bar on a terminal, one line per logging step anywhere else."""

from types import TracebackType
from typing import TYPE_CHECKING, Any

from loramoe_train.training.stages import StagePlan

if TYPE_CHECKING:
    from rich.console import Console


class Progress:
    """Context manager. Without a console it says nothing (all ranks but the first)."""

    def __init__(self, console: "Console | None") -> None:
        self._console = console
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> "Progress":
        if self._console is not None and self._console.is_terminal:
            from rich import progress

            self._bar = progress.Progress(
                progress.TextColumn("{task.description}"),
                progress.BarColumn(),
                progress.MofNCompleteColumn(),
                progress.TextColumn("{task.fields[facts]}"),
                progress.TimeRemainingColumn(),
                console=self._console,
            )
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def start_stage(self, plan: StagePlan, done: int) -> None:
        trains = " + ".join(plan.train)
        self.say(f"stage {plan.name}: {plan.steps} steps, trains {trains}, routing {plan.routing}")
        if self._bar is not None:
            self._task = self._bar.add_task(plan.name, total=plan.steps, completed=done, facts="")

    def step(self, plan: StagePlan, done: int, loss: float, tokens_per_second: float, memory: float) -> None:
        """After every step; draws on a terminal only."""
        if self._bar is not None:
            facts = f"loss {loss:.4f}  {tokens_per_second:,.0f} tokens/s  {memory:.1f} GiB"
            self._bar.update(self._task, completed=done, facts=facts)

    def logged(self, plan: StagePlan, done: int, loss: float, tokens_per_second: float, memory: float) -> None:
        """After every `train` line of the log; a line where there is no terminal."""
        if self._bar is None:
            left = (plan.steps - done) / max(done, 1)
            self.say(
                f"{plan.name} {done}/{plan.steps} ({1 / (1 + left):.0%})  loss {loss:.4f}  "
                f"{tokens_per_second:,.0f} tokens/s  {memory:.1f} GiB"
            )

    def say(self, text: Any) -> None:
        """Print a line or a table above the bar."""
        if self._console is not None:
            self._console.print(text, highlight=False, markup=False, soft_wrap=isinstance(text, str))
