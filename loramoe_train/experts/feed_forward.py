"""What a feed-forward block computes, as far as mixing whole copies of it needs to know.

    gated        out(act(gate x) * up x)       Llama, Qwen, Mistral, Gemma: three linear layers
    fused        the same, gate and up the halves of one linear layer's output (Phi-3)
    plain        out(act(up x))                GPT-NeoX, Phi-2: two linear layers

Told from the sizes of the block's sites, in the order of the model group's `ffn` names (gate, up, out), and from the
activation that the module holds. Whether the module computes just that is then tried on numbers: some models add steps
of their own between the layers.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from loramoe_train.errors import ConfigError
from loramoe_train.experts.bank import ExpertBank
from loramoe_train.experts.sites import Site

ACTIVATIONS = ("act_fn", "activation_fn", "act")  # what transformers' modules call it
TRIED_ROWS = 2
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-9}  # of the largest output; half precision rounds in between
HALF_TOLERANCE = 0.05


@dataclass(frozen=True)
class FeedForward:
    """The parts of one block, by the names of its own attributes."""

    into: tuple[str, ...]  # linear layers that read the block's input: gate and up, both in one, or up
    out: str
    activation: str
    gated: bool

    def halves(self, inner: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
        """(what the activation sees (..., F), what its result is multiplied with or None) of what `into` give."""
        if not self.gated:
            return inner[0], None
        first, second = inner if len(inner) == 2 else inner[0].chunk(2, dim=-1)
        return first, second

    def compute(self, block: nn.Module, x: Tensor) -> Tensor:
        """What the block is taken to compute, by its own layers."""
        gate, up = self.halves([getattr(block, name)(x) for name in self.into])
        inner = getattr(block, self.activation)(gate)
        return getattr(block, self.out)(inner if up is None else inner * up)


def describe(name: str, block: nn.Module, sites: Sequence[Site]) -> FeedForward:
    """The parts of the block called `name`, whose sites come in the order of the model group. Needs no weights.

    Raises ConfigError where the sites are not those of one such feed-forward block, or the module has no activation.
    """
    names = tuple(site.name.rpartition(".")[2] for site in sites)
    shapes = [(site.in_features, site.out_features) for site in sites]
    activation = next((a for a in ACTIVATIONS if callable(getattr(block, a, None))), None)
    *into, (inner, width) = shapes
    reads = all(shape[0] == width for shape in into)
    kinds = {(inner, inner): True, (2 * inner,): True, (inner,): False}  # outputs of `into` -> gated
    gated = kinds.get(tuple(shape[1] for shape in into))
    if activation is None or gated is None or not reads:
        raise ConfigError(
            f"experts.mixing=output mixes copies of a whole feed-forward block, but the sites of {name}"
            f" ({', '.join(names)}) are not the layers of one that it knows (gate, up and down; gate_up and down; up"
            " and down); set experts.sites=[ffn], or experts.mixing=delta"
        )
    return FeedForward(names[:-1], names[-1], activation, gated)


def check_bank(bank: ExpertBank) -> None:
    """Raises ConfigError for a bank of anything but pairs of factors, or such with stretched rows (`mixes_outputs`)."""
    if type(bank) is not ExpertBank and not bank.mixes_outputs:
        raise ConfigError(
            f"experts.make._target_ makes a {type(bank).__name__}, but experts.mixing=output computes plain LoRA pairs"
            " and those of experts=magnitude alone; use one of them, or experts.mixing=delta"
        )


def check_weights(router: nn.Module, key: str = "router.make") -> None:
    """Raises ConfigError for a router whose weights need not sum to one: they would rescale the frozen block."""
    if getattr(router, "sums_to_one", False):
        return
    said = f"{key}, a {type(router).__name__}"
    for training, policy in getattr(router, "policies", {}).items():
        if not policy.sums_to_one(router.normalise):
            said = f"{key}.{'train' if training else 'evaluate'}.weight={policy.weight}"
            break
    raise ConfigError(
        "experts.mixing=output needs weights that sum to one for every token, else the frozen block itself is rescaled,"
        f" and {said} does not promise that; set weight=renormalised (router=topk), or experts.mixing=delta"
    )


@torch.no_grad()
def try_out(name: str, block: nn.Module, shape: FeedForward) -> None:
    """Compare the block with what it is taken to compute, on a few random rows; experts off.

    Raises ConfigError where they differ: the model does something between the layers that copies would leave out.
    """
    linear = getattr(block, shape.into[0])
    parameter = next(linear.parameters())
    dtype = parameter.dtype if parameter.is_floating_point() else torch.float32
    rows = torch.randn(TRIED_ROWS, linear.in_features, generator=torch.Generator().manual_seed(0))
    x = rows.to(device=parameter.device, dtype=dtype)
    wanted, found = block(x), shape.compute(block, x)
    largest = TOLERANCE.get(dtype, HALF_TOLERANCE) * wanted.abs().max()
    if wanted.shape != found.shape or not bool(((wanted - found).abs() <= largest).all()):
        raise ConfigError(
            f"experts.mixing=output: {name} ({type(block).__name__}) does more between its layers than the activation,"
            " so copies of it cannot be computed; set experts.mixing=delta"
        )
