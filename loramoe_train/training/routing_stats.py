"""What the routers of a run do: load per expert, entropy, dead experts, and which task uses which expert.

Sums are kept on the device and added to at every micro-batch without waiting for it, sites with equally many experts
all at once; they are fetched when a line of the log is due. With weights w of valid token n, p = w / sum_e w_e, and
task t of that token:

    use[t, e] = sum of w[n, e] over the tokens n of task t          entropy = mean of -sum_e p_e ln p_e, over ln E
    load[e]   = sum_t use[t, e] / sum of use                        share[t, e] = use[t, e] / sum_e use[t, e]

Legend: N tokens, E experts of a site, T tasks, M sites with equally many experts, K = T * E + 2 sums of a site.
"""

from collections.abc import Sequence
from math import log
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from loramoe_train.routing.layers import layer_of
from loramoe_train.routing.types import Tokens
from loramoe_train.training.parts import Records

DIGITS = 5  # of the logged shares
STACKED_ELEMENTS = 2**23  # weights held side by side at a time: 32 MiB in float32


class RoutingStats:
    """Sums of one logging window. Sites with one expert are left out: nothing is decided there."""

    def __init__(self, task_names: Sequence[str], accelerator: Accelerator, *, dead_load: float = 0.01) -> None:
        """`dead_load`: of an even load; an expert with less counts as dead."""
        self._tasks = tuple(task_names)
        self._accelerator, self._dead_load = accelerator, dead_load
        # site -> (K,) float64, so that the order of adding up does not show: use, row after row of its (T, E), then the
        # sum of the entropies in nats and the number of tokens
        self._sums: dict[str, Tensor] = {}
        self._stacks: dict[tuple[str, ...], Tensor] = {}  # sites -> (M, K), of which their sums are the rows

    @torch.no_grad()
    def add(self, records: Records, tokens: Tokens) -> None:
        """Add one micro-batch. Records that do not hold one row per token (whole-sequence routing) are left out."""
        alike: dict[int, list[str]] = {}
        for site, routing in records.items():
            if routing.weights_NE.shape[-1] > 1 and len(routing.weights_NE) == len(tokens.valid_N):
                alike.setdefault(routing.weights_NE.shape[-1], []).append(site)
        if not alike:
            return
        # padding has task -1, which is none of the tasks, so it counts nowhere
        one_hot_TN = torch.arange(len(self._tasks), device=tokens.task_N.device)[:, None] == tokens.task_N
        tasks_TN, valid_N = (one_hot_TN & tokens.valid_N).float(), tokens.valid_N.float()
        tokens_1 = valid_N.sum().expand(1)
        for experts, sites in alike.items():
            stack_MK = self._stack(tuple(sites), experts)
            many = max(1, STACKED_ELEMENTS // (experts * max(1, len(valid_N))))
            for start in range(0, len(sites), many):
                part = sites[start : start + many]
                p_MNE = torch.stack([records[site].weights_NE for site in part]).float()  # in place from here: a copy
                use_MK = (tasks_TN @ p_MNE).flatten(start_dim=1)
                p_MNE /= p_MNE.sum(dim=-1, keepdim=True).clamp_min_(1e-20)
                # p ln p by a plain logarithm, which is several times faster than torch.special.entr; 0 where p is 0
                spread_MNE = p_MNE.clamp_min(torch.finfo(torch.float32).tiny).log_().mul_(p_MNE)
                entropy_M1 = -(spread_MNE.sum(dim=-1) @ valid_N)[:, None]
                found_MK = torch.cat([use_MK, entropy_M1, tokens_1.expand(len(part), 1)], dim=1)
                # a step that is not finite may be left out, and must not spoil the whole window
                stack_MK[start : start + many] += found_MK.where(found_MK.isfinite().all(dim=1, keepdim=True), 0.0)

    def _stack(self, sites: tuple[str, ...], experts: int) -> Tensor:
        """(M, K): the sums of these sites as rows of one tensor; made when they are first seen together."""
        stack_MK = self._stacks.get(sites)
        if stack_MK is None:
            size, device = len(self._tasks) * experts + 2, self._accelerator.device
            empty_K = torch.zeros(size, dtype=torch.float64, device=device)
            stack_MK = torch.stack([self._sums.get(site, empty_K) for site in sites])
            # a stack that shares a site with this one would go on counting beside it
            self._stacks = {key: value for key, value in self._stacks.items() if not set(key) & set(sites)}
            self._stacks[sites] = stack_MK
            self._sums.update(zip(sites, stack_MK, strict=True))
        return stack_MK

    def know_all_sites(self) -> None:
        """Before `fetch`, where a rank may have had no batch at all: it counts zero for the sites that others saw. Call
        it on every rank.
        """
        if self._accelerator.num_processes == 1:
            return
        sizes: dict[str, int] = {}
        for those in gather_object([{site: len(sums_K) for site, sums_K in self._sums.items()}]):
            sizes.update(those)
        for site in sizes.keys() - self._sums.keys():
            self._sums[site] = torch.zeros(sizes[site], dtype=torch.float64, device=self._accelerator.device)

    def fetch(self) -> dict[str, Any] | None:
        """All ranks' sums as shares, and start again; None if no router was asked. Call it on every rank.

        Returns:
            `sites`: site -> load (E numbers), entropy (0 peaked .. 1 even), top_share, dead (numbers of experts);
            `layers`: layer -> task -> share of each expert, the mean over the layer's sites of equal E.
        """
        if not self._sums:
            return None
        sites: dict[str, Any] = {}
        by_layer: dict[str, list[Tensor]] = {}
        for site, sums_K in self._everybodys().items():
            use_TE, (entropy, tokens) = sums_K[:-2].view(len(self._tasks), -1), sums_K[-2:]
            experts = use_TE.shape[1]
            load_E = use_TE.sum(dim=0) / use_TE.sum().clamp_min(1e-20)
            sites[site] = {
                "load": _rounded(load_E),
                "entropy": round(float(entropy / tokens.clamp_min(1) / log(experts)), DIGITS),
                "top_share": round(float(load_E.max()), DIGITS),
                "dead": [int(e) for e in (load_E < self._dead_load / experts).nonzero()],
            }
            by_layer.setdefault(layer_of(site), []).append(use_TE)
        self._sums, self._stacks = {}, {}
        return {"sites": sites, "layers": {layer: self._task_shares(uses) for layer, uses in by_layer.items()}}

    def _task_shares(self, uses: list[Tensor]) -> dict[str, list[float]]:
        alike = [use_TE for use_TE in uses if use_TE.shape == uses[0].shape]
        share_TE = torch.stack([use_TE / use_TE.sum(dim=1, keepdim=True).clamp_min(1e-20) for use_TE in alike]).mean(0)
        return {task: _rounded(row) for task, row in zip(self._tasks, share_TE, strict=True) if row.sum() > 0}

    def _everybodys(self) -> dict[str, Tensor]:
        """Site, in alphabetical order -> (K,) float64 on the host: the sums of all ranks."""
        sites = sorted(self._sums)
        flat = torch.cat([self._sums[site] for site in sites])
        if self._accelerator.num_processes > 1:
            flat = self._accelerator.reduce(flat, reduction="sum")
        return dict(zip(sites, flat.cpu().split([len(self._sums[site]) for site in sites]), strict=True))

    def state(self) -> dict[str, Tensor]:
        """The window so far, over all ranks, for a checkpoint. Call it on every rank."""
        if not self._sums:
            return {}
        state = {}
        for site, sums_K in self._everybodys().items():
            state[f"{site}::use"] = sums_K[:-2].view(len(self._tasks), -1)
            state[f"{site}::entropy"] = sums_K[-2:]
        return state

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Continue a window: the first rank takes the sums of all, whatever the number of ranks was."""
        device, share = self._accelerator.device, float(self._accelerator.is_main_process)
        sites = dict.fromkeys(key.rsplit("::", 1)[0] for key in state)
        self._stacks = {}
        self._sums = {
            site: torch.cat([state[f"{site}::use"].flatten(), state[f"{site}::entropy"]]).to(device) * share
            for site in sites
        }


def _rounded(values: Tensor) -> list[float]:
    return [round(float(value), DIGITS) for value in values]
