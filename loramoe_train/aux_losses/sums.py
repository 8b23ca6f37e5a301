"""Sums over the valid tokens of every site, grouped so that sites with equally many experts are handled at once.

Auxiliary losses of this package are written for exactness over ranks and micro-batches (`training/parts.py`): what has
no gradient is counted first, over everybody's tokens; what has a gradient is summed over the local tokens and divided
by the global count.

Legend: M sites of one group, N tokens, E experts.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from loramoe_train.routing.layers import layer_of
from loramoe_train.routing.types import Routing, Tokens

Mask = Literal["valid", "supervised", "example"]


@dataclass(frozen=True)
class Group:
    """Sites with the same number of experts, stacked."""

    sites: tuple[str, ...]
    logits_MNE: Tensor  # float32
    routings: tuple[Routing, ...]

    @property
    def p_MNE(self) -> Tensor:
        """The probabilities: what a router says they are, else the softmax of its logits."""
        if any(routing.p_NE is not None for routing in self.routings):
            return torch.stack([_probabilities(routing) for routing in self.routings])
        return self.logits_MNE.softmax(dim=-1)

    @property
    def kept_MNE(self) -> Tensor:
        """1 where a token uses an expert."""
        return torch.stack([routing.weights_NE.detach() for routing in self.routings]).gt(0).to(self.logits_MNE.dtype)

    @property
    def num_experts(self) -> int:
        return self.logits_MNE.shape[-1]


def _probabilities(routing: Routing) -> Tensor:
    return routing.logits_NE.softmax(dim=-1) if routing.p_NE is None else routing.p_NE


def one_of(name: str, value: str, *allowed: str) -> str:
    """`value`, or ValueError naming the argument and what is allowed."""
    if value not in allowed:
        raise ValueError(f"{name} must be {' or '.join(allowed)}, got '{value}'")
    return value


def token_mask(tokens: Tokens, which: str, records: Mapping[str, Routing]) -> Tensor:
    """(N,) in the dtype of the logits (float32 in training): 1 where a token counts; for `example` every example counts
    once, its tokens in equal parts. Raises ValueError for that where the batch does not tell its examples apart.
    """
    counted_N = tokens.supervised_N if which == "supervised" else tokens.valid_N
    logits_NE = next(iter(records.values())).logits_NE
    mask_N = counted_N.to(torch.float32 if logits_NE is None else logits_NE.dtype)
    if which != "example":
        return mask_N
    _check_told_apart(tokens)
    example_N = tokens.sample_N.masked_fill(~counted_N, tokens.num_samples)  # padding is one more
    length_B = mask_N.new_zeros(tokens.num_samples + 1).index_add(0, example_N, mask_N)
    return mask_N / length_B.index_select(0, example_N).clamp(min=1.0)


def sites_by_experts(records: Mapping[str, Routing]) -> dict[int, list[str]]:
    """Number of experts -> sites, all in order of first appearance. Raises ValueError where a router scored nothing."""
    found: dict[int, list[str]] = {}
    for site, routing in records.items():
        if routing.logits_NE is None:
            raise ValueError(f"an auxiliary loss needs the logits of a router, but {site} has no learned routing here")
        found.setdefault(routing.logits_NE.shape[-1], []).append(site)
    return found


def grouped(records: Mapping[str, Routing]) -> list[Group]:
    """The records by number of experts, sites in their order. Raises ValueError where a router scored nothing."""
    return [
        Group(
            tuple(sites),
            torch.stack([records[site].logits_NE for site in sites]),
            tuple(records[site] for site in sites),
        )
        for sites in sites_by_experts(records).values()
    ]


@lru_cache(maxsize=64)
def on_device(values: tuple[int, ...], device: torch.device) -> Tensor:
    """The numbers as a tensor that is kept. Do not change it."""
    # kept: a small copy from the host would wait for all that the device has to do
    return torch.tensor(values, device=device)


def top_k_hits(group: Group, top_k: int | Mapping[str, int]) -> tuple[Tensor, Tensor]:
    """((M, N, E) 1 where the token has the expert among its site's top_k best, (M, 1) top_k); ties go to the first."""
    order_MNE = group.logits_MNE.detach().argsort(dim=-1, descending=True, stable=True)
    k_M = tuple(top_k if isinstance(top_k, int) else top_k[site] for site in group.sites)
    k_M11 = on_device(k_M, order_MNE.device).view(-1, 1, 1)
    places_E = torch.arange(group.num_experts, device=order_MNE.device)
    chosen_MNE = (places_E < k_M11).to(group.logits_MNE.dtype).expand_as(order_MNE)
    return torch.zeros_like(chosen_MNE).scatter_(-1, order_MNE, chosen_MNE), k_M11.view(-1, 1)


def count_hits(groups: list[Group], top_k: int | Mapping[str, int], mask_N: Tensor) -> Tensor:
    """(K,) float32 without gradient: for every site and expert in order, the masked tokens that have the expert among
    their top_k best, over top_k; then the number of masked tokens. A site's hits over that number sum to one.
    """
    counts = []
    with torch.no_grad():
        for group in groups:
            hits_MNE, k_M1 = top_k_hits(group, top_k)
            counts.append((torch.einsum("mne,n->me", hits_MNE, mask_N) / k_M1).flatten())
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


# -- pools: sites whose tokens are taken together ----------------------------------------------------------------------


def pools_of(sites: Iterable[str], pool: str) -> list[list[str]]:
    """The sites of each pool, in order of first appearance. `pool`: site, layer, or anything else for one pool."""
    key_of: dict[str, Callable[[str], str]] = {"site": str, "layer": layer_of}
    found: dict[str, list[str]] = {}
    for site in sites:
        found.setdefault(key_of.get(pool, lambda _: "model")(site), []).append(site)
    return list(found.values())


def pooled(by_site: Mapping[str, Tensor], pool: str) -> list[Tensor]:
    """For each pool the sum of its sites' tensors, whose last dimension is the expert. ValueError where they differ."""
    summed = []
    for sites in pools_of(by_site, pool):
        check_alike({site: by_site[site].shape[-1] for site in sites}, pool)
        summed.append(torch.stack([by_site[site] for site in sites]).sum(dim=0))
    return summed


def check_alike(num_experts: Mapping[str, int], pool: str) -> None:
    """ValueError where sites of one pool have different numbers of experts, whose shares cannot be added."""
    first = next(iter(num_experts))
    for site, experts in num_experts.items():
        if experts != num_experts[first]:
            raise ValueError(
                f"pool={pool} takes {first} with {num_experts[first]} experts together with {site} with {experts};"
                " use pool=layer or pool=site, or the same number of experts in all layers"
            )


def check_pools(num_experts: Mapping[str, int] | None, pool: str) -> None:
    """The same for all pools of a plan; nothing where the plan is not known."""
    for sites in pools_of(num_experts or (), pool):
        check_alike({site: num_experts[site] for site in sites}, pool)


def by_sample(tokens: Tokens, mask_N: Tensor) -> Tensor:
    """(samples, N) in the dtype of the mask: which masked token belongs to which example.

    Raises ValueError where the batch does not tell its examples apart.
    """
    _check_told_apart(tokens)
    numbers_B1 = torch.arange(tokens.num_samples, device=mask_N.device).view(-1, 1)
    return (numbers_B1 == tokens.sample_N).to(mask_N.dtype) * mask_N


def _check_told_apart(tokens: Tokens) -> None:
    if tokens.sample_N is None:
        raise ValueError("a loss over examples needs Tokens.sample_N, and this batch does not tell its examples apart")
