"""The numbers of an optimizer step, and when the host sees them.

A step ends with one small tensor that holds all its numbers, on the device. Its copy to the host is queued right behind
the step, and nobody waits: the loop reads it (`Unread.read`) after the next step has been queued, or at once where
something follows that needs it, such as a line of the log, an evaluation, a checkpoint or a signal. So host and device
work side by side. What must not wait for the host is decided on the device: once a number is not finite the optimizer
moves no more, in that step or a later one, and the error follows when the number is read (`step.py`). Where
`trainer.max_skipped_steps` allows it, such a step is left out instead, and training goes on.

Legend: T tasks, J auxiliary terms, G groups of parameters.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from loramoe_train.errors import DataError, DivergedError
from loramoe_train.files import write_json
from loramoe_train.training.stages import StagePlan

EXAMPLES_IN_MESSAGE = 8


@dataclass(frozen=True)
class StepResult:
    """Numbers of one optimizer step over all ranks, on the host."""

    task_sums: tuple[float, ...]  # nats, by task of the mixture
    task_tokens: tuple[float, ...]  # supervised tokens, by task
    aux: Mapping[str, float]  # unweighted
    anchor: float  # unweighted: sum ||theta - theta_stage_start||^2
    grad_norms: Mapping[str, float]  # by group, before clipping
    tokens: int  # real tokens, supervised or not
    interrupted: bool  # Ctrl-C on some rank
    signalled: bool  # another stop signal on some rank
    skipped: Mapping[str, Any] | None = None  # why the step was left out, and what was in it; None: it was taken

    @property
    def loss(self) -> float:
        """Nats per supervised token."""
        return sum(self.task_sums) / sum(self.task_tokens)


@dataclass(frozen=True)
class Numbers:
    """The same on the device, where ranks have been added up already. All float64."""

    task_sums_T: Tensor
    aux_J: Tensor
    stop_2: Tensor  # how many ranks were (interrupted, signalled)
    task_tokens_T: Tensor
    tokens: Tensor  # scalar
    anchor: Tensor  # scalar
    norms_G: Tensor

    def packed(self) -> Tensor:
        return torch.cat([field.reshape(-1) for field in vars(self).values()])

    def sizes(self) -> tuple[int, ...]:
        return tuple(field.numel() for field in vars(self).values())


@dataclass
class Reader:
    """What the steps of one stage share for turning numbers into a result or an error."""

    accelerator: Accelerator
    plan: StagePlan
    run_dir: Path
    task_names: tuple[str, ...]
    aux_names: tuple[str, ...]
    groups: tuple[str, ...]
    may_skip: int = 0  # how many more steps of the stage may be left out

    def result(self, sizes: Sequence[int], values: list[float]) -> StepResult:
        parts = []
        for size in sizes:
            parts.append(tuple(values[:size]))
            values = values[size:]
        task_sums, aux, (interrupted, signalled), task_tokens, (tokens,), (anchor,), norms = parts
        return StepResult(
            task_sums=task_sums,
            task_tokens=task_tokens,
            aux=dict(zip(self.aux_names, aux, strict=True)),
            anchor=anchor,
            grad_norms=dict(zip(self.groups, norms, strict=True)),
            tokens=int(tokens),
            interrupted=interrupted > 0,
            signalled=signalled > 0,
        )

    def check(self, step: int, result: StepResult, own_examples: Sequence[str]) -> StepResult:
        """The result of a step that was taken, or may be left out; else raise. Every rank sees the same numbers, so
        every rank raises, or none."""
        if not sum(result.task_tokens):
            names = ", ".join(own_examples[:EXAMPLES_IN_MESSAGE])
            raise DataError(f"no token of the step carries loss; examples: {names}")
        named = {f"loss of task {n}": v for n, v in zip(self.task_names, result.task_sums, strict=True)}
        named |= {f"auxiliary loss {name}": value for name, value in result.aux.items()}
        named |= {"preservation term": result.anchor}
        named |= {f"gradient norm of the {name}": value for name, value in result.grad_norms.items()}
        bad = {name: str(value) for name, value in named.items() if not isfinite(value)}
        if not bad:
            return result
        examples = gather_object(list(own_examples))
        tasks = [n for n, count in zip(self.task_names, result.task_tokens, strict=True) if count]
        global_step = self.plan.first_step + step + 1
        report = {"not_finite": bad, "tasks": tasks, "examples": examples}
        if self.may_skip > 0:
            self.may_skip -= 1
            return replace(result, skipped={"step": global_step, **report})
        if self.accelerator.is_main_process:
            write_json(self.run_dir / "diverged.json", {"stage": self.plan.name, "step": global_step, **report})
        more = f" and {len(examples) - EXAMPLES_IN_MESSAGE} more" if len(examples) > EXAMPLES_IN_MESSAGE else ""
        raise DivergedError(
            f"stage {self.plan.name}, step {global_step}: {', '.join(f'{k} is {v}' for k, v in bad.items())}; tasks: "
            f"{', '.join(tasks)}; examples: {', '.join(examples[:EXAMPLES_IN_MESSAGE])}{more} (all in diverged.json); "
            f"the last checkpoint is kept; lower trainer.lr or trainer.clip_norm, look at these examples, or leave "
            f"such steps out with trainer.max_skipped_steps"
        )


class Unread:
    """A step that has been queued; its numbers are on their way to the host."""

    def __init__(self, reader: Reader, step: int, numbers: Numbers, packed: Tensor, examples: Sequence[str]) -> None:
        """`step` counts within the stage; `examples` are this rank's, for the message of an error."""
        self._reader, self._step, self._sizes, self._examples = reader, step, numbers.sizes(), examples
        self._values = packed.to("cpu", non_blocking=True)
        self._result: StepResult | None = None  # once read
        self._arrived: torch.Event | None = None
        if packed.device.type != "cpu":
            # an event, for waiting on the stream would also wait for the steps queued since
            self._arrived = torch.Event(device=packed.device)
            self._arrived.record()

    def read(self) -> StepResult:
        """Wait for this step, and for no later one. Call it on every rank, for the same steps in the same order.

        Raises:
            DataError: no token of the step is supervised.
            DivergedError: a loss or gradient is not finite.
        """
        if self._arrived is not None:
            self._arrived.synchronize()
        if self._result is None:
            result = self._reader.result(self._sizes, self._values.tolist())
            self._result = self._reader.check(self._step, result, self._examples)
        return self._result
