"""Batches against a slow twin that places one token at a time, and packing against separate rows."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loramoe_train.data.batch import IGNORE
from loramoe_train.data.collate import collate, collate_packed
from loramoe_train.data.masks import block_causal_mask
from loramoe_train.data.packing import pack
from loramoe_train.data.tokens import Example
from tests.conftest import make_llama

LENGTHS = st.lists(st.integers(2, 12), min_size=1, max_size=8)


def make_examples(lengths, seed=0, vocab_size=50):
    rng = np.random.default_rng(seed)
    examples = []
    for index, length in enumerate(lengths):
        supervised = rng.random(length) < 0.6
        supervised[0], supervised[-1] = False, True
        ids = rng.integers(3, vocab_size, length).astype(np.int32)
        examples.append(Example(f"toy:train:{index}", index % 3, index % 2, ids, supervised))
    return examples


def slow_batch(rows, width, pad_id):
    """Field -> nested lists, filled token by token."""
    fields = {
        name: [] for name in ("input_ids", "labels", "valid", "task_ids", "domain_ids", "position_ids", "segment_ids")
    }
    for row in rows:
        flat = [(e, s, p) for s, e in enumerate(row) for p in range(len(e.ids))]
        pad = [None] * (width - len(flat))
        fields["input_ids"].append([int(e.ids[p]) for e, s, p in flat] + [pad_id for _ in pad])
        fields["labels"].append(
            [int(e.ids[p]) if e.supervised[p] else IGNORE for e, s, p in flat] + [IGNORE for _ in pad]
        )
        fields["valid"].append([True for _ in flat] + [False for _ in pad])
        fields["task_ids"].append([e.task for e, s, p in flat] + [-1 for _ in pad])
        fields["domain_ids"].append([e.domain for e, s, p in flat] + [-1 for _ in pad])
        fields["position_ids"].append([p for e, s, p in flat] + [0 for _ in pad])
        fields["segment_ids"].append([s for e, s, p in flat] + [-1 for _ in pad])
    return fields


@settings(max_examples=30, deadline=None)
@given(lengths=LENGTHS, multiple=st.sampled_from([1, 4, 8]), packed=st.booleans())
def test_batch_is_the_slow_one(lengths, multiple, packed):
    examples = make_examples(lengths)
    rows = pack(examples, 16) if packed else [[example] for example in examples]
    made = (
        collate_packed(rows, pad_id=1, multiple=multiple) if packed else collate(examples, pad_id=1, multiple=multiple)
    )
    width = max(sum(len(e) for e in row) for row in rows)
    width += -width % multiple
    for name, expected in slow_batch(rows, width, 1).items():
        assert getattr(made, name).tolist() == expected, name
    assert made.example_ids == tuple(e.name for row in rows for e in row) and made.packed == packed
    assert made.num_supervised() == sum(int(e.supervised.sum()) for e in examples)


def test_mask_by_hand():
    segments = torch.tensor([[0, 0, 1, 1, -1]])
    low = torch.finfo(torch.bfloat16).min
    o, x = 0.0, low
    expected = [[o, x, x, x, x], [o, o, x, x, x], [x, x, o, x, x], [x, x, o, o, x], [x, x, x, x, o]]
    mask = block_causal_mask(segments, torch.bfloat16)
    assert mask.shape == (1, 1, 5, 5) and mask.dtype == torch.bfloat16
    assert torch.equal(mask[0, 0], torch.tensor(expected, dtype=torch.bfloat16))


def loss_and_gradients(model, runs):
    """Sum of the token losses over (input_ids, labels, options) runs, and all parameter gradients."""
    model.zero_grad()
    total = torch.zeros((), dtype=torch.float64)
    for input_ids, labels, options in runs:
        logits = model(input_ids=input_ids, use_cache=False, **options).logits.double()
        flat, target = logits[:, :-1].reshape(-1, logits.shape[-1]), labels[:, 1:].reshape(-1)
        total = total + torch.nn.functional.cross_entropy(flat, target, ignore_index=IGNORE, reduction="sum")
    total.backward()
    return total.item(), {name: p.grad.clone() for name, p in model.named_parameters()}


def strong_llama(**options):
    """With weights large enough for attention to matter, or a wrong mask would change next to nothing."""
    return make_llama(vocab_size=50, initializer_range=0.2, **options)


def packed_run(batch, mask):
    return batch.input_ids, batch.labels, {"attention_mask": mask, "position_ids": batch.position_ids}


# transformers takes norms in float32 whatever the model's dtype is, and eager attention its softmax
@pytest.mark.parametrize(
    ("attention", "dtype", "tolerance"),
    [("sdpa", torch.float32, 2e-5), ("eager", torch.float32, 2e-5), ("sdpa", torch.float64, 1e-7)],
)
def test_packed_equals_unpacked_in_loss_and_gradients(attention, dtype, tolerance):
    model = strong_llama(attn_implementation=attention).to(dtype)
    examples = make_examples([5, 9, 3, 12, 7, 4])
    rows = pack(examples, 20)
    assert any(len(row) > 1 for row in rows) and len(rows) > 1
    alone = [collate([example], pad_id=0) for example in examples]
    loss, gradients = loss_and_gradients(model, [(b.input_ids, b.labels, {}) for b in alone])

    batch = collate_packed(rows, pad_id=0, multiple=8)
    mask = block_causal_mask(batch.segment_ids, dtype)
    packed_loss, packed_gradients = loss_and_gradients(model, [packed_run(batch, mask)])
    # rounding only: sums run in another order
    assert packed_loss == pytest.approx(loss, rel=tolerance)
    for name, gradient in gradients.items():
        scale = gradient.abs().max().item()
        assert torch.allclose(packed_gradients[name], gradient, rtol=0, atol=tolerance * max(scale, 1.0)), name

    padded = collate(examples, pad_id=0)
    padded_loss, _ = loss_and_gradients(
        model, [(padded.input_ids, padded.labels, {"attention_mask": padded.valid.long()})]
    )
    assert padded_loss == pytest.approx(loss, rel=tolerance)


def test_wrong_masks_and_positions_would_be_noticed():
    model = strong_llama().double()
    examples = make_examples([5, 9, 3, 12, 7, 4])
    batch = collate_packed(pack(examples, 20), pad_id=0)
    right = block_causal_mask(batch.segment_ids, torch.float64)
    loss, _ = loss_and_gradients(model, [packed_run(batch, right)])
    leaking = block_causal_mask(torch.where(batch.valid, 0, -1), torch.float64)
    for wrong in (leaking, None, batch.valid.long()):
        other, _ = loss_and_gradients(model, [(batch.input_ids, batch.labels, {"attention_mask": wrong})])
        assert abs(other - loss) > 1e-3 * loss
    shifted = batch.segment_ids.roll(1, dims=1)
    other, _ = loss_and_gradients(model, [packed_run(batch, block_causal_mask(shifted, torch.float64))])
    assert abs(other - loss) > 1e-3 * loss
