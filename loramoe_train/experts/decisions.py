"""Who decides for which sites: every site for itself, or one decision for all sites of a block.

A block is the module that directly holds its sites, such as a layer's `mlp` or `self_attn`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from loramoe_train.errors import ConfigError
from loramoe_train.experts.plan import ExpertSpec

Scope = Literal["none", "site", "block"]


@dataclass(frozen=True)
class DecisionSpec:
    """One routing decision. `name` is that of its records: of the site, or of the module that decides for several."""

    name: str
    sites: tuple[str, ...]  # that follow it, in the model's order
    d_in: int  # width of what its router reads
    num_experts: int
    top_k: int | None


def plan_decisions(plan: Mapping[str, ExpertSpec], scope: Scope) -> dict[str, DecisionSpec]:
    """Decisions by name, in the model's order; sites with plain LoRA (`routed` false) follow none.

    Raises ConfigError where sites that would follow one decision hold different numbers of experts.
    """
    members: dict[str, list[ExpertSpec]] = {}
    for site, spec in plan.items():
        if spec.routed:
            members.setdefault(site.rpartition(".")[0] if scope == "block" else site, []).append(spec)
    decisions = {}
    for name, specs in members.items():
        first = specs[0]
        if any((spec.num_experts, spec.top_k) != (first.num_experts, first.top_k) for spec in specs):
            raise ConfigError(
                f"router.scope={scope}: the sites of {name} hold different numbers of experts, so one decision cannot"
                " serve them; use router.scope=site"
            )
        sites = tuple(spec.site.name for spec in specs)
        decisions[name] = DecisionSpec(name, sites, first.site.in_features, first.num_experts, first.top_k)
    return decisions
