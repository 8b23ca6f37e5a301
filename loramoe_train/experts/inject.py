"""Put routed experts beside the planned linear layers: one pure walk that replaces modules and patches no method."""

from collections.abc import Callable, Mapping

import torch
from torch import nn

from loramoe_train.experts.bank import ExpertBank
from loramoe_train.experts.linear import ExpertLinear
from loramoe_train.experts.plan import ExpertSpec
from loramoe_train.routing.context import RoutingContext

MakeBank = Callable[[ExpertSpec, torch.device], ExpertBank]
MakeRouter = Callable[[ExpertSpec, torch.device], nn.Module | None]


def inject(
    model: nn.Module,
    plan: Mapping[str, ExpertSpec],
    *,
    make_bank: MakeBank,
    make_router: MakeRouter,
    context: RoutingContext,
) -> dict[str, ExpertLinear]:
    """Wrap every planned site of `model` in place and freeze everything else. Returns the wrappers by site name.

    Raises ValueError for an empty plan or a site that is wrapped already, AttributeError for one that does not exist.
    """
    if not plan:
        raise ValueError("the plan is empty: no site gets an expert")
    model.requires_grad_(False)
    layers = {}
    for name, spec in plan.items():
        parent_name, _, attribute = name.rpartition(".")
        parent = model.get_submodule(parent_name)
        base = parent.get_submodule(attribute)
        if isinstance(base, ExpertLinear):
            raise ValueError(f"{name} carries experts already")
        device = next(base.parameters()).device
        layer = ExpertLinear(base, make_bank(spec, device), make_router(spec, device), site=name, context=context)
        layer.train(model.training)
        setattr(parent, attribute, layer)
        layers[name] = layer
    return layers


def trainable_groups(layers: Mapping[str, ExpertLinear]) -> dict[str, dict[str, nn.Parameter]]:
    """Parameters by kind, `experts` and `routers`, under their full names in the model."""
    groups: dict[str, dict[str, nn.Parameter]] = {"experts": {}, "routers": {}}
    for site, layer in layers.items():
        groups["experts"].update({f"{site}.bank.{name}": p for name, p in layer.bank.named_parameters()})
        if layer.router is not None:
            groups["routers"].update({f"{site}.router.{name}": p for name, p in layer.router.named_parameters()})
    return groups
