"""Router z-loss (ST-MoE, arXiv 2202.08906, Eq. 5): the mean over tokens and sites of logsumexp(logits)^2.

Keeps logits small without choosing between experts; the softmax does not see a common offset, this loss does.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from loramoe_train.aux_losses.sums import Mask, grouped, one_of, token_mask
from loramoe_train.routing.types import Routing, Tokens


class RouterZ:
    """Mean squared log-partition of the routers."""

    def __init__(self, *, tokens: Mask = "valid") -> None:
        self.mask = one_of("tokens", tokens, "valid", "supervised")

    def statistics(self, records: Mapping[str, Routing], tokens: Tokens) -> Tensor:
        """The number of tokens."""
        return token_mask(tokens, self.mask, records).sum().view(1)

    def __call__(self, records: Mapping[str, Routing], tokens: Tokens, statistics: Tensor) -> Tensor:
        mask_N = token_mask(tokens, self.mask, records)
        groups = grouped(records)
        total = sum(((group.logits_MNE.logsumexp(dim=-1) ** 2) * mask_N).sum() for group in groups)
        return torch.as_tensor(total) / (statistics[0].clamp(min=1.0) * len(records))
