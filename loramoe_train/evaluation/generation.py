"""Generation for a batch of prompts that ends row by row, and lets go of finished rows.

A row is finished when its text holds a stop string or it wrote an end token. `generate` of transformers goes on with
all rows until the last is finished; here it is interrupted each time half of them are, and continued with the others
and their part of the key-value cache. Greedy decoding of a row does not depend on its neighbours, so the texts are the
same. Legend: B rows, S positions.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import StoppingCriteria, StoppingCriteriaList


def generate(
    model: nn.Module,
    tokenizer: Any,
    ids_BS: Tensor,
    mask_BS: Tensor,
    *,
    stops: Sequence[str],
    new_tokens: int,
    drops_rows: bool,
    **options: Any,
) -> list[list[int]]:
    """The new tokens of each row, up to and with the one that finished it; at most `new_tokens`.

    Args:
        ids_BS: prompts, padded on the left; `mask_BS` (int64) is 0 there.
        stops: texts that finish a row.
        drops_rows: whether finished rows may leave the batch: only where each layer's cache holds one entry per row.
        options: of `model.generate`.
    """
    prompt, end = ids_BS.shape[1], ids_BS.shape[1] + new_tokens
    written: dict[int, list[int]] = {}
    numbers, cache = list(range(len(ids_BS))), None
    while numbers:
        watch = _Finished(tokenizer, stops, prompt, len(numbers), drops_rows, _end_tokens(model))
        output = model.generate(
            input_ids=ids_BS,
            attention_mask=mask_BS,
            max_length=end,
            stopping_criteria=StoppingCriteriaList([watch]),
            pad_token_id=tokenizer.pad_token_id,
            use_cache=True,
            return_dict_in_generate=True,
            **({} if cache is None else {"past_key_values": cache}),
            **options,
        )
        rows, size = output.sequences, output.sequences.shape[1]
        goes_on = drops_rows and size < end
        open_rows = [row for row, length in enumerate(watch.lengths) if length is None] if goes_on else []
        for row, number in enumerate(numbers):
            if row not in open_rows:
                written[number] = rows[row, prompt : watch.lengths[row]].tolist()
        numbers = [numbers[row] for row in open_rows]
        if numbers:
            kept_B = torch.tensor(open_rows, device=rows.device)
            cache = output.past_key_values
            cache.batch_select_indices(kept_B)
            ids_BS, mask_BS = rows[kept_B], mask_BS[kept_B]
            mask_BS = torch.cat([mask_BS, mask_BS.new_ones(len(kept_B), size - mask_BS.shape[1])], dim=1)
    return [written[number] for number in range(len(written))]


def _end_tokens(model: nn.Module) -> frozenset[int]:
    """What `generate` ends a row at."""
    ends = model.generation_config.eos_token_id
    return frozenset([ends] if isinstance(ends, int) else ends or ())


class _Finished(StoppingCriteria):
    """Says after every token which rows are finished, and remembers how long they were (`lengths`, in tokens)."""

    def __init__(
        self, tokenizer: Any, stops: Sequence[str], prompt: int, rows: int, leaves_early: bool, ends: frozenset[int]
    ) -> None:
        self.tokenizer, self.stops, self.prompt, self.ends = tokenizer, [text for text in stops if text], prompt, ends
        self.leaves_early = leaves_early
        self.lengths: list[int | None] = [None] * rows
        # a stop string may come out in more tokens than it is written with; lm-eval looks back two more as well
        sizes = [len(tokenizer.encode(text, add_special_tokens=False)) for text in self.stops]
        self.window = max(sizes, default=0) + 2

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        size = input_ids.shape[1]
        recent = input_ids[:, max(self.prompt, size - self.window) :].tolist()
        still = [row for row, length in enumerate(self.lengths) if length is None]
        texts = self.tokenizer.batch_decode([recent[row] for row in still])
        for row, text in zip(still, texts, strict=True):
            if recent[row][-1] in self.ends or any(stop in text for stop in self.stops):
                self.lengths[row] = size
        finished = [length is not None for length in self.lengths]
        if self.leaves_early and 2 * sum(finished) >= len(finished) > 1:
            finished = [True] * len(finished)
        return torch.tensor(finished, device=input_ids.device)
