"""Decisions that need no router: hard routing by domain, and the uniform average.

Legend: N tokens, E experts, G domains.
"""

from functools import lru_cache

import torch
from torch import Tensor


@lru_cache(maxsize=64)
def domain_table(num_domains: int, num_experts: int) -> Tensor:
    """(G, E) float32: the weights that a domain gives to the experts; rows sum to one.

    Domain g owns expert e when g % E == e % G: its own expert when there are as many as domains; several domains share
    one when there are fewer; a domain splits its weight over several when there are more, so that none stays idle.
    """
    owns = [[g % num_experts == e % num_domains for e in range(num_experts)] for g in range(num_domains)]
    table = torch.tensor(owns, dtype=torch.float32)
    return table / table.sum(dim=1, keepdim=True)


def most_per_domain(num_domains: int, num_experts: int) -> int:
    """The most experts that one domain owns."""
    return -(-num_experts // num_domains)


def domain_weights(domain_N: Tensor, num_domains: int, num_experts: int) -> Tensor:
    """(N, E) float32 for domain indices in [0, G); tokens of domain -1 (padding) use no expert."""
    # the cache is for eager passes; a compiler warns that it does not see it
    table = domain_table.__wrapped__ if torch.compiler.is_compiling() else domain_table
    table_GE = table(num_domains, num_experts).to(domain_N.device)
    return table_GE[domain_N.clamp(min=0)] * (domain_N >= 0).unsqueeze(-1)


def uniform_weights(x_ND: Tensor, num_experts: int) -> Tensor:
    """(N, E) float32, every expert 1/E."""
    row_1E = torch.full((1, num_experts), 1.0 / num_experts, dtype=torch.float32, device=x_ND.device)
    return row_1E.expand(x_ND.shape[0], -1)
