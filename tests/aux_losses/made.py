"""Records and tokens for the tests of auxiliary losses."""

import torch

from loramoe_train.routing.types import Routing, Tokens


def tokens_of(mask, *, tasks=None, samples=None):
    """Facts of one token each: whether it counts, its task (also its domain), its example; -1 where it does not."""
    valid = torch.tensor(mask)
    task = torch.zeros(len(mask), dtype=torch.long) if tasks is None else torch.tensor(tasks)
    sample = None if samples is None else torch.where(valid, torch.tensor(samples), -1)
    task = torch.where(valid, task, -1)
    return Tokens(valid, task, task, valid, sample, 0 if samples is None else max(samples) + 1)


def records_of(**logits):
    return {name.replace("__", "."): Routing(value.softmax(-1), value) for name, value in logits.items()}


def whole(loss, records, tokens):
    """The loss of a step that is one micro-batch."""
    return loss(records, tokens, loss.statistics(records, tokens))
