"""The plan: which site gets how many experts of which rank. Pure data, computed before any weight is read."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from loramoe_train.experts.sites import Site

Scale = Literal["alpha_over_rank", "alpha_over_sqrt_rank", "constant"]


@dataclass(frozen=True)
class ExpertSpec:
    """What is added at one site."""

    site: Site
    ranks: tuple[int, ...]  # one per expert
    scales: tuple[float, ...]  # factor on up @ down, one per expert
    top_k: int | None = None  # experts per token where selection is sparse
    routed: bool = True  # False: plain LoRA beside a mixture, which no router weighs

    @property
    def num_experts(self) -> int:
        return len(self.ranks)


def scale_of(rule: Scale, alpha: float, rank: int) -> float:
    """The factor on up @ down: alpha/r (LoRA), alpha/sqrt(r) (rsLoRA), or alpha itself."""
    if rule == "alpha_over_rank":
        return alpha / rank
    return alpha / math.sqrt(rank) if rule == "alpha_over_sqrt_rank" else alpha


def plan_experts(
    sites: Sequence[Site],
    *,
    counts: Sequence[int],
    ranks: Sequence[int],
    top_k: Sequence[int] | None,
    alpha: float,
    scale: Scale,
    routed: bool = True,
) -> dict[str, ExpertSpec]:
    """Fresh experts at every site; `counts`, `ranks` and `top_k` are per layer. Layers with no expert are left out."""
    plan = {}
    for site in sites:
        count, rank = counts[site.layer], ranks[site.layer]
        if count:
            factor = scale_of(scale, alpha, rank)
            chosen = None if top_k is None else top_k[site.layer]
            plan[site.name] = ExpertSpec(site, (rank,) * count, (factor,) * count, chosen, routed)
    return plan


def plan_imported(
    sites: Sequence[Site], rank_of: Sequence[Mapping[str, int]], *, top_k: Sequence[int] | None
) -> dict[str, ExpertSpec]:
    """Imported experts: `rank_of[e][site name]` is the rank of adapter e there, absent where it has no weights.

    Scales are folded into the imported factors, so each is 1 here. Sites that no adapter covers are left out.
    """
    plan = {}
    for site in sites:
        ranks = tuple(adapter.get(site.name, 0) for adapter in rank_of)
        if any(ranks):
            chosen = None if top_k is None else top_k[site.layer]
            plan[site.name] = ExpertSpec(site, ranks, (1.0,) * len(ranks), chosen)
    return plan
