"""What a router thinks of each expert for a token: float32 logits (N, E) from the router's input (N, D)."""

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

Init = Literal["zeros", "normal", "kaiming"]


class LinearScore(nn.Module):
    """logits = W x (+ b), computed in float32.

    `init` zeros starts at the uniform average of the experts (safe over imported adapters); normal draws N(0, std^2)
    and leaves the bias at zero; kaiming is the default of `nn.Linear`, bias included.
    """

    def __init__(
        self,
        d_in: int,
        num_experts: int,
        *,
        bias: bool = False,
        init: Init = "zeros",
        std: float = 0.02,
        device: torch.device | str | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(num_experts, d_in, device=device, dtype=torch.float32))
        self.bias = nn.Parameter(torch.zeros(num_experts, device=device, dtype=torch.float32)) if bias else None
        _draw(self, init, std, generator)

    @property
    def linear(self) -> tuple[Tensor, Tensor | None]:
        """(weight (E, D), bias (E,) or None): lets sites that read the same input be scored in one product."""
        return self.weight, self.bias

    def forward(self, x_ND: Tensor) -> Tensor:
        # Autocast would run this product in bf16 and change which experts win for about one token in a hundred.
        with torch.autocast(x_ND.device.type, enabled=False):
            return functional.linear(x_ND.to(self.weight.dtype), self.weight, self.bias)


class OutputScore(nn.Module):
    """logits = W n(o), from the experts' outputs o on a sequence, side by side; n scales all of them together to norm
    one, so that their sizes beside each other remain (MoLE, arXiv 2404.13628, whose normalisation has no name).

    `init`: as in `LinearScore`.
    """

    reads = "outputs"  # (Q, E, D), which a block makes

    def __init__(
        self,
        d_in: int,
        num_experts: int,
        *,
        init: Init = "zeros",
        std: float = 0.02,
        device: torch.device | str | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        """`d_in`: width of an output."""
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(num_experts, num_experts * d_in, device=device, dtype=torch.float32))
        _draw(self, init, std, generator)

    def forward(self, outputs_QED: Tensor) -> Tensor:
        """(Q, E) in the weight's dtype."""
        with torch.autocast(outputs_QED.device.type, enabled=False):
            beside_QF = functional.normalize(outputs_QED.to(self.weight.dtype).flatten(start_dim=1), dim=1)
            return functional.linear(beside_QF, self.weight)


def _draw(score: nn.Module, init: Init, std: float, generator: torch.Generator | None) -> None:
    """Fill a score's parameters, which are zeros. ValueError for an unknown `init`."""
    if init not in ("zeros", "normal", "kaiming"):
        raise ValueError(f"init must be zeros, normal or kaiming, got '{init}'")
    if score.weight.device.type == "meta" or init == "zeros":
        return
    with torch.no_grad():
        if init == "normal":
            score.weight.normal_(0.0, std, generator=generator)
        else:
            bound = 1.0 / math.sqrt(score.weight.shape[1])
            for parameter in score.parameters():
                parameter.uniform_(-bound, bound, generator=generator)
