"""One decision for the whole model, on what its base alone makes of the same tokens (X-LoRA, arXiv 2402.07148).

    h_n = last hidden state of the base at token n, after the final norm: experts off, without gradient   (first pass)
    w_n = router(h_n)                                          one row for all sites, or one for each of them
    y   = the forward pass, in which every site weighs its experts by w_n                                (second pass)

The first pass runs the module that holds the decoder layers, so it has no LM head, whoever calls the model and how. In
training the decision stands until the context closes, since checkpointing runs layers again in backward; in evaluation
it ends with the pass.

**With a key-value cache** decoding stays exact. h_n depends on the tokens up to n alone, so the first pass goes on from
a cache of its own, which lies among the layers of the caller's cache: whatever reorders, repeats or crops that one, as
beam search does, does the same to this one. A cache that was filled without a first pass is refused: what follows would
get weights that were decided without the tokens in it.

Legend: B rows, S positions, N = B * S tokens, D width.
"""

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from loramoe_train.errors import ConfigError
from loramoe_train.experts.decisions import DecisionSpec
from loramoe_train.routing.context import RoutingContext
from loramoe_train.routing.fixed import fixed_routing
from loramoe_train.routing.prompts import CACHES
from loramoe_train.routing.seat import Seat
from loramoe_train.routing.types import apart

EXTRAS = ("output_hidden_states", "output_attentions", "return_dict")  # what the first pass is not asked for
LINK = "_of_first_pass"  # attribute of a cache: that of the first pass


