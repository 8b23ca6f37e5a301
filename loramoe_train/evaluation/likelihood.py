"""Log-likelihoods of answers after their contexts, with no more computed than is asked for.

For tokens x_1..x_n of which the last k are the answer, the result is sum_{i > n-k} log p(x_i | x_<i), and whether each
of them is the most probable. Requests that read the same tokens (answers of one token after the same context) share a
row, answers of several tokens after the same context share its pass (`shared_contexts.py`). Log-softmax and sums are
taken in the dtype of the logits, as in lm-eval: results differ from its own by the rounding of other batches.

Legend: V vocabulary, K predicted positions, T answer tokens.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from loramoe_train.evaluation.batches import BatchSize, run_in_batches
from loramoe_train.evaluation.passes import Places, Reading, Row, plain_pass
from loramoe_train.evaluation.shared_contexts import SharedContexts

Answer = tuple[float, bool]  # log-likelihood, is it what greedy decoding would write


def log_likelihoods(
    model: nn.Module,
    requests: Sequence[tuple[list[int], list[int]]],
    *,
    max_length: int,
    size: BatchSize,
    sharing: SharedContexts | None = None,
    reading: Reading | None = None,
    done: Callable[[], None] = lambda: None,
) -> list[Answer]:
    """Answer every request, in the order given.

    Args:
        model: a transformers causal language model, in evaluation mode.
        requests: (context, answer) as token ids, neither empty; contexts are cut on the left to what fits.
        max_length: tokens that the model reads at most.
        sharing: shares contexts; None: every row goes by itself.
        reading: around every pass of rows by themselves, where the model must be told what it reads.
        done: told of every answer as soon as it is there.
    """
    found: dict[int, Answer] = {}

    def keep(logits_KV: Tensor, places: Places) -> None:
        for number, answer in _read_off(logits_KV, places):
            found[number] = answer
            done()

    rows = _rows(requests, max_length)
    if sharing is not None:
        families, rows = sharing.families(rows)
        run_in_batches(families, size, lambda batch: keep(*sharing.run(batch)))
    run_in_batches(rows, size, lambda batch: keep(*plain_pass(model, batch, reading)))
    return [found[number] for number in range(len(requests))]


def _rows(requests: Sequence[tuple[list[int], list[int]]], max_length: int) -> list[Row]:
    rows: dict[tuple[int, ...], Row] = {}
    for number, (context, answer) in enumerate(requests):
        ids = (context + answer)[-(max_length + 1) : -1]  # the last token is only predicted
        start = len(ids) + 1 - len(answer)
        row = rows.setdefault(tuple(ids), Row(ids, start))
        row.context = min(row.context, start)
        row.asked.append((number, answer))
    return list(rows.values())


def _read_off(logits_KV: Tensor, rows: Places) -> list[tuple[int, Answer]]:
    """The answers to all requests of some rows: (number of the request, answer)."""
    numbers, lengths, places, tokens = [], [], [], []
    for row, own in rows:
        for number, answer in row.asked:
            numbers.append(number)
            lengths.append(len(answer))
            places.extend(own[-len(answer) :])
            tokens.extend(answer)
    place_T, token_T = torch.tensor([places, tokens], device=logits_KV.device)
    log_probs_KV = F.log_softmax(logits_KV, dim=-1)
    picked = log_probs_KV[place_T, token_T].cpu().split(lengths)
    greedy = (log_probs_KV.argmax(dim=-1)[place_T] == token_T).cpu().split(lengths)
    answers = [(float(values.sum()), bool(same.all())) for values, same in zip(picked, greedy, strict=True)]
    return list(zip(numbers, answers, strict=True))
