"""Experts that start from the leading directions of the weight itself (PiSSA, arXiv 2404.02948).

With W = U S V^T, every expert starts as the part of W with the r largest singular values, divided evenly between its
factors: s up_0^T down_0 = U_r S_r V_r^T. PiSSA takes that part out of the frozen weight. Here W stays what it is and
the start is subtracted beside it, which is the same for one expert, and lets several start at W whatever the weights:

    y = W x + sum_e w_e s up_e^T down_e x - (sum_e w_e) s up_0^T down_0 x

The start is stored with the experts, so nothing depends on finding the same directions twice. Under dropout it sees
what the experts see; taken out of W it would see everything, and a fresh model would not be the base. Experts that
start alike become different only through what reaches them: a router must not start from equal weights for all.

Legend: N tokens, D in, O out, E experts, r rank of one.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from loramoe_train.experts.bank import ExpertBank
from loramoe_train.experts.concatenated import add_experts, shrink_all
from loramoe_train.experts.shared import SeenInput

ROUNDS = 16  # of subspace iteration, over twice as many directions as are wanted


class PrincipalBank(ExpertBank):
    """LoRA pairs and the pair (start_down (r, D), start_up (r, O)) that they all started as, which never trains."""

    down_per_expert = False
    reads_base = True
    takes_adapters = False

    def __init__(self, d_in: int, d_out: int, *, ranks: Sequence[int], scales: Sequence[float], **shape: Any) -> None:
        """Raises ValueError where ranks or scales differ, or a weight has fewer directions."""
        if len(set(ranks)) > 1 or len(set(scales)) > 1:
            raise ValueError(f"experts that start alike have one rank and one scale at a site, got ranks {list(ranks)}")
        if ranks[0] > min(d_in, d_out):
            raise ValueError(f"a {d_out} x {d_in} weight has {min(d_in, d_out)} directions, fewer than rank {ranks[0]}")
        super().__init__(d_in, d_out, ranks=ranks, scales=scales, **shape)
        for name, width in (("start_down", d_in), ("start_up", d_out)):
            self.register_buffer(name, torch.zeros(ranks[0], width, device=self.down.device, dtype=torch.float32))

    @torch.no_grad()
    def begin(self, base: nn.Module) -> None:
        if base.weight.is_meta:
            return
        weight_OD, rank = base.weight.to(torch.promote_types(base.weight.dtype, self.up.dtype)), self.ranks[0]
        with torch.random.fork_rng(devices=[weight_OD.device] if weight_OD.is_cuda else []):
            torch.manual_seed(0)
            u, s, v = torch.svd_lowrank(weight_OD, q=min(2 * rank, *weight_OD.shape), niter=ROUNDS)
        root_r = (s[:rank] / self.scales[0]).sqrt()
        self.start_down.copy_((v[:, :rank] * root_r).T)
        self.start_up.copy_((u[:, :rank] * root_r).T)
        self.down.copy_(self.start_down.repeat(self.num_experts, 1))
        self.up.copy_(self.start_up.repeat(self.num_experts, 1))

    def add_to(self, y: Tensor, seen: SeenInput) -> Tensor:
        y = super().add_to(y, seen)
        hidden_Nr, _ = shrink_all(seen.x_ND, [self.start_down], [], seen.kept, seen.dtype)
        if seen.unweighted:
            return add_experts(y, hidden_Nr, None, -self.start_up, self.scale_E.sum(dim=0, keepdim=True), None)
        total_N1 = seen.routing.weights_NE.sum(dim=-1, keepdim=True)
        return add_experts(y, hidden_Nr, total_N1, -self.start_up, self.scale_E[:1], None)

    def delta(self, expert: int) -> Tensor:
        return super().delta(expert) - self.scales[expert] * self.start_up.T @ self.start_down
