"""Routing by where an example comes from, its task or its task's domain, and not by its tokens.

Such a decision is the same for every token of an example, for its beams and with any cache; and it is a static route,
which `loramoe-export` folds into one LoRA. In training the batch tells the origin, in evaluation `context.serving`.

Legend: N tokens, D in, T tasks (or domains), V width of the embedding, E experts.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from loramoe_train.routing.context import RoutingContext
from loramoe_train.routing.fixed import domain_routing, most_per_domain
from loramoe_train.routing.types import Origin, Routing


class OriginScore(nn.Module):
    """logits = W v_t: a learned embedding v_t of each task t, and a linear map of it (MOELoRA, arXiv 2310.18339).

    Padding comes from nowhere: its logits are zero.
    """

    def __init__(
        self,
        num_experts: int,
        num_tasks: int,
        num_domains: int,
        *,
        origin: Origin,
        width: int = 64,
        device: torch.device | str | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        """Raises ValueError for an unknown origin or a width below 1."""
        super().__init__()
        if width < 1:
            raise ValueError(f"width must be at least 1, got {width}")
        self.origin, count = origin, _count(origin, num_tasks, num_domains)
        self.embedding = nn.Parameter(torch.empty(count, width, device=device, dtype=torch.float32))
        self.weight = nn.Parameter(torch.empty(num_experts, width, device=device, dtype=torch.float32))
        if self.weight.device.type != "meta":
            bound = 1.0 / math.sqrt(width)
            with torch.no_grad():  # both as torch's own layers start: the product of two zeros would never learn
                self.embedding.normal_(0.0, 1.0, generator=generator)
                self.weight.uniform_(-bound, bound, generator=generator)

    def forward(self, x_ND: Tensor, context: RoutingContext) -> Tensor:
        """(N, E) float32. Raises RuntimeError where nobody told the origin."""
        origin_N = context.origin(self.origin, len(x_ND), x_ND.device)
        with torch.autocast(x_ND.device.type, enabled=False):
            logits_TE = functional.linear(self.embedding, self.weight)
            # a product, not a look-up: its gradient adds up in a fixed order, and padding (-1) is a row of zeros
            is_from_NT = origin_N[:, None] == torch.arange(len(logits_TE), device=x_ND.device)
            return is_from_NT.to(logits_TE.dtype) @ logits_TE


class HardByOrigin(nn.Module):
    """Each task's (or domain's) own experts with weights that sum to one, in training and evaluation; nothing to learn.

    With as many experts as tasks every task has one. Which it is, and what happens otherwise, says `domain_table`.
    """

    scores = False  # no logits, so no auxiliary loss
    sums_to_one = True  # of all that is no padding

    def __init__(self, num_experts: int, num_tasks: int, num_domains: int, *, origin: Origin) -> None:
        """Raises ValueError for an unknown origin."""
        super().__init__()
        self.origin, self.num_experts = origin, num_experts
        self.count = _count(origin, num_tasks, num_domains)

    @property
    def most(self) -> int:
        """How many experts `Routing.chosen` holds for each token."""
        return most_per_domain(self.count, self.num_experts)

    def forward(self, x_ND: Tensor, context: RoutingContext) -> Routing:
        origin_N = context.origin(self.origin, len(x_ND), x_ND.device)
        return domain_routing(origin_N, self.count, self.num_experts)


def _count(origin: Origin, num_tasks: int, num_domains: int) -> int:
    if origin not in ("task", "domain"):
        raise ValueError(f"origin must be task or domain, got '{origin}'")
    return num_tasks if origin == "task" else num_domains
