"""What the routers of a run do: load per expert, entropy, dead experts, and which task uses which expert.

Sums are kept on the device and added to at every micro-batch without waiting for it; they are fetched when a line of
the log is due. With weights w of valid token n, p = w / sum_e w_e, and task t of that token:

    use[t, e] = sum of w[n, e] over the tokens n of task t          entropy = mean of -sum_e p_e ln p_e, over ln E
    load[e]   = sum_t use[t, e] / sum of use                        share[t, e] = use[t, e] / sum_e use[t, e]

Legend: N tokens, E experts of a site, T tasks.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from math import log
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor

from loramoe_train.routing.types import Tokens
from loramoe_train.training.parts import Records

DEAD_SHARE = 0.01  # of an even load: below it an expert counts as dead
DIGITS = 5  # of the logged shares

_LAYER = re.compile(r"^(.*?\.)?\d+(?=\.|$)")


def layer_of(site: str) -> str:
    """`model.layers.3.self_attn.q_proj` -> `model.layers.3`; a site outside numbered layers is its own layer."""
    match = _LAYER.match(site)
    return match.group(0) if match else site


@dataclass
class _SiteSums:
    use_TE: Tensor  # float64, so that the order of adding up does not show
    entropy_and_tokens_2: Tensor  # float64: sum of entropies in nats, number of tokens


class RoutingStats:
    """Sums of one logging window. Sites with one expert are left out: nothing is decided there."""

    def __init__(self, task_names: Sequence[str], accelerator: Accelerator) -> None:
        self._tasks = tuple(task_names)
        self._accelerator = accelerator
        self._sites: dict[str, _SiteSums] = {}

    @torch.no_grad()
    def add(self, records: Records, tokens: Tokens) -> None:
        """Add one micro-batch. Records that do not hold one row per token (whole-sequence routing) are left out."""
        routed = {
            site: routing.weights_NE.detach().float()
            for site, routing in records.items()
            if routing.weights_NE.shape[-1] > 1 and len(routing.weights_NE) == len(tokens.valid_N)
        }
        if not routed:
            return
        # padding has task -1: its row of the one-hot matrix is cut off, so it counts nowhere
        tasks_NT = F.one_hot(tokens.task_N + 1, len(self._tasks) + 1)[:, 1:].float() * tokens.valid_N[:, None]
        valid_N = tokens.valid_N.float()
        for site, weights_NE in routed.items():
            total_N1 = weights_NE.sum(dim=-1, keepdim=True)
            entropy_N = torch.special.entr(weights_NE / total_N1.clamp_min(1e-20)).sum(dim=-1)
            sums = self._sites.get(site)
            if sums is None:
                sums = self._sites[site] = _SiteSums(
                    torch.zeros(len(self._tasks), weights_NE.shape[-1], dtype=torch.float64, device=weights_NE.device),
                    torch.zeros(2, dtype=torch.float64, device=weights_NE.device),
                )
            sums.use_TE += tasks_NT.T @ weights_NE
            sums.entropy_and_tokens_2 += torch.stack([(entropy_N * valid_N).sum(), valid_N.sum()])

    def fetch(self) -> dict[str, Any] | None:
        """All ranks' sums as shares, and start again; None if no router was asked. Call it on every rank.

        Returns:
            `sites`: site -> load (E numbers), entropy (0 peaked .. 1 even), top_share, dead (numbers of experts);
            `layers`: layer -> task -> share of each expert, the mean over the layer's sites of equal E.
        """
        if not self._sites:
            return None
        flat = self._summed().cpu()
        sites: dict[str, Any] = {}
        by_layer: dict[str, list[Tensor]] = {}
        for site, sums in sorted(self._sites.items()):
            count = sums.use_TE.numel()
            use_TE, (entropy, tokens), flat = (
                flat[:count].view_as(sums.use_TE),
                flat[count : count + 2],
                flat[count + 2 :],
            )
            experts = use_TE.shape[1]
            load_E = use_TE.sum(dim=0) / use_TE.sum().clamp_min(1e-20)
            sites[site] = {
                "load": _rounded(load_E),
                "entropy": round(float(entropy / tokens.clamp_min(1) / log(experts)), DIGITS),
                "top_share": round(float(load_E.max()), DIGITS),
                "dead": [int(e) for e in (load_E < DEAD_SHARE / experts).nonzero()],
            }
            by_layer.setdefault(layer_of(site), []).append(use_TE)
        self._sites = {}
        return {"sites": sites, "layers": {layer: self._task_shares(uses) for layer, uses in by_layer.items()}}

    def _task_shares(self, uses: list[Tensor]) -> dict[str, list[float]]:
        alike = [use_TE for use_TE in uses if use_TE.shape == uses[0].shape]
        share_TE = torch.stack([use_TE / use_TE.sum(dim=1, keepdim=True).clamp_min(1e-20) for use_TE in alike]).mean(0)
        return {task: _rounded(row) for task, row in zip(self._tasks, share_TE, strict=True) if row.sum() > 0}

    def _summed(self) -> Tensor:
        parts = [part for _, sums in sorted(self._sites.items()) for part in (sums.use_TE, sums.entropy_and_tokens_2)]
        flat = torch.cat([part.reshape(-1) for part in parts])
        return flat if self._accelerator.num_processes == 1 else self._accelerator.reduce(flat, reduction="sum")

    def state(self) -> dict[str, Tensor]:
        """The window so far, over all ranks, for a checkpoint. Call it on every rank."""
        if not self._sites:
            return {}
        flat, state = self._summed().cpu(), {}
        for site, sums in sorted(self._sites.items()):
            count = sums.use_TE.numel()
            state[f"{site}::use"] = flat[:count].view_as(sums.use_TE).clone()
            state[f"{site}::entropy"], flat = flat[count : count + 2].clone(), flat[count + 2 :]
        return state

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Continue a window: the first rank takes the sums of all, whatever the number of ranks was."""
        device, share = self._accelerator.device, float(self._accelerator.is_main_process)
        self._sites = {
            site: _SiteSums(state[f"{site}::use"].to(device) * share, state[f"{site}::entropy"].to(device) * share)
            for site in dict.fromkeys(key.rsplit("::", 1)[0] for key in state)
        }


def _rounded(values: Tensor) -> list[float]:
    return [round(float(value), DIGITS) for value in values]
