"""The chunked loss of supervised rows against the full matrix of logits, in float64."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from loramoe_train.training import loss as loss_module
from loramoe_train.training.loss import LossHead, predicting, row_losses, sum_by_task, targets
from tests.conftest import make_llama
from tests.training.harness import VOCABULARY, make_batch

torch.manual_seed(0)


def full_loss(model: nn.Module, batch, weights_R: torch.Tensor) -> torch.Tensor:
    """All logits, one position at a time."""
    logits = model(input_ids=batch.input_ids, attention_mask=batch.valid.long(), use_cache=False).logits
    total, row = torch.zeros((), dtype=torch.float64), 0
    for b in range(len(logits)):
        for s in range(logits.shape[1] - 1):
            if batch.labels[b, s + 1] != -100:
                total = total - weights_R[row] * logits[b, s].double().log_softmax(-1)[batch.labels[b, s + 1]]
                row += 1
    assert row == len(weights_R)
    return total


def trained_model() -> tuple[nn.Module, nn.Parameter]:
    model = make_llama(vocab_size=VOCABULARY).double().requires_grad_(False)
    trained = model.model.layers[0].mlp.down_proj.weight
    trained.requires_grad_(True)
    return model, trained


@pytest.mark.parametrize("chunk", [1, 16 * VOCABULARY, 2**23])
def test_supervised_rows_equal_full_logits(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_module, "CHUNK_ELEMENTS", chunk)
    model, trained = trained_model()
    batch = make_batch([0, 1, 2, 3, 4, 5])
    wanted = targets(batch)
    weights_R = torch.rand(len(wanted.labels_R), dtype=torch.float64)
    head = LossHead(model)
    assert head.head is model.lm_head
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.valid.long()}
    losses = head.losses(model, inputs, wanted)
    assert losses.dtype == torch.float64
    (ours,) = torch.autograd.grad((losses * weights_R).sum(), trained)
    expected = full_loss(model, batch, weights_R)
    (theirs,) = torch.autograd.grad(expected, trained)
    torch.testing.assert_close((losses * weights_R).sum(), expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-14)
    tasks = wanted.tasks_R
    sums = sum_by_task(losses, tasks, 3)
    for task in range(3):
        assert sums[task] == pytest.approx(losses[tasks == task].sum().item())
    assert not model.lm_head._forward_pre_hooks


class Capped(nn.Module):
    """A model whose logits are squashed after the head, as in Gemma 2."""

    def __init__(self, inner: nn.Module, *, keeps_rows: bool) -> None:
        super().__init__()
        self.inner = inner
        if not keeps_rows:
            self.forward = self.forward_all

    def get_output_embeddings(self) -> nn.Module:
        return self.inner.lm_head

    def forward(self, input_ids, attention_mask=None, use_cache=False, logits_to_keep=0):
        out = self.inner(input_ids, attention_mask=attention_mask, use_cache=False, logits_to_keep=logits_to_keep)
        out.logits = torch.tanh(out.logits)
        return out

    def forward_all(self, input_ids, attention_mask=None, use_cache=False):
        return Capped.forward(self, input_ids, attention_mask)


@pytest.mark.parametrize("keeps_rows", [True, False])
def test_what_follows_the_head_is_not_skipped(keeps_rows: bool) -> None:
    inner, trained = trained_model()
    model = Capped(inner, keeps_rows=keeps_rows)
    head = LossHead(model)
    assert head.head is None and head.keeps_rows is keeps_rows
    batch = make_batch([0, 1, 2])
    wanted = targets(batch)
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.valid.long()}
    losses = head.losses(model, inputs, wanted)
    expected = full_loss(model, batch, torch.ones(len(losses), dtype=torch.float64))
    torch.testing.assert_close(losses.sum(), expected, rtol=1e-12, atol=0)
    ours, theirs = (torch.autograd.grad(value, trained)[0] for value in (losses.sum(), expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-14)


def test_float32_sums_from_bfloat16_logits() -> None:
    rows, labels = torch.randn(40, 8).bfloat16(), torch.randint(0, 50, (40,))
    head = nn.Linear(8, 50, bias=False).bfloat16().requires_grad_(False)
    losses = row_losses(rows, labels, head, 50)
    assert losses.dtype == torch.float32
    assert torch.equal(losses, F.cross_entropy(head(rows).float(), labels, reduction="none"))


def test_no_row_keeps_the_graph() -> None:
    rows = torch.randn(5, 4, requires_grad=True)
    losses = row_losses(rows[:0], torch.zeros(0, dtype=torch.long), nn.Linear(4, 9).requires_grad_(False), 9)
    losses.sum().backward()
    assert losses.shape == (0,) and torch.equal(rows.grad, torch.zeros(5, 4))


def test_the_next_segment_is_not_predicted() -> None:
    batch = make_batch([0, 1])
    labels, segments = batch.input_ids.clone(), batch.segment_ids.clone()
    labels[~batch.valid] = -100
    segments[0, 3:] = torch.where(batch.valid[0, 3:], 1, -1)  # a second example begins at position 3
    keep = predicting(replace(batch, labels=labels, segment_ids=segments))
    expected = [
        [s + 1 < 12 and labels[b, s + 1] != -100 and segments[b, s + 1] == segments[b, s] for s in range(12)]
        for b in range(2)
    ]
    assert keep.tolist() == [[bool(value) for value in row] for row in expected]
    assert not keep[0, 2]


def test_only_a_chunk_of_logits_is_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    """The head never sees more rows than a chunk holds, however many are supervised."""
    monkeypatch.setattr(loss_module, "CHUNK_ELEMENTS", 16 * VOCABULARY)
    model, _ = trained_model()
    batch = make_batch(list(range(12)))
    wanted = targets(batch)
    head, seen = LossHead(model), []
    model.lm_head.register_forward_hook(lambda module, args, out: seen.append(len(out)))
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.valid.long()}
    head.losses(model, inputs, wanted).sum().backward()
    assert seen[0] == 0 and sum(seen) == len(wanted.labels_R) > 16 and max(seen) <= 16
