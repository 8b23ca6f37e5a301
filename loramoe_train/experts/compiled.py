"""Decoder layers whose training passes run compiled: each layer is one region, layers that are alike share its code.

The layers stay the modules that they are (names, parameters, state dict), as after `nn.Module.compile`. Compiled code
must not depend on anything that differs from layer to layer or from step to step, or it would be compiled anew for
each. So a site inside does not record its decision under its own name but leaves it on itself, and what calls the
compiled code records it.

Passes in evaluation mode run as if nothing was compiled: generation's shapes grow token by token. Checkpointing goes
around the compiled code (transformers puts it inside, from where a decision could not get out).
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import nn

from loramoe_train.experts.block import RoutedBlock
from loramoe_train.experts.linear import ExpertLinear
from loramoe_train.experts.products import multiplies_natively

VARIANTS = 16  # of one layer: with and without gradient, first layer and others, one row and many, by stage


def compile_layers(
    layers: nn.ModuleList, deciding: Iterable[ExpertLinear | RoutedBlock], *, backend: str = "inductor"
) -> None:
    """Let every layer run compiled in training mode, in one graph, from its first call on.

    Args:
        layers: the decoder layers, with experts in place and activation checkpointing set up. Not compiled before.
        deciding: the modules of the model that take decisions and record them.
    """
    torch.compiler.assume_constant_result(multiplies_natively)  # asks the device, which cannot be traced
    options: dict[str, Any] = {"backend": backend, "fullgraph": True, "dynamic": True}
    if backend == "inductor":
        # dropout then draws what it draws uncompiled: the same masks in all passes of a step, whatever is fused in each
        options["options"] = {"fallback_random": True}
    wrappers = {id(module) for module in deciding}
    for layer in layers:
        own = tuple(module for module in layer.modules() if id(module) in wrappers)
        layer.compile(**options, recompile_limit=VARIANTS * len(layers))
        layer._compiled_call_impl = _CompiledCall(layer, own, layer._compiled_call_impl)


class _CompiledCall:
    """What a layer does when it is called."""

    def __init__(
        self, layer: nn.Module, sites: tuple[ExpertLinear | RoutedBlock, ...], compiled: Callable[..., Any]
    ) -> None:
        self.layer, self.sites, self.compiled = layer, sites, compiled
        self.checkpoint: Callable[..., Any] | None = None
        if getattr(layer, "gradient_checkpointing", False):
            self.checkpoint, layer.gradient_checkpointing = layer._gradient_checkpointing_func, False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self.layer.training:
            return self.layer._call_impl(*args, **kwargs)
        if self.checkpoint is None:
            return self._run(*args, **kwargs)
        return self.checkpoint(partial(self._run, **kwargs), *args)

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        result = self.compiled(*args, **kwargs)
        for site in self.sites:
            if site.latest is not None:
                site.context.record(site.site, site.latest)
                site.latest = None  # else it would keep the graph of the pass alive
        return result
