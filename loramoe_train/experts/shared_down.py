"""Experts that share their down factor: one narrow product for all of them (HydraLoRA, arXiv 2404.19245).

    delta(x) = s sum_e w_e(x) up_e^T down x          down (r, D), up (E r, O): expert e has rows e r ... (e + 1) r

As a bank of tied pairs it is computed in the concatenated form: `down x` is made once and stands in for every expert's.

Legend: N tokens, D in, O out, E experts, r rank of one.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from loramoe_train.experts.bank import ExpertBank
from loramoe_train.experts.forms import Form
from loramoe_train.experts.shared import SeenInput


class SharedDownBank(ExpertBank):
    """Stacked up factors over a single down factor."""

    down_per_expert = False

    def __init__(self, d_in: int, d_out: int, *, ranks: Sequence[int], scales: Sequence[float], **shape: Any) -> None:
        """Raises ValueError where ranks or scales differ: what is shared has one of each."""
        if len(set(ranks)) > 1 or len(set(scales)) > 1:
            raise ValueError(
                f"experts that share their down factor have one rank and one scale, got ranks {list(ranks)}; imported"
                " experts.adapters bring their own factors: use experts=default for them"
            )
        super().__init__(d_in, d_out, ranks=ranks, scales=scales, **shape)
        # of the rows drawn for all experts the first expert's stay: the same bound, for it depends on D alone
        self.down = nn.Parameter(self.down.detach()[: self.ranks[0]].clone())

    def form_for(self, most: int | None, tokens: int) -> Form:
        return "concatenated"

    def add_to(self, y: Tensor, seen: SeenInput) -> Tensor:
        return super().add_to(y, seen._replace(hidden_NR=seen.hidden_NR.repeat(1, self.num_experts)))

    def delta(self, expert: int) -> Tensor:
        return self.scales[expert] * self.up[self.rows(expert)].T @ self.down

    def active_parameters(self, experts: int) -> int:
        return self.ranks[0] * (self.d_in + experts * self.d_out)
