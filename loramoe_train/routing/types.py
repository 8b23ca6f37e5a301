"""The shared vocabulary of routing: what was decided for a token, and what is known about the tokens of a batch.

Legend: B rows, S positions, N = B * S tokens, E experts, K experts that a token may have, M sites.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Origin = Literal["task", "domain"]  # where an example comes from: its task in the mixture, or the task's domain


@dataclass(frozen=True)
class Chosen:
    """The few experts of each token: what sparse computation needs of a decision."""

    experts_NK: Tensor  # int64, no expert twice for one token
    weights_NK: Tensor  # float32, the weights of those, some of which may be 0; every other weight is 0


@dataclass(frozen=True)
class Routing:
    """One decision of one router in one forward pass; never changed afterwards."""

    weights_NE: Tensor  # float32, 0 where a token does not use an expert
    logits_NE: Tensor | None = None  # float32, before normalising; None where nothing was scored
    chosen: Chosen | None = None  # the same weights by token; None where their number has no bound
    p_NE: Tensor | None = None  # what a loss takes for the probabilities; None: the softmax of the logits


def apart(together: Routing) -> list[Routing]:
    """The decisions of M sites, from one whose tensors are (N, M, ...)."""
    sites = range(together.weights_NE.shape[1])
    weights, chosen = together.weights_NE.unbind(1), together.chosen
    logits = [None] * len(sites) if together.logits_NE is None else together.logits_NE.unbind(1)
    p = [None] * len(sites) if together.p_NE is None else together.p_NE.unbind(1)
    if chosen is None:
        return [Routing(weights[m], logits[m], None, p[m]) for m in sites]
    experts_MNK, weights_MNK = chosen.experts_NK.unbind(1), chosen.weights_NK.unbind(1)
    return [Routing(weights[m], logits[m], Chosen(experts_MNK[m], weights_MNK[m]), p[m]) for m in sites]


@dataclass(frozen=True)
class Tokens:
    """What is known about the N tokens of a batch, row after row; padding is marked here and nowhere else.

    `valid` is the explicit token mask of the collator: never derived from token ids or from an attention mask.
    `task` and `domain` are -1 on padding. `supervised` is true where the token at that position carries loss. `sample`
    numbers the examples of the batch from 0, -1 on padding; packed rows hold several.
    """

    valid_N: Tensor  # bool
    task_N: Tensor  # int64, index into the mixture's tasks
    domain_N: Tensor  # int64, index into the mixture's domains
    supervised_N: Tensor  # bool
    sample_N: Tensor | None = None  # int64, in [0, num_samples); None where nobody told
    num_samples: int = 0

    def to(self, device: torch.device) -> "Tokens":
        moved = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return Tokens(**{**vars(self), **moved})
