"""What a router thinks of each expert for a token: float32 logits (N, E) from the router's input (N, D).

Legend: N tokens, D in, E experts, H heads, Q sequences.
"""

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


class MLPScore(nn.Module):
    """logits = W_n a_(n-1) + b_n with a_0 = x and a_i = dropout(relu(W_i a_(i-1) + b_i)), in float32, for `depth` n.

    The classifier of X-LoRA (arXiv 2402.07148). With `heads` there are logits for that many sites: (N, H, E).
    """

    def __init__(
        self,
        d_in: int,
        num_experts: int,
        *,
        depth: int = 1,
        width: int = 2048,
        dropout: float = 0.0,
        init: Literal["zeros", "kaiming"] = "kaiming",
        heads: int | None = None,
        device: torch.device | str | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        """`depth`: linear layers, of which all but the last have `width` outputs and start as `nn.Linear` does.

        `init`: of the last one; zeros starts at the uniform average of the experts. Raises ValueError for other values.
        """
        super().__init__()
        if depth < 1 or width < 1:
            raise ValueError(f"depth and width must be at least 1, got {depth} and {width}")
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"dropout must lie in [0, 1), got {dropout}")
        if init not in ("zeros", "kaiming"):
            raise ValueError(f"init must be zeros or kaiming, got '{init}'")
        self.dropout, self.shape = dropout, (num_experts,) if heads is None else (heads, num_experts)
        ins, outs = [d_in, *[width] * (depth - 1)], [*[width] * (depth - 1), math.prod(self.shape)]
        inits = [*["kaiming"] * (depth - 1), init]
        self.layers = nn.ModuleList(
            LinearScore(*sizes, bias=True, init=how, device=device, generator=generator)
            for *sizes, how in zip(ins, outs, inits, strict=True)
        )

    def forward(self, x_ND: Tensor) -> Tensor:
        *hidden, last = self.layers
        for layer in hidden:
            x_ND = functional.dropout(functional.relu(layer(x_ND)), self.dropout, self.training)
        return last(x_ND).unflatten(-1, self.shape)


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
