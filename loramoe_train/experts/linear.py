"""A frozen linear layer with routed experts beside it: y = W x + sum_e w_e(x) s_e up_e^T down_e x.

The wrapper has no `.weight`: a fused kernel that reads the raw weight fails instead of ignoring the experts unnoticed.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from loramoe_train.experts.bank import ExpertBank
from loramoe_train.experts.decoding import Ready
from loramoe_train.experts.shared import SharedInput
from loramoe_train.routing.context import RoutingContext
from loramoe_train.routing.fixed import fixed_routing, most_per_domain
from loramoe_train.routing.seat import Seat
from loramoe_train.routing.types import Routing


class ExpertLinear(nn.Module):
    """Serves one site: asks for a routing decision, records it, adds the weighted experts to the base's output."""

    def __init__(
        self,
        base: nn.Module,
        bank: ExpertBank,
        router: nn.Module | None,
        *,
        site: str,
        context: RoutingContext,
        seat: Seat | None = None,
        records: bool = True,
    ) -> None:
        """`seat`: where the decision of another module lies, which then records it. `records`: whether this one may."""
        super().__init__()
        self.base, self.bank, self.router = base, bank, router
        self.site, self.context, self.seat = site, context, seat
        self.records = records and seat is None
        self.shared, self.place = SharedInput([self]), 0  # `share` puts it together with others
        self.latest: Routing | None = None  # what compiled code decided, until it is recorded
        bank.begin(base)

    @property
    def in_features(self) -> int:
        return self.bank.d_in

    @property
    def out_features(self) -> int:
        return self.bank.d_out

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        if self.context.mode == "off":
            return y
        if self.training and not self.context.is_open:
            raise RuntimeError(f"{self.site}: training forward outside `with context.open(tokens):`")
        seen = self.shared.see(self, x, y.dtype)
        if type(seen) is Ready:
            return seen.add_to(y)
        if not self.records:
            pass
        elif torch.compiler.is_compiling():
            self.latest = seen.routing  # compiled code that knew the site's name would serve one layer alone
        else:
            self.context.record(self.site, seen.routing)
        return self.bank.add_to(y, seen)

    def train(self, mode: bool = True) -> "ExpertLinear":
        self.shared.forget()
        return super().train(mode)

    # -- routing -------------------------------------------------------------------------------------------------------

    @property
    def linear_score(self) -> tuple[Tensor, Tensor | None] | None:
        """(weight, bias) of the router where it is asked and its logits are a linear map of the site's input."""
        return self._offer("linear_score")

    @property
    def is_unweighted(self) -> bool:
        """Whether every expert has weight 1: nothing is routed here."""
        return self.context.mode == "learned" and self.router is None and self.seat is None

    def most_experts(self) -> int | None:
        """How many experts `Routing.chosen` will hold for each token in this mode; None where it is not made."""
        if self.context.mode == "by_domain":
            return most_per_domain(self.context.num_domains, self.bank.num_experts)
        if self.seat is not None:
            return getattr(self.seat.router, "most", None) if self.context.mode == "learned" else None
        return self._offer("most")

    def _offer(self, fact: str) -> Any:
        """What a router may say about itself, so that less work is done; one that says nothing is asked per site."""
        return getattr(self.router, fact, None) if self.context.mode == "learned" else None

    def decide(self, x_ND: Tensor) -> Routing:
        """The routing of the mode in force: learned, by domain, or uniform."""
        if self.seat is not None:
            return self.seat.take()
        experts = self.bank.num_experts
        fixed = fixed_routing(x_ND, experts, self.context)
        if fixed is not None:
            return fixed
        if self.router is None:
            return Routing(torch.ones(1, experts, dtype=torch.float32, device=x_ND.device).expand(x_ND.shape[0], -1))
        return self.router(x_ND, self.context)

    def learned(self) -> Iterator[nn.Parameter]:
        """The parameters of bank and router."""
        yield from self.bank.parameters()
        if self.router is not None:
            yield from self.router.parameters()


def share(members: list[ExpertLinear]) -> None:
    """Let layers that read the same tensor share their work, in the order in which the model calls them."""
    shared = SharedInput(members)
    for place, member in enumerate(members):
        member.shared, member.place = shared, place
    members[0].context.on_close.append(shared.forget_waiting)
