"""Localized balance of LoRAMoE (arXiv 2312.09979): balance inside groups of experts, not between them.

For one site, with example m of task group g(m) and expert n of block b(n) (contiguous blocks, one per group):

    Q_nm = mean over the masked tokens t of m of p_n(t)         Z_nm = (1 + delta if b(n) = g(m) else 1 - delta) Q_nm
    L    = Var(Z) / Mean(Z)^2                                   over all entries n, m; the variance with n - 1

Sites are added up (`reduction: sum`, the authors' code) or averaged. The minimum is where Z is constant, so the experts
of an example's own block end with *less* mass: with two blocks 1 - delta against 1 + delta, 0.45 and 0.55 at delta 0.1.
That is what the equation says, and what the authors' code does; we leave it so.

Differences from that code: padding does not count, for which Q is a mean instead of a sum (there every column holds
equally many positions, padding included); variance and mean are those of all examples of the step or of all ranks, not
of each device's micro-batch; any number of groups, and of experts that is at least that.

Legend: M sites, N tokens, E experts, B examples.
"""

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from loramoe_train.aux_losses.additive import AdditiveLoss
from loramoe_train.aux_losses.sums import Mask, by_sample, grouped, on_device, one_of, sites_by_experts, token_mask
from loramoe_train.routing.types import Routing, Tokens


class LocalizedBalance(AdditiveLoss):
    """Squared coefficient of variation of the weighted importance matrix."""

    balanced = 0.0

    def __init__(
        self,
        *,
        delta: float,
        tasks: Sequence[str],
        groups: Sequence[Sequence[str]] | None = None,
        num_groups: int = 2,
        reduction: Literal["mean", "sum"] = "sum",
        tokens: Mask = "valid",
        num_experts: Mapping[str, int] | None = None,
    ) -> None:
        """`groups`: the tasks of each group; None: the mixture's `tasks` are dealt out to `num_groups` in turn.

        Raises ValueError for a delta outside [0, 1), a task in no group or in two, or fewer experts than groups.
        """
        if not 0.0 <= delta < 1.0:
            raise ValueError(f"delta must lie in [0, 1), got {delta}")
        if groups is None:
            groups = [tasks[first::num_groups] for first in range(num_groups)]
        self.delta, self.num_groups = delta, len(groups)
        self.group_of = tuple(_only_group(task, groups) for task in tasks)
        for site, experts in (num_experts or {}).items():
            if experts < self.num_groups:
                raise ValueError(f"{site} has {experts} experts for {self.num_groups} groups of tasks; give it more")
        self.mean = one_of("reduction", reduction, "mean", "sum") == "mean"
        self.mask = one_of("tokens", tokens, "valid", "supervised")

    def counts(self, records: Mapping[str, Routing], tokens: Tokens) -> Tensor:
        return self.evidence(records, tokens).view(1)

    def evidence(self, records: Mapping[str, Routing], tokens: Tokens) -> Tensor:
        """Examples that have a masked token."""
        return by_sample(tokens, token_mask(tokens, self.mask, records)).amax(dim=1).sum()

    def sums(self, records: Mapping[str, Routing], tokens: Tokens) -> Tensor:
        """For each site: the sum of Z - 1/E and that of its square, site after site in the order of `grouped`."""
        sample_BN = by_sample(tokens, token_mask(tokens, self.mask, records))
        length_B1 = sample_BN.sum(dim=1, keepdim=True)
        real_B1 = length_B1.clamp(max=1.0)
        # the task of an example is that of any of its tokens; padding has -1
        task_B = torch.where(sample_BN > 0, tokens.task_N, -1).amax(dim=1).clamp(min=0)
        group_B1 = on_device(self.group_of, task_B.device)[task_B].unsqueeze(-1)
        parts = []
        for group in grouped(records):
            experts = group.num_experts
            block_E = torch.arange(experts, device=task_B.device) * self.num_groups // experts
            factor_BE = torch.where(block_E == group_B1, 1.0 + self.delta, 1.0 - self.delta).to(sample_BN.dtype)
            q_MBE = torch.einsum("mne,bn->mbe", group.p_MNE, sample_BN) / length_B1.clamp(min=1.0)
            # Z less what it is about: the variance stays, and the difference of two sums of squares keeps its digits
            z_MBE = (factor_BE * q_MBE - 1.0 / experts) * real_B1
            parts.append(torch.stack([z_MBE.sum(dim=(1, 2)), z_MBE.square().sum(dim=(1, 2))], dim=1).flatten())
        return torch.cat(parts)

    def value(self, counts: Tensor, sums: Tensor, records: Mapping[str, Routing]) -> Tensor:
        experts = tuple(number for number, sites in sites_by_experts(records).items() for _ in sites)
        experts_M = on_device(experts, sums.device).to(sums.dtype)
        entries_M = (experts_M * counts[-1]).clamp(min=2.0)
        sum_M, square_M = sums.view(-1, 2).unbind(dim=1)
        variance_M = (square_M - sum_M.square() / entries_M) / (entries_M - 1.0)
        cv_M = variance_M / (sum_M / entries_M + 1.0 / experts_M).square()
        return cv_M.mean() if self.mean else cv_M.sum()


def _only_group(task: str, groups: Sequence[Sequence[str]]) -> int:
    found = [index for index, names in enumerate(groups) if task in names]
    if len(found) != 1:
        raise ValueError(
            f"groups names task '{task}' {len(found)} times; every task of the mixture belongs to one group"
        )
    return found[0]