class FirstPass:
    """Decides for the model around the module whose hooks it becomes. Its router is that module's `router`."""

    def __init__(
        self, backbone: nn.Module, decision: DecisionSpec, seats: Mapping[str, Seat], context: RoutingContext
    ) -> None:
        """`seats`: site -> where it alone finds its part; all know the one router."""
        self.name, self.recorded, self.num_experts = decision.name, decision.records, decision.num_experts
        self.seats = {site: seats[site] for site in decision.sites}
        self.router, self.context = seats[decision.sites[0]].router, context
        self._arguments = tuple(inspect.signature(backbone.forward).parameters)
        self._caches: tuple[Any, Any] | None = None  # the caller's, if given, and that of the pass in flight
        self._decided = 0  # in which opening of the context
        backbone.add_module("router", self.router.train(backbone.training))
        backbone.register_forward_pre_hook(self._before, with_kwargs=True)
        backbone.register_forward_hook(self._after, with_kwargs=True, always_call=True)
        context.on_close.append(self._clear)

    # -- around the module's forward -----------------------------------------------------------------------------------

    def _before(self, backbone: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Decide and put the decision down. Raises RuntimeError where it could not be right."""
        if self.context.mode == "off":
            return
        if torch.compiler.is_compiling():
            raise RuntimeError(f"{self.name} runs twice in every pass (router.scope=model): compile its layers alone")
        if backbone.training:
            self._check_training()
        given = dict(zip(self._arguments, args, strict=False)) | kwargs
        tokens = given["input_ids"] if given.get("input_ids") is not None else given["inputs_embeds"]
        routing = fixed_routing(tokens.reshape(tokens.shape[:2].numel(), -1), self.num_experts, self.context)
        if routing is None:
            routing = self.router(self._last_hidden(backbone, given).flatten(0, 1), self.context)
        together = routing.weights_NE.dim() == 3  # a part for each site
        parts = apart(routing) if together else [routing] * len(self.seats)
        for seat, own in zip(self.seats.values(), parts, strict=True):
            seat.put(own)
        for name, own in zip(self.recorded, parts, strict=False):  # one name alone where the decision is one
            self.context.record(name, own)

    def _after(self, backbone: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """End the decision where nothing will ask for it again; `output` is None where the forward raised."""
        if self.context.mode == "off":
            return
        caches, self._caches = self._caches, None
        if output is not None and backbone.training:
            self._check_asked()
        elif output is not None and caches is not None:
            cache, first = caches
            _link(_cache_in(output) if cache is None else cache, first)
        if not backbone.training:
            self._clear()

    def _check_training(self) -> None:
        if not self.context.is_open:
            raise RuntimeError(f"{self.name}: training forward outside `with context.open(tokens):`")
        if self._decided == self.context.passes:  # checkpointing would run the first forward's layers with the second's
            raise RuntimeError(f"{self.name}: a second training forward inside one `with context.open(tokens):`")
        self._decided = self.context.passes

    def _check_asked(self) -> None:
        """Sites that follow have no records of their own to be missed by."""
        bypassed = [site for site, seat in self.seats.items() if not seat.taken]
        if bypassed:
            raise ConfigError(
                f"experts.sites: the model never called {len(bypassed)} of {len(self.seats)} sites, so their experts do"
                f" nothing: {', '.join(bypassed[:3])}; leave them out"
            )

    def _clear(self) -> None:
        for seat in self.seats.values():
            seat.put(None)

    # -- the decision --------------------------------------------------------------------------------------------------

    def _last_hidden(self, backbone: nn.Module, given: dict[str, Any]) -> Tensor:
        """(B, S, D): the first pass. A cache is kept only where the caller keeps one."""
        name = next((name for name in CACHES if given.get(name) is not None), None)
        own = {key: value for key, value in given.items() if key not in (*CACHES, *EXTRAS)}
        own["use_cache"] = name is not None or given.get("use_cache") is True
        cache = None if name is None else given[name]
        if cache is not None:
            own[name] = self._first_of(cache)
        with torch.no_grad(), self.context.override("off"):
            output = backbone(**own, return_dict=True)
        self._caches = (cache, _cache_in(output)) if own["use_cache"] else None
        return output[0]

    def _first_of(self, cache: Any) -> Any:
        """The cache of the first pass that belongs to the caller's; None where both are still empty."""
        if type(cache).__name__ != "DynamicCache":  # a mask made for a cache of fixed size fits no other
            raise RuntimeError(
                f"router.scope=model: the first pass cannot go on beside a {type(cache).__name__}; generate with"
                " cache_implementation=None, or use_cache=False"
            )
        first, length = getattr(cache, LINK, None), _length(cache)
        if length != (0 if first is None else _length(first)):
            raise RuntimeError(
                f"router.scope=model: the cache holds {length} tokens on which {self.name} took no decision; generate"
                " from the prompt on in one mode of routing, or pass use_cache=False"
            )
        return first


def add_first_passes(
    model: nn.Module, decisions: Iterable[DecisionSpec], seats: Mapping[str, Seat], context: RoutingContext
) -> dict[str, FirstPass]:
    """Let the modules that hold the decoder layers decide for all sites; call it once those are wrapped.

    Args:
        seats: site -> where it finds its decision.

    Raises ConfigError where the decoder layers are the model's own: then nothing gives hidden states without logits.
    """
    owners = {}
    for decision in decisions:
        if not decision.name:
            raise ConfigError("router.scope=model needs a model that keeps its decoder layers in a module of their own")
        owners[decision.name] = FirstPass(model.get_submodule(decision.name), decision, seats, context)
    return owners


def _cache_in(output: Any) -> Any:
    """The cache among a model's outputs, or None."""
    parts = output if isinstance(output, tuple) else output.values()
    return next((part for part in parts if hasattr(part, "reorder_cache")), None)


def _link(cache: Any, first: Any) -> None:
    """Let the caller's cache, now that it has all its layers, take those of the first pass along."""
    if cache is not None and getattr(cache, LINK, None) is None:
        cache.layers.extend(first.layers)
        setattr(cache, LINK, first)


def _length(cache: Any) -> int:
    """Tokens in a cache; state-space layers do not count theirs, so 1 for any number."""
    try:
        return cache.get_seq_length()
    except ValueError:
        return int(cache.has_previous_state())
