"""Cross-entropy of the supervised positions alone, without ever holding a float32 matrix of all logits.

Position s predicts token s + 1, so with labels y and logits z the loss of a batch is

    sum over supervised (b, s + 1) of  logsumexp(z[b, s]) - z[b, s, y[b, s + 1]]          (natural log; nats)

Only rows that carry loss go through the LM head, and only a chunk of them at a time: the head's input is caught, its
rows are picked, the head is run chunk by chunk, and each chunk's gradient with respect to its input is taken at once,
while its logits are still there. Nothing of size rows x vocabulary outlives its chunk, and the head runs once, as it
would without chunks. (The idea of fusing head and loss: Liger Kernel, arXiv:2410.10989.)

Legend: B rows of a batch, S positions, R supervised positions of a micro-batch, D hidden size, V vocabulary, T tasks.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from loramoe_train.data.batch import IGNORE, MixedBatch, to_device

CHUNK_ELEMENTS = 2**23  # logits held at a time: 32 MiB in float32

Project = Callable[[Tensor], Tensor]


def predicting(batch: MixedBatch) -> Tensor:
    """(B, S) bool: positions whose next token is supervised and belongs to the same example."""
    keep_BS = torch.zeros_like(batch.labels, dtype=torch.bool)
    same_example = batch.segment_ids[:, 1:] == batch.segment_ids[:, :-1]
    keep_BS[:, :-1] = (batch.labels[:, 1:] != IGNORE) & same_example
    return keep_BS


@dataclass(frozen=True)
class Targets:
    """What a micro-batch is to predict, and where. Made once and on the host: a device would have to be waited for."""

    rows_R: Tensor  # int64: position b * S + s, whose next token carries loss
    labels_R: Tensor  # int64: that token
    tasks_R: Tensor  # int64: its task

    def to(self, device: torch.device) -> "Targets":
        return Targets(*(to_device(field, device) for field in (self.rows_R, self.labels_R, self.tasks_R)))


def targets(batch: MixedBatch) -> Targets:
    """The supervised tokens of a batch that is still on the host."""
    rows_R = predicting(batch).flatten().nonzero().squeeze(1)
    # the next position is in the same row: a row's last one never predicts
    return Targets(rows_R, batch.labels.flatten()[rows_R + 1], batch.task_ids.flatten()[rows_R + 1])


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Losses (R,) float32 of rows (R, D) under `project`: (r, D) -> (r, V), a chunk of rows at a time."""

    @staticmethod
    def forward(ctx: Any, rows_RD: Tensor, labels_R: Tensor, project: Project, chunk_rows: int) -> Tensor:
        wanted = ctx.needs_input_grad[0]
        losses, gradients = [], []
        for rows, labels in zip(rows_RD.split(chunk_rows), labels_R.split(chunk_rows), strict=True):
            with torch.set_grad_enabled(wanted):
                rows = rows.detach().requires_grad_(wanted)
                logits = project(rows)
                # float32: log-sum-exp in bfloat16 loses the loss of confident tokens (float64 stays as it is)
                precise = logits.to(torch.promote_types(logits.dtype, torch.float32))
                part = F.cross_entropy(precise, labels, reduction="none")
                if wanted:
                    gradients.append(torch.autograd.grad(part.sum(), rows)[0])
            losses.append(part.detach())
        if wanted:
            ctx.save_for_backward(torch.cat(gradients))
        return torch.cat(losses)

    @staticmethod
    def backward(ctx: Any, grad_R: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient_RD,) = ctx.saved_tensors
        # every row's loss depends on that row alone, so the chain rule is one factor per row
        return gradient_RD * grad_R[:, None].to(gradient_RD.dtype), None, None, None


