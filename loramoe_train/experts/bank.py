"""All experts of one linear layer, side by side in two stacked tensors.

Expert e is a LoRA pair (down_e (R_e, D), up_e (R_e, O)) with scale s_e; the bank adds

    delta(x) = sum_e w_e s_e up_e^T down_e x

with down (R, D) and up (R, O), R = sum_e R_e. Both are stored with an expert's rows together, which is what the fast
forms read (`concatenated.py`, `grouped.py`; `forms.py` says which when). Ranks may differ; an expert of rank 0
contributes nothing but can be chosen. A weight of zero gives a zero gradient, never None, so that data-parallel
training needs no special care for idle experts.

Legend: N tokens, D in, O out, E experts, R sum of ranks.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from loramoe_train.experts.chosen import add_chosen
from loramoe_train.experts.concatenated import add_experts
from loramoe_train.experts.forms import Form, FormChoice, choose_form
from loramoe_train.experts.grouped import add_grouped
from loramoe_train.experts.shared import SeenInput


class ExpertBank(nn.Module):
    """Stacked LoRA experts. A fresh bank (Kaiming down, zero up; as in PEFT) adds exactly nothing."""

    down_per_expert = True  # else evaluation takes the same way as training: `decoding.py` reads factors by expert
    mixes_outputs = False  # if whole outputs are mixed and not what is added, a token's weights must sum to one
    reads_base = False  # whether `begin` needs the numbers of the base's weight
    takes_adapters = True  # whether the factors of imported LoRAs can be put into it

    def __init__(
        self,
        d_in: int,
        d_out: int,
        *,
        ranks: Sequence[int],
        scales: Sequence[float],
        dropout: float = 0.0,
        form: FormChoice = "auto",
        device: torch.device | str | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if not ranks or min(ranks) < 0 or len(ranks) != len(scales):
            raise ValueError(
                f"an expert bank needs one non-negative rank and one scale per expert, got {ranks}, {scales}"
            )
        self.d_in, self.d_out, self.ranks, self.scales = d_in, d_out, tuple(ranks), tuple(scales)
        self.dropout, self.form = dropout, form
        total = sum(ranks)
        self.down = nn.Parameter(torch.empty(total, d_in, device=device, dtype=torch.float32))
        self.up = nn.Parameter(torch.zeros(total, d_out, device=device, dtype=torch.float32))
        self.register_buffer("scale_E", torch.tensor(scales, dtype=torch.float32, device=device), persistent=False)
        # experts of equal rank need no map from column to expert
        ragged = [expert for expert, rank in enumerate(ranks) for _ in range(rank)] if len(set(ranks)) > 1 else None
        columns = None if ragged is None else torch.tensor(ragged, dtype=torch.long, device=device)
        self.register_buffer("expert_R", columns, persistent=False)
        if self.down.device.type != "meta":
            bound = 1.0 / math.sqrt(d_in)  # kaiming_uniform with a = sqrt(5)
            with torch.no_grad():
                self.down.uniform_(-bound, bound, generator=generator)

    def begin(self, base: nn.Module) -> None:
        """Told once beside which frozen layer the experts stand, before trained ones are loaded."""

    @property
    def num_experts(self) -> int:
        return len(self.ranks)

    @property
    def active_dropout(self) -> float:
        """Frozen experts (downloaded ones, or those of an earlier stage) are used as they will be at inference."""
        return self.dropout if self.training and self.down.requires_grad else 0.0

    def form_for(self, most: int | None, tokens: int) -> Form:
        """How the experts are computed for a pass over `tokens` tokens with at most `most` experts each."""
        if torch.compiler.is_compiling():  # sorting tokens by expert depends on data; a compiler needs the sizes
            return "concatenated"
        return choose_form(self.form, ranks=self.ranks, most=most, tokens=tokens, device=self.down.device)

    def add_to(self, y: Tensor, seen: SeenInput) -> Tensor:
        """y (..., O) plus the experts' weighted outputs, in place where y allows it."""
        return seen.ready.add_to(y) if seen.ready is not None else self.add_with(y, seen, self.up)

    def add_with(self, y: Tensor, seen: SeenInput, up_RO: Tensor) -> Tensor:
        """The same with other up factors than the bank's own."""
        routing, hidden_NR = seen.routing, seen.hidden_NR
        if hidden_NR is None:
            stacked = (self.num_experts, self.ranks[0])
            down_ERD, up_ERO = self.down.unflatten(0, stacked), up_RO.unflatten(0, stacked)
            return add_grouped(y, seen.x_ND, routing.chosen, down_ERD, up_ERO, self.scale_E, seen.kept, seen.dtype)
        weights_NE = None if seen.unweighted else routing.weights_NE
        few = routing.chosen is not None and routing.chosen.experts_NK.shape[1] < self.num_experts
        if few and self.expert_R is None and not torch.compiler.is_compiling():
            return add_chosen(y, hidden_NR, routing.chosen, up_RO, self.scale_E)
        return add_experts(y, hidden_NR, weights_NE, up_RO, self.scale_E, self.expert_R)

    def scaled_down(self) -> Tensor:
        """(R, D): each expert's rows of `down` times its scale."""
        scale_R = self.scale_E.repeat_interleave(torch.tensor(self.ranks, device=self.scale_E.device))
        return self.down * scale_R[:, None]

    def rows(self, expert: int) -> slice:
        """Which rows of `down` and `up` belong to an expert."""
        start = sum(self.ranks[:expert])
        return slice(start, start + self.ranks[expert])

    def active_parameters(self, experts: int) -> int:
        """Scalars that a token goes through which has that many experts; of unequal ones the largest."""
        return sum(sorted(self.ranks, reverse=True)[:experts]) * (self.d_in + self.d_out)

    def delta(self, expert: int) -> Tensor:
        """(O, D) float32: what one expert with weight 1 adds to the weight; for merging, export and tests."""
        own = self.rows(expert)
        return self.scales[expert] * self.up[own].T @ self.down[own]

    def extra_repr(self) -> str:
        return f"in={self.d_in}, out={self.d_out}, ranks={self.ranks}"
