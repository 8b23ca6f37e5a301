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
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from loramoe_train.data.batch import MixedBatch, to_device
from loramoe_train.schema.trainer import TrainerConfig
from loramoe_train.training.aux_terms import AuxTerms
from loramoe_train.training.loss import LossHead, Targets, sum_by_task, targets
from loramoe_train.training.optim import halts_on_device
from loramoe_train.training.outcome import Numbers, Reader, Unread
from loramoe_train.training.parts import TrainingParts
from loramoe_train.training.rng import seed_everything, seed_for
from loramoe_train.training.routing_stats import RoutingStats
from loramoe_train.training.stages import StagePlan


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
        skipped: int = 0,
    ) -> None:
        """
        Args:
            wrapped: the model or its data-parallel wrapper.
            before_update: sees the gradients of each step.
            skipped: how many steps of the stage were left out already.
        """
        self.parts, self.accelerator, self.trainer, self.plan = parts, accelerator, trainer, plan
        self.wrapped, self.optimizer, self.head, self.routing_stats = wrapped, optimizer, head, routing_stats
        self.seed, self.anchors, self.before_update = seed, anchors, before_update
        self.aux = AuxTerms([parts.aux[name] for name in plan.aux_losses], accelerator)
        self.recorded: dict[str, int] = {}  # site -> number of experts, from the latest step
        self._mask_dtype = mask_dtype(parts.model, trainer)
        self._reader = Reader(
            accelerator,
            plan,
            run_dir,
            parts.task_names,
            self.aux.names,
            tuple(group["name"] for group in optimizer.param_groups),
            may_skip=trainer.max_skipped_steps - skipped,
        )
        # the host reads a step late, so the device counts by itself how many were bad, and halts once they are too many
        self._bad = torch.full((), float(skipped), device=accelerator.device)
        self._halted = torch.zeros((), device=accelerator.device)  # 1 in a step that must not count
        self._halts_itself = halts_on_device(optimizer, self._halted)

    def __call__(self, step: int, batches: Sequence[MixedBatch], *, stop: tuple[bool, bool] = (False, False)) -> Unread:
        """Queue optimizer step `step` of the stage on this rank's micro-batches.

        Args:
            stop: whether this rank was (interrupted, signalled); travels with the step's own all-reduce.

        Returns:
            the step's numbers, not yet read. Until they are, nothing here waits for the device.

        Where the numbers turn out not to be finite, or no token of the step is supervised, the optimizer has not moved:
        weights and moments are those before the step. If there are more such steps than `trainer.max_skipped_steps`,
        further ones leave them alone too, and reading the numbers raises.
        """
        device = self.accelerator.device
        wanted = [targets(batch) for batch in batches]
        task_tokens_T, tokens = self._count(batches, wanted)
        on_device = [(batch.to(device), made.to(device)) for batch, made in zip(batches, wanted, strict=True)]
        step_statistics = None
        if self.aux.needs_extra_pass(len(on_device)):
            step_statistics = self._first_pass(step, [batch for batch, _ in on_device])
        scale = self.accelerator.num_processes / task_tokens_T.sum()  # float64 on the device
        sums = torch.zeros(len(task_tokens_T) + len(self.aux.names), dtype=torch.float64, device=device)
        for index, (batch, made) in enumerate(on_device):
            last = index == len(on_device) - 1
            facts = batch.tokens()
            # the context outlives backward: gradient checkpointing runs the layers once more in there
            with self._gradients_shared(last), self.parts.context.open(facts) as records:
                losses_R = self._forward(step, index, batch, made)
                loss = losses_R.sum() * scale.to(losses_R.dtype)
                aux, raw_J = self.aux.contributions(
                    records, facts, step_statistics=step_statistics, micro_batches=len(on_device)
                )
                sums += torch.cat([sum_by_task(losses_R, made.tasks_R, len(task_tokens_T)), raw_J])
                self.routing_stats.add(records, facts)
                self.recorded = {site: routing.weights_NE.shape[-1] for site, routing in records.items()}
                self.accelerator.backward(loss if aux is None else loss + aux)
        anchor = self._pull_to_anchors()
        norms_G = self._gradient_norms()
        shared = self._shared(sums, stop)
        task_sums_T, aux_J, stop_2 = shared.split([len(task_tokens_T), len(self.aux.names), 2])
        numbers = Numbers(task_sums_T, aux_J, stop_2, task_tokens_T, tokens, anchor, norms_G.double())
        packed = numbers.packed()
        bad = ~(torch.isfinite(packed).all() & torch.isfinite(scale))
        self._bad += bad
        self._halted.copy_(bad | (self._bad > self.trainer.max_skipped_steps))
        examples = [name for batch in batches for name in batch.example_ids]
        unread = Unread(self._reader, step, numbers, packed, examples)
        self.before_update(step)
        if self._halts_itself or unread.read().skipped is None:
            if self.trainer.clip_norm is not None:
                clip_grads_with_norm_(self._trained(), self.trainer.clip_norm, norms_G.norm())
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return unread

    def _count(self, batches: Sequence[MixedBatch], wanted: Sequence[Targets]) -> tuple[Tensor, Tensor]:
        """(T,) supervised tokens by task, and the number of real tokens, of the whole step: float64 on the device."""
        counts = torch.zeros(len(self.parts.task_names) + 1, dtype=torch.float64)
        for batch, made in zip(batches, wanted, strict=True):
            counts[:-1] += torch.bincount(made.tasks_R, minlength=len(counts) - 1)
            counts[-1] += batch.valid.sum()
        counts = self._added_up(to_device(counts, self.accelerator.device))
        return counts[:-1], counts[-1]

    def _shared(self, sums: Tensor, stop: tuple[bool, bool]) -> Tensor:
        """The sums and the stop flags of all ranks, in one all-reduce."""
        flags = torch.tensor([float(flag) for flag in stop], dtype=torch.float64)
        return self._added_up(torch.cat([sums, to_device(flags, sums.device)]))

    def _added_up(self, values: Tensor) -> Tensor:
        return values if self.accelerator.num_processes == 1 else self.accelerator.reduce(values, reduction="sum")

    def _gradients_shared(self, last: bool) -> AbstractContextManager:
        return nullcontext() if last else self.accelerator.no_sync(self.wrapped)

    def _seed(self, step: int, index: int) -> None:
        place = (self.seed, self.plan.name, step, self.accelerator.process_index, index)
        seed_everything(seed_for(*place))

    def _forward(self, step: int, index: int, batch: MixedBatch, wanted: Targets) -> Tensor:
        """(R,) losses with gradient."""
        self._seed(step, index)
        with autocast(self.accelerator.device, self.trainer):
            return self.head.losses(self.wrapped, model_inputs(batch, self._mask_dtype), wanted)

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