def row_losses(rows_RD: Tensor, labels_R: Tensor, project: Project, vocabulary: int) -> Tensor:
    """(R,) losses in nats, float32 (float64 for float64 logits). `project` must not hold anything that trains."""
    if not len(rows_RD):
        return rows_RD.sum(dim=-1).to(torch.promote_types(rows_RD.dtype, torch.float32))  # no loss, but the same graph
    return _ChunkedCrossEntropy.apply(rows_RD, labels_R, project, max(16, CHUNK_ELEMENTS // vocabulary))


class LossHead:
    """How one model is asked for the losses of its supervised positions; decided once, by looking and by trying.

    `head`: its output layer, where a trial shows that nothing but that layer stands between its input and the logits
    (no soft cap, no logit scale), so that its input may be caught and run in chunks. `keeps_rows`: the forward takes
    `logits_to_keep`, which other models are asked with; transformers' boolean indexing then waits for the device.
    """

    def __init__(self, model: nn.Module) -> None:
        self.keeps_rows = "logits_to_keep" in inspect.signature(model.forward).parameters
        self.head: nn.Module | None = None
        head = getattr(model, "get_output_embeddings", lambda: None)()
        if head is not None and not any(p.requires_grad for p in head.parameters()):
            self.head = head if self._is_plain(model, head) else None

    def _is_plain(self, model: nn.Module, head: nn.Module) -> bool:
        device = next(model.parameters()).device
        ids_BS = torch.arange(4, device=device)[None]
        training = model.training
        model.eval()
        try:
            with torch.no_grad():
                logits = model(input_ids=ids_BS, use_cache=False).logits
                caught: list[Tensor] = []
                with self._caught(head, caught):
                    model(input_ids=ids_BS, use_cache=False)
                if len(caught) != 1 or caught[0].dim() != 3:
                    return False
                return torch.equal(head(caught[0]), logits)
        finally:
            model.train(training)

    @staticmethod
    def _caught(head: nn.Module, caught: list[Tensor]) -> "torch.utils.hooks.RemovableHandle":
        def take(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            caught.append(args[0])
            return (args[0][:0], *args[1:])  # the head itself then has nothing to do

        return head.register_forward_pre_hook(take)

    def losses(self, model: nn.Module, inputs: dict[str, Tensor], wanted: Targets) -> Tensor:
        """(R,) losses of the wanted positions, with gradient. `model` may be a data-parallel wrapper of ours."""
        if self.head is not None:
            caught: list[Tensor] = []
            with self._caught(self.head, caught):
                vocabulary = model(**inputs, use_cache=False).logits.shape[-1]
            rows_RD = caught[0].flatten(0, 1).index_select(0, wanted.rows_R)
            return row_losses(rows_RD, wanted.labels_R, self.head, vocabulary)
        if self.keeps_rows:
            keep_BS = torch.zeros_like(inputs["input_ids"], dtype=torch.bool)
            keep_BS.view(-1).index_fill_(0, wanted.rows_R, True)
            logits_RV = model(**inputs, use_cache=False, logits_to_keep=keep_BS).logits
        else:
            logits_RV = model(**inputs, use_cache=False).logits.flatten(0, 1).index_select(0, wanted.rows_R)
        return row_losses(logits_RV, wanted.labels_R, lambda rows: rows, logits_RV.shape[-1])

    def run_without_logits(self, model: nn.Module, inputs: dict[str, Tensor]) -> None:
        """Run the layers for what they record; the LM head gets nothing to do where the model allows it."""
        if self.head is not None:
            with self._caught(self.head, []):
                model(**inputs, use_cache=False)
        elif self.keeps_rows:
            none = torch.zeros(0, dtype=torch.long, device=inputs["input_ids"].device)
            model(**inputs, use_cache=False, logits_to_keep=none)
        else:
            model(**inputs, use_cache=False)


def sum_by_task(losses_R: Tensor, tasks_R: Tensor, num_tasks: int) -> Tensor:
    """(T,) float64 sums of losses, without gradient."""
    sums_T = torch.zeros(num_tasks, dtype=torch.float64, device=losses_R.device)
    return sums_T.index_add_(0, tasks_R, losses_R.detach().double())
