"""Sums over the valid tokens of every site, grouped so that sites with equally many experts are handled at once.

Auxiliary losses of this package are written for exactness over ranks and micro-batches (`training/parts.py`): what has
no gradient is counted first, over everybody's tokens; what has a gradient is summed over the local tokens and divided
by the global count.

Legend: M sites of one group, N tokens, E experts.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from loramoe_train.routing.types import Routing, Tokens

Mask = Literal["valid", "supervised"]


@dataclass(frozen=True)
class Group:
    """Sites with the same number of experts, stacked."""

    sites: tuple[str, ...]
    logits_MNE: Tensor  # float32

    @property
    def num_experts(self) -> int:
        return self.logits_MNE.shape[-1]


def one_of(name: str, value: str, *allowed: str) -> str:
    """`value`, or ValueError naming the argument and what is allowed."""
    if value not in allowed:
        raise ValueError(f"{name} must be {' or '.join(allowed)}, got '{value}'")
    return value


def token_mask(tokens: Tokens, which: str, records: Mapping[str, Routing]) -> Tensor:
    """(N,) in the dtype of the logits (float32 in training): 1 where a token counts."""
    counted_N = tokens.valid_N if which == "valid" else tokens.supervised_N
    logits_NE = next(iter(records.values())).logits_NE
    return counted_N.to(torch.float32 if logits_NE is None else logits_NE.dtype)


def grouped(records: Mapping[str, Routing]) -> list[Group]:
    """The records by number of experts, sites in their order. Raises ValueError where a router scored nothing."""
    by_experts: dict[int, list[str]] = {}
    for site, routing in records.items():
        if routing.logits_NE is None:
            raise ValueError(f"an auxiliary loss needs the logits of a router, but {site} has no learned routing here")
        by_experts.setdefault(routing.logits_NE.shape[-1], []).append(site)
    return [
        Group(tuple(sites), torch.stack([records[site].logits_NE for site in sites])) for sites in by_experts.values()
    ]


@lru_cache(maxsize=64)
def _on_device(values: tuple[int, ...], device: torch.device) -> Tensor:
    # kept: a small copy from the host would wait for all that the device has to do
    return torch.tensor(values, device=device)


def count_hits(groups: list[Group], top_k: int | Mapping[str, int], mask_N: Tensor) -> Tensor:
    """(K,) float32 without gradient: for every site and expert in order, the masked tokens that have the expert among
    their top_k best, over top_k; then the number of masked tokens. A site's hits over that number sum to one.
    """
    counts = []
    with torch.no_grad():
        for group in groups:
            order_MNE = group.logits_MNE.argsort(dim=-1, descending=True, stable=True)
            k_M = tuple(top_k if isinstance(top_k, int) else top_k[site] for site in group.sites)
            k_M11 = _on_device(k_M, order_MNE.device).view(-1, 1, 1)
            chosen_MNE = (
                (torch.arange(group.num_experts, device=order_MNE.device) < k_M11).to(mask_N.dtype).expand_as(order_MNE)
            )
            hits_MNE = torch.zeros_like(chosen_MNE).scatter_(-1, order_MNE, chosen_MNE)
            counts.append((torch.einsum("mne,n->me", hits_MNE, mask_N) / k_M11.view(-1, 1)).flatten())
    return torch.cat([*counts, mask_N.sum().view(1)])


def balance_sums(groups: list[Group], counted: Tensor, p_of: list[Tensor], mask_N: Tensor) -> Iterator[Tensor]:
    """For each group (M,): sum_e f_e * (sum over the local masked tokens of p_e), f from everybody's counted hits.

    Divided by the global number of tokens, and added over ranks and micro-batches, that is sum_e f_e P_e.
    """
    tokens, taken = counted[-1].clamp(min=1.0), 0
    for group, p_MNE in zip(groups, p_of, strict=True):
        size = len(group.sites) * group.num_experts
        share_ME = counted[taken : taken + size].view(-1, group.num_experts) / tokens
        taken += size
        yield (torch.einsum("mne,n->me", p_MNE, mask_N) * share_ME).sum(dim=-1)
