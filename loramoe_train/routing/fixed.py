"""Decisions that need no router: hard routing by domain, and the uniform average.

Legend: N tokens, E experts, G domains, K experts of a domain at most.
"""

from functools import lru_cache

import torch
from torch import Tensor

from loramoe_train.routing.context import RoutingContext
from loramoe_train.routing.types import Chosen, Routing


@lru_cache(maxsize=64)
def domain_table(num_domains: int, num_experts: int, device: torch.device | None = None) -> Tensor:
    """(G, E) float32: the weights that a domain gives to the experts; rows sum to one.

    Domain g owns expert e when g % E == e % G: its own expert when there are as many as domains; several domains share
    one when there are fewer; a domain splits its weight over several when there are more, so that none stays idle.
    """
    owns = [[g % num_experts == e % num_domains for e in range(num_experts)] for g in range(num_domains)]
    table = torch.tensor(owns, dtype=torch.float32)
    return (table / table.sum(dim=1, keepdim=True)).to(device)


def most_per_domain(num_domains: int, num_experts: int) -> int:
    """The most experts that one domain owns."""
    return -(-num_experts // num_domains)


def domain_routing(domain_N: Tensor, num_domains: int, num_experts: int) -> Routing:
    """Hard routing for domain indices in [0, G); tokens of domain -1 (padding) use no expert."""
    # kept on the device: a small copy from the host would wait for all that the device has to do
    # a compiler does not see the cache, and warns
    table = domain_table.__wrapped__ if torch.compiler.is_compiling() else domain_table
    table_GE = table(num_domains, num_experts, domain_N.device)
    weights_GK, experts_GK = table_GE.topk(most_per_domain(num_domains, num_experts), dim=1)
    own_N, real_N1 = domain_N.clamp(min=0), (domain_N >= 0).unsqueeze(-1)
    chosen = Chosen(experts_GK[own_N], weights_GK[own_N] * real_N1)
    return Routing(table_GE[own_N] * real_N1, chosen=chosen)


def fixed_routing(x_ND: Tensor, num_experts: int, context: RoutingContext) -> Routing | None:
    """The decision of a mode that asks no router; None where a router is asked (mode `learned`)."""
    if context.mode == "by_domain":
        domain_N = context.origin("domain", len(x_ND), x_ND.device)
        return domain_routing(domain_N, context.num_domains, num_experts)
    return Routing(uniform_weights(x_ND, num_experts)) if context.mode == "uniform" else None


def uniform_weights(x_ND: Tensor, num_experts: int) -> Tensor:
    """(N, E) float32, every expert 1/E."""
    row_1E = torch.full((1, num_experts), 1.0 / num_experts, dtype=torch.float32, device=x_ND.device)
    return row_1E.expand(x_ND.shape[0], -1)
