"""One optimizer step, exact under gradient accumulation and data parallelism.

    gradient of   sum of token losses / supervised tokens of the whole step  +  sum_j weight_j * aux_j
                  +  anchor * sum over experts ||theta - theta_stage_start||^2

whatever the number of micro-batches and ranks. Data parallelism averages gradients over ranks; so each rank multiplies
its local share by the number of ranks. A term of scope `step` needs the statistics of micro-batches yet to come: a
first pass without gradient collects them, from the same random numbers, so dropout draws the same masks twice.

Legend: B rows, S positions, R supervised positions, T tasks, J auxiliary terms, G groups of parameters.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from math import isfinite
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from loramoe_train.data.batch import MixedBatch
from loramoe_train.errors import DataError, DivergedError
from loramoe_train.files import write_json
from loramoe_train.schema.trainer import TrainerConfig
from loramoe_train.training.aux_terms import AuxTerms
from loramoe_train.training.loss import LossHead, predicting, sum_by_task, targets
from loramoe_train.training.parts import TrainingParts
from loramoe_train.training.rng import seed_everything, seed_for
from loramoe_train.training.routing_stats import RoutingStats
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

    @property
    def loss(self) -> float:
        """Nats per supervised token."""
        return sum(self.task_sums) / sum(self.task_tokens)


def model_inputs(batch: MixedBatch, mask_dtype: torch.dtype) -> dict[str, Tensor]:
    """What the model's forward gets for a batch, apart from how many logits to keep."""
    if batch.packed:
        from loramoe_train.data.masks import block_causal_mask

        mask = block_causal_mask(batch.segment_ids, mask_dtype)
        return {"input_ids": batch.input_ids, "attention_mask": mask, "position_ids": batch.position_ids}
    mask_BS = batch.valid.clone()
    # a row that is padding throughout evens out the ranks; attention over nothing would be NaN, so it sees one token
    mask_BS[:, 0] |= ~batch.valid.any(dim=1)
    return {"input_ids": batch.input_ids, "attention_mask": mask_BS.long()}


def autocast(device: torch.device, trainer: TrainerConfig) -> AbstractContextManager:
    """Mixed precision around a forward pass.

    Not accelerate's: that one casts all logits to float32 on the way out, which is what the chunked loss avoids.
    """
    if trainer.mixed_precision == "no":
        return nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)


def mask_dtype(model: nn.Module, trainer: TrainerConfig) -> torch.dtype:
    """The dtype that attention runs in, which an additive mask has to share."""
    return torch.bfloat16 if trainer.mixed_precision == "bf16" else getattr(model, "dtype", torch.float32)


