"""Examples -> MixedBatch, padded (one example a row) or packed (several). Legend: B rows, S positions, T tokens."""

from collections.abc import Sequence

import torch

from loramoe_train.data.batch import IGNORE, MixedBatch
from loramoe_train.data.tokens import Example


def collate(examples: Sequence[Example], *, pad_id: int, multiple: int = 1) -> MixedBatch:
    """One example a row, padded on the right to the longest (rounded up to a multiple of `multiple`)."""
    return _fill([[example] for example in examples], pad_id=pad_id, multiple=multiple, packed=False)


def collate_packed(rows: Sequence[Sequence[Example]], *, pad_id: int, multiple: int = 1) -> MixedBatch:
    """Several examples a row, each with its own positions and segment id; the model needs `masks.block_causal_mask`."""
    return _fill(rows, pad_id=pad_id, multiple=multiple, packed=True)


def _fill(rows: Sequence[Sequence[Example]], *, pad_id: int, multiple: int, packed: bool) -> MixedBatch:
    longest = max(sum(len(example) for example in row) for row in rows)
    shape = (len(rows), -(-longest // multiple) * multiple)
    input_ids = torch.full(shape, pad_id, dtype=torch.int64)
    labels = torch.full(shape, IGNORE, dtype=torch.int64)
    task_ids, domain_ids, segment_ids = (torch.full(shape, -1, dtype=torch.int64) for _ in range(3))
    position_ids = torch.zeros(shape, dtype=torch.int64)
    for r, row in enumerate(rows):
        start = 0
        for segment, example in enumerate(row):
            span = slice(start, start + len(example))
            ids_T = torch.from_numpy(example.ids).long()
            supervised_T = torch.from_numpy(example.supervised)
            input_ids[r, span] = ids_T
            # an example's first token is never supervised, so no row predicts the beginning of its next example
            labels[r, span] = torch.where(supervised_T, ids_T, IGNORE)
            task_ids[r, span], domain_ids[r, span], segment_ids[r, span] = example.task, example.domain, segment
            position_ids[r, span] = torch.arange(len(example))
            start += len(example)
    return MixedBatch(
        input_ids=input_ids,
        labels=labels,
        valid=segment_ids >= 0,
        task_ids=task_ids,
        domain_ids=domain_ids,
        position_ids=position_ids,
        segment_ids=segment_ids,
        example_ids=tuple(example.name for row in rows for example in row),
        packed=packed,
    )
