"""Several answers to one context: the context is read once, into a key-value cache, and every answer goes on from it.

Right only for models whose layers keep keys and values for every token and can be told positions. Which those are is
asked of the model, and checked once on a context that is computed both ways. Legend: C contexts, B rows, S positions,
V vocabulary, K predicted positions.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from loramoe_train.evaluation.passes import Places, Row, accepts, logits_at, padded, plain_pass

WORTH = 16  # tokens that must be saved to make up for a second pass
# relative error of all logits together that is still rounding: 1e-7 was seen in float32, 1e-3 is what TF32 may do
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3}
TOLERANCE_16_BITS = 0.05


@dataclass
class Family:
    """Rows that go on from the same context."""

    context: list[int]
    members: list[Row]

    @property
    def rows(self) -> int:
        return len(self.members)

    @property
    def length(self) -> int:
        return max(row.length for row in self.members)


class SharedContexts:
    """Whether a model can share contexts, and how it is done."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.longest = longest_shared(model)
        self._checked = False

    def families(self, rows: Sequence[Row]) -> tuple[list[Family], list[Row]]:
        """Rows that shall share a context, and those that go by themselves."""
        together: dict[tuple[int, ...], list[Row]] = {}
        for row in rows:
            together.setdefault(tuple(row.ids[: row.context]), []).append(row)
        families, alone = [], []
        for context, members in together.items():
            family = Family(list(context), members)
            saved = len(context) * (len(members) - 1)
            if saved >= WORTH and family.length <= self.longest:
                families.append(family)
            else:
                alone.extend(members)
        if families and not self._checked:
            self._checked = True
            if not self._agrees(min(families, key=lambda family: family.rows * family.length)):
                self.longest = 0
                return [], list(rows)
        return families, alone

    def _agrees(self, family: Family) -> bool:
        """Whether a family gets the logits that its rows get by themselves."""
        (shared_KV, shared), (plain_KV, plain) = self.run([family]), plain_pass(self.model, family.members)
        order = [place for _, places in shared for place in places]
        wanted_KV = plain_KV[[place for _, places in plain for place in places]]
        error = (shared_KV[order] - wanted_KV).float().norm() / wanted_KV.float().norm()
        return bool(error <= TOLERANCE.get(plain_KV.dtype, TOLERANCE_16_BITS))

    def run(self, families: Sequence[Family]) -> tuple[Tensor, Places]:
        """Logits (K, V) of all members, and where among them each row's are."""
        device = self.model.device
        longest = max(len(family.context) for family in families)
        lengths_C = torch.tensor([len(family.context) for family in families], device=device)
        # padded on the left, so that all answers begin at one position of the cache
        contexts_CS = torch.tensor([[0] * (longest - len(f.context)) + f.context for f in families], device=device)
        position_CS = torch.arange(longest, device=device) - (longest - lengths_C)[:, None]
        mask_CS = (position_CS >= 0).long()
        output = self.model(
            input_ids=contexts_CS,
            attention_mask=mask_CS,
            position_ids=position_CS.clamp(min=0),
            use_cache=True,
            logits_to_keep=1,
        )
        longer = [
            (number, row) for number, family in enumerate(families) for row in family.members if row.predicted > 1
        ]
        owner_B = torch.tensor([number for number, _ in longer], device=device)
        cache = output.past_key_values
        cache.batch_select_indices(owner_B)
        ids_BS = padded([row.ids[row.context :] for _, row in longer], device)
        position_S = torch.arange(ids_BS.shape[1], device=device)
        rest_KV = logits_at(
            position_S < torch.tensor([row.predicted - 1 for _, row in longer], device=device)[:, None],
            self.model,
            input_ids=ids_BS,
            attention_mask=torch.cat([mask_CS[owner_B], torch.ones_like(ids_BS)], dim=1),
            position_ids=lengths_C[owner_B][:, None] + position_S,
            past_key_values=cache,
            use_cache=True,
        )
        places: Places = []
        start = len(families)
        for number, family in enumerate(families):
            for row in family.members:
                places.append((row, [number, *range(start, start + row.predicted - 1)]))
                start += row.predicted - 1
        return torch.cat([output.logits[:, -1], rest_KV]), places


def longest_shared(model: nn.Module) -> int:
    """How long, in tokens, a row may be whose context was read before: 0 where it never can."""
    needed = ("attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep")
    if getattr(model, "_is_stateful", True) or not all(accepts(model, name) for name in needed):
        return 0
    layers = DynamicCache(config=model.config).layers
    if any(type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers):
        return 0
    windows = [layer.sliding_window for layer in layers if isinstance(layer, DynamicSlidingWindowLayer)]
    return min((window - 1 for window in windows), default=2**31)