class TrainingStep:
    """Everything that the optimizer steps of one stage share."""

    def __init__(
        self,
        parts: TrainingParts,
        wrapped: nn.Module,
        accelerator: Accelerator,
        trainer: TrainerConfig,
        plan: StagePlan,
        optimizer: torch.optim.Optimizer,
        head: LossHead,
        routing_stats: RoutingStats,
        *,
        seed: int,
        run_dir: Path,
        anchors: Mapping[str, Tensor],
        before_update: Callable[[int], None] = lambda step: None,
    ) -> None:
        """`wrapped` is the model or its data-parallel wrapper; `before_update` sees the gradients of each step."""
        self.parts, self.accelerator, self.trainer, self.plan = parts, accelerator, trainer, plan
        self.wrapped, self.optimizer, self.head, self.routing_stats = wrapped, optimizer, head, routing_stats
        self.seed, self.run_dir, self.anchors, self.before_update = seed, run_dir, anchors, before_update
        self.aux = AuxTerms([parts.aux[name] for name in plan.aux_losses], accelerator)
        self.recorded: dict[str, int] = {}  # site -> number of experts, from the latest step
        self._mask_dtype = mask_dtype(parts.model, trainer)

    def __call__(
        self, step: int, batches: Sequence[MixedBatch], *, stop: tuple[bool, bool] = (False, False)
    ) -> StepResult:
        """Run optimizer step `step` of the stage on this rank's micro-batches.

        Args:
            stop: whether this rank was (interrupted, signalled); travels with the step's own all-reduce.

        Raises:
            DataError: no token of the step is supervised.
            DivergedError: a loss or gradient is not finite; the optimizer has not moved.
        """
        task_tokens, tokens = self._count(batches)
        on_device = [batch.to(self.accelerator.device) for batch in batches]
        step_statistics = self._first_pass(step, on_device) if self.aux.needs_extra_pass(len(on_device)) else None
        scale = self.accelerator.num_processes / sum(task_tokens)
        sums = torch.zeros(len(task_tokens) + len(self.aux.names), dtype=torch.float64, device=self.accelerator.device)
        for index, batch in enumerate(on_device):
            last = index == len(on_device) - 1
            facts = batch.tokens()
            # the context outlives backward: gradient checkpointing runs the layers once more in there
            with self._gradients_shared(last), self.parts.context.open(facts) as records:
                losses_R, tasks_R = self._forward(step, index, batch)
                loss = losses_R.sum() * scale
                aux, raw_J = self.aux.contributions(
                    records, facts, step_statistics=step_statistics, micro_batches=len(on_device)
                )
                sums += torch.cat([sum_by_task(losses_R, tasks_R, len(task_tokens)), raw_J])
                self.routing_stats.add(records, facts)
                self.recorded = {site: routing.weights_NE.shape[-1] for site, routing in records.items()}
                self.accelerator.backward(loss if aux is None else loss + aux)
        anchor = self._pull_to_anchors()
        norms_G = self._gradient_norms()
        result = self._result(sums, task_tokens, tokens, anchor, norms_G, stop)
        self._check_finite(step, batches, result)
        self.before_update(step)
        if self.trainer.clip_norm is not None:
            clip_grads_with_norm_(self._trained(), self.trainer.clip_norm, norms_G.norm())
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return result

    def _count(self, batches: Sequence[MixedBatch]) -> tuple[tuple[float, ...], int]:
        """Supervised tokens by task, and real tokens, of the whole step."""
        counts = torch.zeros(len(self.parts.task_names) + 1, dtype=torch.float64)
        for batch in batches:
            _, tasks_R = targets(batch, predicting(batch))
            counts[:-1] += torch.bincount(tasks_R, minlength=len(counts) - 1)
            counts[-1] += batch.valid.sum()
        if self.accelerator.num_processes > 1:
            counts = self.accelerator.reduce(counts.to(self.accelerator.device), reduction="sum").cpu()
        *task_tokens, tokens = counts.tolist()
        if not sum(task_tokens):
            names = [name for batch in batches for name in batch.example_ids][:EXAMPLES_IN_MESSAGE]
            raise DataError(f"no token of the step carries loss; examples: {', '.join(names)}")
        return tuple(task_tokens), int(tokens)

    def _gradients_shared(self, last: bool) -> AbstractContextManager:
        return nullcontext() if last else self.accelerator.no_sync(self.wrapped)

    def _seed(self, step: int, index: int) -> None:
        place = (self.seed, self.plan.name, step, self.accelerator.process_index, index)
        seed_everything(seed_for(*place))

    def _forward(self, step: int, index: int, batch: MixedBatch) -> tuple[Tensor, Tensor]:
        """(R,) losses with gradient and (R,) task indices."""
        keep_BS = predicting(batch)
        labels_R, tasks_R = targets(batch, keep_BS)
        self._seed(step, index)
        with autocast(self.accelerator.device, self.trainer):
            inputs = model_inputs(batch, self._mask_dtype)
            return self.head.losses(self.wrapped, inputs, keep_BS, labels_R), tasks_R

    @torch.no_grad()
    def _first_pass(self, step: int, batches: Sequence[MixedBatch]) -> tuple[Tensor, ...]:
        """Everybody's statistics over the whole step. The LM head is asked for no row at all."""
        total: tuple[Tensor, ...] | None = None
        for index, batch in enumerate(batches):
            facts = batch.tokens()
            with self.parts.context.open(facts) as records:
                self._seed(step, index)
                with autocast(self.accelerator.device, self.trainer):
                    self.head.run_without_logits(self.parts.model, model_inputs(batch, self._mask_dtype))
                own = self.aux.statistics(records, facts)
            total = own if total is None else tuple(a + b for a, b in zip(total, own, strict=True))
        return self.aux.reduce(total)

    @torch.no_grad()
    def _pull_to_anchors(self) -> Tensor:
        """Add the preservation term's gradient, 2 * anchor * (theta - theta_0), once per step; returns its raw value.

        By hand and after backward: every rank holds the same parameters, so this is exact as it stands.
        """
        total = torch.zeros((), dtype=torch.float64, device=self.accelerator.device)
        for name, start in self.anchors.items():
            parameter = self.parts.groups["experts"][name]
            difference = parameter - start
            total += difference.double().square().sum()
            if parameter.grad is not None:
                parameter.grad.add_(difference, alpha=2.0 * self.plan.anchor)
        return total

    def _trained(self, group: str | None = None) -> list[nn.Parameter]:
        groups = [entry for entry in self.optimizer.param_groups if group in (None, entry["name"])]
        return [parameter for entry in groups for parameter in entry["params"]]

    def _gradient_norms(self) -> Tensor:
        """(G,) float32 norms, one per optimizer group."""
        norms = []
        for group in self.optimizer.param_groups:
            gradients = [parameter.grad for parameter in group["params"] if parameter.grad is not None]
            norms.append(get_total_norm(gradients) if gradients else torch.zeros((), device=self.accelerator.device))
        return torch.stack(norms)

    def _result(
        self,
        sums: Tensor,
        task_tokens: tuple[float, ...],
        tokens: int,
        anchor: Tensor,
        norms_G: Tensor,
        stop: tuple[bool, bool],
    ) -> StepResult:
        """Share the sums and the stop flags in one all-reduce, and wait for the device once."""
        flags = torch.tensor([float(flag) for flag in stop], dtype=torch.float64, device=sums.device)
        shared = torch.cat([sums, flags])
        if self.accelerator.num_processes > 1:
            shared = self.accelerator.reduce(shared, reduction="sum")
        values = torch.cat([shared, anchor[None], norms_G.double()]).tolist()
        tasks, terms = len(task_tokens), len(self.aux.names)
        interrupted, signalled, anchor_value, *norms = values[tasks + terms :]
        return StepResult(
            task_sums=tuple(values[:tasks]),
            task_tokens=task_tokens,
            aux=dict(zip(self.aux.names, values[tasks : tasks + terms], strict=True)),
            anchor=anchor_value,
            grad_norms=dict(zip((g["name"] for g in self.optimizer.param_groups), norms, strict=True)),
            tokens=tokens,
            interrupted=interrupted > 0,
            signalled=signalled > 0,
        )

    def _check_finite(self, step: int, batches: Sequence[MixedBatch], result: StepResult) -> None:
        """Every rank sees the same numbers, so every rank raises, or none."""
        named = {f"loss of task {n}": v for n, v in zip(self.parts.task_names, result.task_sums, strict=True)}
        named |= {f"auxiliary loss {name}": value for name, value in result.aux.items()}
        named |= {"preservation term": result.anchor}
        named |= {f"gradient norm of the {name}": value for name, value in result.grad_norms.items()}
        bad = {name: str(value) for name, value in named.items() if not isfinite(value)}
        if not bad:
            return
        examples = gather_object([name for batch in batches for name in batch.example_ids])
        tasks = [n for n, count in zip(self.parts.task_names, result.task_tokens, strict=True) if count]
        global_step = self.plan.first_step + step + 1
        if self.accelerator.is_main_process:
            write_json(
                self.run_dir / "diverged.json",
                {"stage": self.plan.name, "step": global_step, "not_finite": bad, "tasks": tasks, "examples": examples},
            )
        more = f" and {len(examples) - EXAMPLES_IN_MESSAGE} more" if len(examples) > EXAMPLES_IN_MESSAGE else ""
        raise DivergedError(
            f"stage {self.plan.name}, step {global_step}: {', '.join(f'{k} is {v}' for k, v in bad.items())}; tasks: "
            f"{', '.join(tasks)}; examples: {', '.join(examples[:EXAMPLES_IN_MESSAGE])}{more} (all in diverged.json); "
            f"the last checkpoint is kept; lower trainer.lr or trainer.clip_norm, or look at these examples"
        )
