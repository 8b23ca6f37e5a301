"""All experts of one linear layer, side by side in two stacked tensors.

Expert e is a LoRA pair (down_e (R_e, D), up_e (O, R_e)) with scale s_e. The bank computes

    delta(x) = sum_e w_e s_e up_e down_e x = up ((down x) * column weights)

with down (R, D) and up (O, R), R = sum_e R_e: two narrow matrix products whatever the number of experts, and no
per-expert output is ever stored. Ranks may differ; an expert of rank 0 contributes nothing but can be chosen. A weight
of zero gives a zero gradient, never None, so that data-parallel training needs no special care for idle experts.

Legend: N tokens, D in, O out, E experts, R sum of ranks.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional


class ExpertBank(nn.Module):
    """Stacked LoRA experts. A fresh bank (Kaiming down, zero up; as in PEFT) adds exactly nothing."""

    def __init__(
        self,
        d_in: int,
        d_out: int,
        *,
        ranks: Sequence[int],
        scales: Sequence[float],
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if not ranks or min(ranks) < 0 or len(ranks) != len(scales):
            raise ValueError(
                f"an expert bank needs one non-negative rank and one scale per expert, got {ranks}, {scales}"
            )
        self.d_in, self.d_out, self.ranks, self.scales = d_in, d_out, tuple(ranks), tuple(scales)
        total = sum(ranks)
        self.down = nn.Parameter(torch.empty(total, d_in, device=device, dtype=torch.float32))
        self.up = nn.Parameter(torch.zeros(d_out, total, device=device, dtype=torch.float32))
        self.dropout = nn.Dropout(dropout)
        expert_of_column = torch.tensor(
            [expert for expert, rank in enumerate(ranks) for _ in range(rank)], dtype=torch.long
        )
        self.register_buffer("expert_R", expert_of_column.to(device), persistent=False)
        scale_of_column = torch.tensor([scale for scale, rank in zip(scales, ranks, strict=True) for _ in range(rank)])
        self.register_buffer("scale_R", scale_of_column.to(device), persistent=False)
        if self.down.device.type != "meta":
            bound = 1.0 / math.sqrt(d_in)  # kaiming_uniform with a = sqrt(5)
            with torch.no_grad():
                self.down.uniform_(-bound, bound, generator=generator)

    @property
    def num_experts(self) -> int:
        return len(self.ranks)

    def forward(self, x_ND: Tensor, weights_NE: Tensor | None) -> Tensor:
        """(N, O) in the dtype of x. `weights_NE` float32; None gives every expert weight 1."""
        # Frozen experts (downloaded ones, or those of an earlier stage) are used as they will be at inference.
        kept_ND = self.dropout(x_ND) if self.down.requires_grad else x_ND
        hidden_NR = functional.linear(kept_ND, self.down.to(x_ND.dtype))
        columns = self.scale_R if weights_NE is None else weights_NE[:, self.expert_R] * self.scale_R
        return functional.linear(hidden_NR * columns.to(hidden_NR.dtype), self.up.to(x_ND.dtype))

    def columns(self, expert: int) -> slice:
        """Which rank columns belong to an expert."""
        start = sum(self.ranks[:expert])
        return slice(start, start + self.ranks[expert])

    def delta(self, expert: int) -> Tensor:
        """(O, D) float32: what one expert with weight 1 adds to the weight; for merging, export and tests."""
        own = self.columns(expert)
        return self.scales[expert] * self.up[:, own] @ self.down[own]

    def extra_repr(self) -> str:
        return f"in={self.d_in}, out={self.d_out}, ranks={self.ranks}"
