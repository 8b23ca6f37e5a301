"""Routers that went wrong, told from a `routing` line of the log: experts that nobody uses, one that everybody uses.

Legend: E experts of a site.
"""

from collections.abc import Mapping, Sequence
from math import log
from typing import Any

from loramoe_train.schema.trainer import WatchConfig

SITES_IN_WARNING = 3


def alarms(line: Mapping[str, Any], watch: WatchConfig) -> tuple[str, ...]:
    """Warnings about the loads of a line, at most one about dead experts and one about collapsed sites.

    Args:
        line: what `RoutingStats.fetch` returns.
    """
    dead, collapsed = {}, {}
    for site, facts in line["sites"].items():
        load_E = facts["load"]
        if sum(load_E) <= 0:  # no token since the line before
            continue
        spread = entropy(load_E)
        if max(load_E) >= watch.top_load or spread < watch.load_entropy:
            collapsed[site] = f"{site}: {max(load_E):.0%} to expert {load_E.index(max(load_E))}"
        elif facts["dead"]:
            dead[site] = f"{site}: {', '.join(map(str, facts['dead']))}"
    found = []
    if collapsed:
        found.append(f"the routers of {len(collapsed)} sites have collapsed onto one expert ({some_of(collapsed)})")
    if dead:
        found.append(f"at {len(dead)} sites experts are dead: hardly a token uses them ({some_of(dead)})")
    return tuple(found)


def entropy(load_E: Sequence[float]) -> float:
    """Of a load that sums to one, over its value when even: 0 peaked .. 1 even."""
    return -sum(share * log(share) for share in load_E if share > 0) / log(len(load_E))


def some_of(sites: Mapping[str, str]) -> str:
    """The first few of what is said about sites, and how many more there are."""
    more = f"; and {len(sites) - SITES_IN_WARNING} more sites" if len(sites) > SITES_IN_WARNING else ""
    return "; ".join(list(sites.values())[:SITES_IN_WARNING]) + more
