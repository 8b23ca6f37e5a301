"""A threshold per token, learned beside the gate (AdaMoLE, arXiv 2405.00361): how many experts a token gets varies.

    p = softmax(W x)        tau = ceiling * sigmoid(v x + b)        w_e = max(p_e - tau, 0) / sum_j max(p_j - tau, 0)

The gate learns through the weights, and so does the threshold. With a ceiling of at most 1/E the best expert is never
below the threshold; a token for which no expert is above it gets none. For losses the probabilities are p - tau, as in
the authors' code. Read in zefang-liu/AdaMoLE, src/adamole/layer.py; the paper itself was not at hand.

Differences: float32 throughout; weights of the gate as `nn.Linear` draws them, from the run's own generator.

Legend: N tokens, D in, E experts.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from loramoe_train.routing.context import RoutingContext
from loramoe_train.routing.types import Routing


class AdaptiveThreshold(nn.Module):
    """Gate and threshold, both linear in the site's input."""

    def __init__(
        self,
        d_in: int,
        num_experts: int,
        *,
        ceiling: float | None = None,
        device: torch.device | str | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        """`ceiling`: the largest threshold; None: 1 / num_experts. Raises ValueError for one outside (0, 1]."""
        super().__init__()
        self.ceiling = 1.0 / num_experts if ceiling is None else ceiling
        if not 0.0 < self.ceiling <= 1.0:
            raise ValueError(f"ceiling must lie in (0, 1], or be null for 1 / experts, got {ceiling}")
        self.sums_to_one = self.ceiling <= 1.0 / num_experts  # else a token may have no expert
        self.gate = nn.Parameter(torch.empty(num_experts, d_in, device=device, dtype=torch.float32))
        self.threshold = nn.Parameter(torch.empty(d_in, device=device, dtype=torch.float32))
        self.threshold_bias = nn.Parameter(torch.empty(1, device=device, dtype=torch.float32))
        bound = 1.0 / math.sqrt(d_in)  # the default of nn.Linear, weight and bias
        with torch.no_grad():
            for parameter in self.parameters():
                if parameter.device.type != "meta":
                    parameter.uniform_(-bound, bound, generator=generator)

    def forward(self, x_ND: Tensor, context: RoutingContext) -> Routing:
        # autocast would run these products in bf16, where a threshold between two experts is a matter of rounding
        with torch.autocast(x_ND.device.type, enabled=False):
            x_ND = x_ND.to(self.gate.dtype)
            logits_NE = functional.linear(x_ND, self.gate)
            height_N1 = functional.linear(x_ND, self.threshold.unsqueeze(0), self.threshold_bias)
        above_NE = logits_NE.softmax(dim=-1) - self.ceiling * torch.sigmoid(height_N1)
        kept_NE = above_NE.clamp(min=0.0)
        least = torch.finfo(kept_NE.dtype).tiny  # nobody above: 0 / least
        return Routing(kept_NE / kept_NE.sum(dim=-1, keepdim=True).clamp(min=least), logits_NE, p_NE=above_NE)
