"""Load balance: coefficient-free `factor * sum_e f_e P_e` of each pool of sites (Switch, arXiv 2101.03961, Eq. 4-6).

P_e is the mean probability of expert e over the pool's masked tokens, f_e how much expert e is used. The published
variants differ in a few switches:

| paper | counts | share | factor | pool, reduction | balanced | all tokens on the same k of E |
|---|---|---|---|---|---|---|
| Switch (2101.03961) | top_k = 1 | per_pick | experts | site, mean | 1 | E |
| MoLA (2402.08562) | top_k | per_pick | experts | layer, sum | 1 per layer | E / k |
| Mixtral; MixLoRA (2404.15159) | top_k | per_token | experts | model | k | E |
| DynMoLE (2504.00661) | mass | per_token | experts | model | 1 at uniform p | E for one expert |
| AdaMoLE (2405.00361) | kept | per_token | experts | site, sum | - | - |
| LLaVA-MoLE (2401.16160) | top_k = 1 | per_pick | one | sample | 1 / E | 1 |
| LoRA-Mixer's baseline, its Eq. 3 | top_k | per_pick | one | site, mean | 1 / E | 1 / k |

`counts: mass` is the kept probability p_e m_e, and it alone has a gradient; the others are constants. A pool of several
layers cannot see that each of them collapsed onto another expert: two such layers give the balanced value.
`pool: sample` takes each example by itself, over all sites, and averages over examples.

Legend: M sites, N tokens, E experts, B examples.
"""

from collections.abc import Callable, Mapping
from typing import Literal

import torch
from torch import Tensor

from loramoe_train.aux_losses.additive import AdditiveLoss
from loramoe_train.aux_losses.sums import (
    Group,
    Mask,
    by_sample,
    check_alike,
    check_pools,
    grouped,
    one_of,
    pooled,
    pools_of,
    token_mask,
    top_k_hits,
)
from loramoe_train.routing.types import Routing, Tokens

Pool = Literal["site", "layer", "model", "sample"]


