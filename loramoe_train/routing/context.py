"""Side information for the routed layers, handed to each of them once, at injection.

A layer asks the context for its routing mode and for facts about the tokens; the context collects what each site
decided. Three rules keep that honest:

- The context stays open until backward has ended: gradient checkpointing runs layers again during backward, and they
  must find the same tokens. A layer in training mode that finds it closed raises.
- Records are a dict by site, so a recomputed layer overwrites its record and nothing is counted twice.
- In evaluation mode a closed context is fine: nothing is recorded, so a generation loop can just call the model.
  Routing that depends on an example's task or domain must then be told whose examples are being answered (`serving`).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor

from loramoe_train.routing.prompts import Prompts, Sequences, prompts_of_batch
from loramoe_train.routing.types import Origin, Routing, Tokens

Mode = Literal["learned", "by_domain", "uniform", "off"]


class RoutingContext:
    """The one object that all routed layers of a model share."""

    def __init__(self, num_domains: int = 1) -> None:
        self.num_domains = num_domains
        self.mode: Mode = "learned"
        self.records: dict[str, Routing] = {}
        self.passes = 0  # how often the context was opened: what was computed in one pass is not used in another
        self.on_close: list[Callable[[], None]] = []  # told when a pass has ended, also by an error
        self._tokens: Tokens | None = None
        self._served: dict[Origin, int | None] = {"task": None, "domain": None}
        self.prompt: int | None = None  # where the prompt ends in a call that begins sequences; None: with the call
        self.sequences = Sequences()  # outside a batch
        self.reads_prompts = False  # whether anybody will ask for `prompts`
        self._prompts: Prompts | None = None

    @property
    def is_open(self) -> bool:
        return self._tokens is not None

    @property
    def tokens(self) -> Tokens:
        """The tokens of the batch in flight; raises RuntimeError when the context is closed."""
        if self._tokens is None:
            raise RuntimeError("the routing context is closed: run the model inside `with context.open(tokens):`")
        return self._tokens

    @contextmanager
    def open(self, tokens: Tokens) -> Iterator[dict[str, Routing]]:
        """Give the layers the tokens of one forward and backward pass; yields the records. Nesting is refused."""
        if self._tokens is not None:
            raise RuntimeError("the routing context is open already: close it after backward")
        self._tokens, self.records = tokens, {}
        if self.reads_prompts and tokens.sample_N is not None:  # once, and outside of what is compiled
            self._prompts = prompts_of_batch(tokens)
        self.passes += 1
        try:
            yield self.records
        finally:
            self._tokens, self._prompts, self.records = None, None, {}
            for tell in self.on_close:
                tell()

    @contextmanager
    def override(self, mode: Mode) -> Iterator[None]:
        """Route differently for a while: `off` is the base model bit for bit, `uniform` the average of all experts."""
        before, self.mode = self.mode, mode
        try:
            yield
        finally:
            self.mode = before

    @contextmanager
    def serving(
        self, *, task: int | None = None, domain: int | None = None, prompt: int | None = None
    ) -> Iterator[None]:
        """Answer examples of one task or domain (indices of the mixture) for a while, whatever the tokens say.

        `prompt`: how many positions of each row are prompt, padding included, for calls that hold more than the prompt
        and have no cache to tell.
        """
        before = self._served, self.prompt
        self._served, self.prompt = {"task": task, "domain": domain}, prompt
        try:
            yield
        finally:
            self._served, self.prompt = before

    def origin(self, of: Origin, tokens: int, device: torch.device) -> Tensor:
        """(N,) int64: the task or domain that each of the `tokens` tokens comes from, -1 on padding.

        Raises RuntimeError where nobody told.
        """
        served = self._served[of]
        if served is not None:
            return torch.full((tokens,), served, dtype=torch.long, device=device)
        if self._tokens is None:
            raise RuntimeError(f"routing depends on the {of}: run the model inside `with context.serving({of}=INDEX):`")
        return self._tokens.task_N if of == "task" else self._tokens.domain_N

    def prompts(self, x_BSD: Tensor) -> Prompts:
        """Of the rows that a layer is called with, in a batch or where sequences begin."""
        if self._tokens is None:
            return self.sequences.prompts(*x_BSD.shape[:2], x_BSD.device, self.prompt)
        return prompts_of_batch(self._tokens, x_BSD.shape[0]) if self._prompts is None else self._prompts

    def record(self, site: str, routing: Routing) -> None:
        if self._tokens is not None:
            self.records[site] = routing
