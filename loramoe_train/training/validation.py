"""Evaluation loss per task: nats per supervised token on held-out examples, under the stage's routing mode."""

from collections.abc import Callable
from dataclasses import dataclass
from math import isfinite
from typing import Any

import torch
from accelerate import Accelerator

from loramoe_train.errors import DataError
from loramoe_train.schema.trainer import TrainerConfig
from loramoe_train.training.loss import LossHead, targets
from loramoe_train.training.memory import memory_errors
from loramoe_train.training.metrics import losses
from loramoe_train.training.parts import TrainingParts
from loramoe_train.training.routing_stats import RoutingStats
from loramoe_train.training.sharding import is_shared_out
from loramoe_train.training.step import autocast, mask_dtype, model_inputs


@dataclass(frozen=True)
class EvalResult:
    """Nats per supervised token: over all tokens, and by task."""

    loss: float
    task_loss: dict[str, float]

    def plain(self) -> dict[str, Any]:
        return {"loss": self.loss, "task_loss": self.task_loss}


def evaluate(
    parts: TrainingParts,
    accelerator: Accelerator,
    trainer: TrainerConfig,
    head: LossHead,
    *,
    routing_stats: RoutingStats,
    stop_requested: Callable[[], bool] = lambda: False,
) -> EvalResult | None:
    """Loss over `parts.validation`; every rank takes its share of the batches and all get the same result.

    The model's mode is what it was before, afterwards. `routing_stats` is given what this rank's routers decide, as at
    inference. `stop_requested` is asked between tasks, on every rank alike.

    Returns:
        None if the evaluation was given up because somebody asked to stop.

    Raises:
        DataError: no token of any batch is supervised.
    """
    sums: dict[str, tuple[float, float]] = {}
    training = parts.model.training
    # a base that is shared out takes all ranks for every pass, so each of them runs the others' batches as well
    together = is_shared_out(parts.model)
    parts.model.eval()
    try:
        for task, batches in parts.validation.items():
            if stop_requested():
                return None
            total = torch.zeros(2, dtype=torch.float64, device=accelerator.device)
            for index, batch in enumerate(batches):
                own = index % accelerator.num_processes == accelerator.process_index
                if not own and not together:
                    continue
                wanted, batch = targets(batch).to(accelerator.device), batch.to(accelerator.device)
                facts = batch.tokens()
                with (
                    torch.no_grad(),
                    memory_errors("the evaluation of the loss"),
                    parts.context.open(facts) as records,
                ):
                    inputs = model_inputs(batch, mask_dtype(parts.model, trainer))
                    with autocast(accelerator.device, trainer):
                        losses_R = head.losses(parts.model, inputs, wanted)
                    if own:  # outside of autocast, which would add up in bfloat16
                        routing_stats.add(records, facts)
                if own:
                    total[0] += losses_R.double().sum()
                    total[1] += len(losses_R)
            if accelerator.num_processes > 1:
                total = accelerator.reduce(total, reduction="sum")
            sums[task] = tuple(total.tolist())
    finally:
        parts.model.train(training)
    found = losses(sums)
    if found["loss"] is None:
        raise DataError(f"no token of the evaluation carries loss (tasks: {', '.join(sums)}); see data.supervise")
    return EvalResult(**found)


def improves(loss: float, best: float | None, min_delta: float) -> bool:
    """Whether a loss beats the best by more than `min_delta`; one that is not finite never does."""
    return isfinite(loss) and (best is None or loss < best - min_delta)
