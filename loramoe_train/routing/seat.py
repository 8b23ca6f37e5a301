"""A decision that several sites follow: taken once per pass by whoever owns it, and put where they find it.

Owners are those of `experts/block.py` (one decision for the linear layers of a block) and of `experts/first_pass.py`
(for all of the model, where each site may have its own part). An owner puts its decision down before its sites are
called and clears it after: a site that finds nothing was called around its owner, which is an error and never a guess.
"""

from typing import Protocol

from torch import nn

from loramoe_train.routing.types import Routing


class Seat:
    """Where the sites of one owner find their routing, all in one seat or each in its own. `name` is the owner's."""

    def __init__(self, name: str, router: nn.Module) -> None:
        self.name, self.router = name, router
        self._routing: Routing | None = None
        self.taken = False  # whether a site has asked since the decision was put down

    def put(self, routing: Routing | None) -> None:
        """The decision of the pass in flight; None when it has ended."""
        self._routing, self.taken = routing, False

    def take(self) -> Routing:
        """Raises RuntimeError where nothing was decided."""
        if self._routing is None:
            raise RuntimeError(f"a site that follows {self.name} was called outside it: nothing is decided there")
        self.taken = True
        return self._routing


class Owner(Protocol):
    """What decides for several sites."""

    router: nn.Module

    @property
    def recorded(self) -> tuple[str, ...]:
        """Names of its records."""
        ...
