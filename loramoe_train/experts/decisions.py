"""Who decides for which sites: every site for itself, or one decision for all sites of a block, or of the whole model.

A block is the module that directly holds its sites, such as a layer's `mlp` or `self_attn`. For the whole model the
module decides that holds the decoder layers, such as `model`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from loramoe_train.errors import ConfigError
from loramoe_train.experts.plan import ExpertSpec
from loramoe_train.routing.layers import layer_of

Scope = Literal["none", "site", "block", "model"]


@dataclass(frozen=True)
class DecisionSpec:
    """One routing decision. `name` is that of the site, or of the module that decides for several."""

    name: str
    sites: tuple[str, ...]  # that follow it, in the model's order
    d_in: int  # width of what its router reads
    num_experts: int
    top_k: int | None
    per_site: bool = False  # the router takes one decision for each of the sites, all at once

    @property
    def records(self) -> tuple[str, ...]:
        """Names of its records."""
        return self.sites if self.per_site else (self.name,)


def plan_decisions(
    plan: Mapping[str, ExpertSpec], scope: Scope, *, per_site: bool = False, width: int = 0
) -> dict[str, DecisionSpec]:
    """Decisions by name, in the model's order; sites with plain LoRA (`routed` false) follow none.

    Args:
        width: of the model's hidden states, which is what a router of a block or the whole model reads, whatever its
            first site reads; 0 where it is not known, and none is made.

    Raises ConfigError where sites that would follow one decision hold different numbers of experts.
    """
    members: dict[str, list[ExpertSpec]] = {}
    for site, spec in plan.items():
        if spec.routed:
            members.setdefault(_decider(site, scope), []).append(spec)
    decisions = {}
    for name, specs in members.items():
        first = specs[0]
        if any((spec.num_experts, spec.top_k) != (first.num_experts, first.top_k) for spec in specs):
            raise ConfigError(
                f"router.scope={scope}: the sites of {name} hold different numbers of experts, or choose another"
                " number of them, so one decision cannot serve them; use router.scope=site"
            )
        sites = tuple(spec.site.name for spec in specs)
        own = scope == "site" or (scope == "block" and not width)
        d_in = first.site.in_features if own else width
        decisions[name] = DecisionSpec(name, sites, d_in, first.num_experts, first.top_k, per_site)
    return decisions


def _decider(site: str, scope: Scope) -> str:
    """The site itself, or the module that decides for it."""
    if scope == "model":
        return layer_of(site).rpartition(".")[0].rpartition(".")[0]
    return site.rpartition(".")[0] if scope == "block" else site
