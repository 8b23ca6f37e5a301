"""A module of the base model whose linear layers follow one routing decision, taken on the module's own input.

LLaVA-MoLE (arXiv 2401.16160): one router per feed-forward block, whose gate, up and down projections all use the expert
that it chose.
"""

from typing import Any

import torch
from torch import Tensor, nn

from loramoe_train.routing.context import RoutingContext
from loramoe_train.routing.fixed import fixed_routing
from loramoe_train.routing.seat import Seat
from loramoe_train.routing.types import Routing


class RoutedBlock(nn.Module):
    """Decides, lets the base module run, whose sites find the decision in `seat`. Adds nothing itself."""

    def __init__(self, base: nn.Module, *, seat: Seat, num_experts: int, context: RoutingContext) -> None:
        super().__init__()
        self.base, self.router, self.seat, self.context = base, seat.router, seat, context
        self.num_experts = num_experts
        self.latest: Routing | None = None  # what compiled code decided, until it is recorded

    @property
    def site(self) -> str:
        """The name of its records."""
        return self.seat.name

    @property
    def recorded(self) -> tuple[str, ...]:
        return (self.site,)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.context.mode == "off":
            return self.base(*args, **kwargs)
        routing = self.route(args, kwargs)
        self.record(routing)
        self.seat.put(routing)
        result = self.base(*args, **kwargs)
        self.seat.put(None)
        return result

    def __getattr__(self, name: str) -> Any:
        """What the base model looks for in the module that this one stands for, its sites by name included."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base"), name)

    def route(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Routing:
        """The routing of the tokens that the module is called with."""
        return self.decide(args[0] if args else kwargs["hidden_states"])

    def record(self, routing: Routing) -> None:
        """Tell the context; compiled code leaves the decision here for whoever called it."""
        if torch.compiler.is_compiling():
            self.latest = routing
        else:
            self.context.record(self.site, routing)

    def decide(self, x: Tensor) -> Routing:
        """The routing of the tokens of x (..., D), row after row."""
        x_ND = x.reshape(-1, x.shape[-1])
        fixed = fixed_routing(x_ND, self.num_experts, self.context)
        return self.router(x_ND, self.context) if fixed is None else fixed
