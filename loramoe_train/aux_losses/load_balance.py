"""Load balance: coefficient-free `factor * sum_e f_e P_e` of each site (Switch, arXiv 2101.03961, Eq. 4-6).

P_e is the mean probability of expert e over the masked tokens, f_e its share of the top-k assignments (no gradient).
`factor: experts` multiplies by E, so that perfect balance gives 1; `factor: one` is the auxiliary loss that LoRA-Mixer
compares with (its Eq. 3), where perfect balance gives 1/E. Sites are averaged or summed.

Legend: M sites, N tokens, E experts.
"""

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from loramoe_train.aux_losses.sums import Mask, balance_sums, count_hits, grouped, one_of, token_mask
from loramoe_train.routing.types import Routing, Tokens


class LoadBalance:
    """Pushes probability away from the experts that are chosen more often than their share."""

    def __init__(
        self,
        *,
        top_k: int | Mapping[str, int],
        factor: Literal["experts", "one"] = "experts",
        reduction: Literal["mean", "sum"] = "mean",
        tokens: Mask = "valid",
    ) -> None:
        self.top_k = top_k
        self.factor = one_of("factor", factor, "experts", "one")
        self.reduction = one_of("reduction", reduction, "mean", "sum")
        self.mask = one_of("tokens", tokens, "valid", "supervised")

    def statistics(self, records: Mapping[str, Routing], tokens: Tokens) -> Tensor:
        """Top-k hits of every site and expert, then the number of tokens."""
        return count_hits(grouped(records), self.top_k, token_mask(tokens, self.mask, records))

    def __call__(self, records: Mapping[str, Routing], tokens: Tokens, statistics: Tensor) -> Tensor:
        mask_N, groups = token_mask(tokens, self.mask, records), grouped(records)
        p_of = [group.logits_MNE.softmax(dim=-1) for group in groups]
        factors = [group.num_experts if self.factor == "experts" else 1 for group in groups]
        terms = balance_sums(groups, statistics, p_of, mask_N)
        total = sum(factor * term_M.sum() for factor, term_M in zip(factors, terms, strict=True))
        sites = len(records) if self.reduction == "mean" else 1
        return torch.as_tensor(total) / (statistics[-1].clamp(min=1.0) * sites)
