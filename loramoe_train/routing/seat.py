"""A decision that several sites follow: taken once per pass by whoever owns it, and put where they find it.

Owners are the modules of `experts/block.py` (one decision for the linear layers of a block) and whatever decides for
wider scopes. An owner puts its decision down before its sites are called and clears it after: a site that finds nothing
was called around its owner, which is an error and never a guess.
"""

from torch import nn

from loramoe_train.routing.types import Routing


class Seat:
    """Where the sites of one owner find their routing. `name` is that of the owner, and of its records."""

    def __init__(self, name: str, router: nn.Module) -> None:
        self.name, self.router = name, router
        self._routing: Routing | None = None

    def put(self, routing: Routing | None) -> None:
        """The decision of the pass in flight; None when it has ended."""
        self._routing = routing

    def take(self) -> Routing:
        """Raises RuntimeError where nothing was decided."""
        if self._routing is None:
            raise RuntimeError(f"a site that follows {self.name} was called outside it: nothing is decided there")
        return self._routing