class LoadBalance(AdditiveLoss):
    """Pushes probability away from the experts that are chosen more often than their share."""

    def __init__(
        self,
        *,
        top_k: int | Mapping[str, int] | None,
        counts: Literal["top_k", "kept", "mass"] = "top_k",
        share: Literal["per_pick", "per_token"] = "per_pick",
        factor: Literal["experts", "one"] = "experts",
        pool: Pool = "site",
        reduction: Literal["mean", "sum"] = "mean",
        tokens: Mask = "valid",
        num_experts: Mapping[str, int] | None = None,
    ) -> None:
        """`num_experts`: of every site, where known: for the check of the pools and the balanced value.

        Raises ValueError for unknown names, or a pool of sites with different numbers of experts.
        """
        self.top_k = top_k
        self.how = one_of("counts", counts, "top_k", "kept", "mass")
        self.per_pick = one_of("share", share, "per_pick", "per_token") == "per_pick"
        self.factor = one_of("factor", factor, "experts", "one")
        self.pool = one_of("pool", pool, "site", "layer", "model", "sample")
        self.mean = one_of("reduction", reduction, "mean", "sum") == "mean"
        self.mask = one_of("tokens", tokens, "valid", "supervised")
        if self.how == "top_k" and top_k is None:
            raise ValueError("counts=top_k needs top_k, a number of experts per token")
        check_pools(num_experts, self.pool)
        self.balanced = self._balanced(num_experts) if num_experts else None

    # -- what is added up ----------------------------------------------------------------------------------------------

    def counts(self, records: Mapping[str, Routing], tokens: Tokens) -> Tensor:
        """Uses of each pool and expert where they are constants, then the evidence."""
        evidence_1 = self.evidence(records, tokens).view(1)
        if self.pool == "sample" or self.how == "mass":
            return evidence_1
        return torch.cat([*self._pooled(records, tokens, self._uses), evidence_1])

    def sums(self, records: Mapping[str, Routing], tokens: Tokens) -> Tensor:
        """Probabilities of each pool and expert, then the kept ones where those are counted. For `pool: sample`, where
        every example is here as a whole, the sum of their losses."""
        if self.pool == "sample":
            return self._sum_of_samples(records, tokens).view(1)
        parts = self._pooled(records, tokens, lambda group: group.p_MNE)
        return torch.cat([*parts, *self._pooled(records, tokens, self._uses)] if self.how == "mass" else parts)

    def evidence(self, records: Mapping[str, Routing], tokens: Tokens) -> Tensor:
        """Masked tokens, or examples that have one."""
        mask_N = token_mask(tokens, self.mask, records)
        return by_sample(tokens, mask_N).amax(dim=1).sum() if self.pool == "sample" else mask_N.sum()

    def _uses(self, group: Group) -> Tensor:
        """(M, N, E): how much a token uses an expert."""
        if self.how == "top_k":
            return top_k_hits(group, self.top_k)[0]
        return group.kept_MNE * group.p_MNE if self.how == "mass" else group.kept_MNE

    def _pooled(self, records: Mapping[str, Routing], tokens: Tokens, what: Callable[[Group], Tensor]) -> list[Tensor]:
        """For each pool (E,): sums over its masked tokens."""
        mask_N, by_site = token_mask(tokens, self.mask, records), {}
        for group in grouped(records):
            by_site.update(zip(group.sites, torch.einsum("mne,n->me", what(group), mask_N), strict=True))
        return pooled({site: by_site[site] for site in records}, self.pool)

    # -- what becomes of it --------------------------------------------------------------------------------------------

    def value(self, counts: Tensor, sums: Tensor, records: Mapping[str, Routing]) -> Tensor:
        if self.pool == "sample":
            return sums[0] / counts[-1].clamp(min=1.0)
        pools = pools_of(records, self.pool)
        sizes = [records[sites[0]].weights_NE.shape[-1] for sites in pools]
        probabilities, *kept = sums.split(sum(sizes))
        uses = kept[0] if kept else counts[:-1]
        terms = [
            self._term(uses_E, p_E, len(sites) * counts[-1])
            for sites, uses_E, p_E in zip(pools, uses.split(sizes), probabilities.split(sizes), strict=True)
        ]
        return torch.stack(terms).mean() if self.mean else torch.stack(terms).sum()

    def _term(self, uses_E: Tensor, p_E: Tensor, tokens: Tensor) -> Tensor:
        """factor * sum_e f_e P_e from sums over `tokens` tokens; further dimensions may stand before E."""
        tokens = tokens.clamp(min=1.0)
        picks = uses_E.sum(dim=-1).clamp(min=1e-9) if self.per_pick else tokens
        factor = uses_E.shape[-1] if self.factor == "experts" else 1
        return factor * (uses_E * p_E).sum(dim=-1) / (picks * tokens)

    def _sum_of_samples(self, records: Mapping[str, Routing], tokens: Tokens) -> Tensor:
        check_alike({site: routing.weights_NE.shape[-1] for site, routing in records.items()}, self.pool)
        sample_BN = by_sample(tokens, token_mask(tokens, self.mask, records))
        (group,) = grouped(records)
        p_BE = torch.einsum("mne,bn->be", group.p_MNE, sample_BN)
        uses_BE = torch.einsum("mne,bn->be", self._uses(group), sample_BN)
        return self._term(uses_BE, p_BE, len(records) * sample_BN.sum(dim=1)).sum()

    def _balanced(self, num_experts: Mapping[str, int]) -> float | None:
        """The value where every expert is used alike and p is uniform; None where that depends on how many are kept."""
        if self.how == "kept":
            return None
        terms = []
        for sites in [list(num_experts)] if self.pool == "sample" else pools_of(num_experts, self.pool):
            experts = num_experts[sites[0]]
            top_k = 1 if self.how == "mass" or self.per_pick else self._mean_top_k(sites)
            terms.append((experts if self.factor == "experts" else 1) * top_k / experts)
        return sum(terms) / (len(terms) if self.mean or self.pool == "sample" else 1)

    def _mean_top_k(self, sites: list[str]) -> float:
        return self.top_k if isinstance(self.top_k, int) else sum(self.top_k[site] for site in sites) / len(sites)
