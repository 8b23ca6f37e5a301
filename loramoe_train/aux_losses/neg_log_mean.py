"""Negative log mean of MoLE (arXiv 2404.13628): - sum_e log q_e, q_e the mean probability of expert e over a pool.

Smallest, E log E, where all experts are used alike, and without bound where one is never used. A product of means
rather than a sum of products: it needs no counts, so it balances soft routing, too.

Legend: M sites, N tokens, E experts.
"""

import math
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from loramoe_train.aux_losses.additive import AdditiveLoss
from loramoe_train.aux_losses.sums import Mask, check_pools, grouped, one_of, pooled, pools_of, token_mask
from loramoe_train.routing.types import Routing, Tokens


class NegLogMean(AdditiveLoss):
    """Pushes up the experts that are used least."""

    def __init__(
        self,
        *,
        pool: Literal["site", "layer", "model"] = "model",
        reduction: Literal["mean", "sum"] = "mean",
        tokens: Mask = "valid",
        num_experts: Mapping[str, int] | None = None,
    ) -> None:
        """Raises ValueError for unknown names, or a pool of sites with different numbers of experts."""
        self.pool = one_of("pool", pool, "site", "layer", "model")
        self.mean = one_of("reduction", reduction, "mean", "sum") == "mean"
        self.mask = one_of("tokens", tokens, "valid", "supervised", "example")
        check_pools(num_experts, self.pool)
        if num_experts:
            sizes = [num_experts[sites[0]] for sites in pools_of(num_experts, self.pool)]
            self.balanced = sum(e * math.log(e) for e in sizes) / (len(sizes) if self.mean else 1)

    def sums(self, records: Mapping[str, Routing], tokens: Tokens) -> Tensor:
        """Probabilities of each pool and expert."""
        mask_N, by_site = token_mask(tokens, self.mask, records), {}
        for group in grouped(records):
            by_site.update(zip(group.sites, torch.einsum("mne,n->me", group.p_MNE, mask_N), strict=True))
        return torch.cat(pooled({site: by_site[site] for site in records}, self.pool))

    def value(self, counts: Tensor, sums: Tensor, records: Mapping[str, Routing]) -> Tensor:
        pools = pools_of(records, self.pool)
        sizes = [records[sites[0]].weights_NE.shape[-1] for sites in pools]
        least = torch.finfo(sums.dtype).tiny  # no token at all, or an expert that underflows
        terms = [
            -(q_E / (len(sites) * counts[-1].clamp(min=1.0))).clamp(min=least).log().sum()
            for sites, q_E in zip(pools, sums.split(sizes), strict=True)
        ]
        return torch.stack(terms).mean() if self.mean else torch.stack(terms).sum()
