"""Put routed experts beside the planned linear layers: one pure walk that replaces modules and patches no method."""

from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor, nn

from loramoe_train.experts.bank import ExpertBank
from loramoe_train.experts.block import RoutedBlock
from loramoe_train.experts.decisions import DecisionSpec
from loramoe_train.experts.feed_forward import FeedForward
from loramoe_train.experts.linear import ExpertLinear, share
from loramoe_train.experts.mixed_block import MixedBlock
from loramoe_train.experts.plan import ExpertSpec
from loramoe_train.experts.probed import ProbedBlock
from loramoe_train.routing.context import RoutingContext
from loramoe_train.routing.seat import Owner, Seat

MakeBank = Callable[[ExpertSpec, torch.device], ExpertBank]
MakeRouter = Callable[[ExpertSpec, torch.device], nn.Module | None]


def inject(
    model: nn.Module,
    plan: Mapping[str, ExpertSpec],
    *,
    make_bank: MakeBank,
    make_router: MakeRouter,
    context: RoutingContext,
    seats: Mapping[str, Seat] = MappingProxyType({}),
) -> dict[str, ExpertLinear]:
    """Wrap every planned site of `model` in place and freeze everything else. Returns the wrappers by site name.

    Args:
        make_router: asked for the sites that decide for themselves.
        seats: site -> where the decision lies that it follows.

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
        seat = seats.get(name)
        router = make_router(spec, device) if spec.routed and seat is None else None
        bank = make_bank(spec, device)
        layer = ExpertLinear(base, bank, router, site=name, context=context, seat=seat, records=spec.routed)
        layer.train(model.training)
        setattr(parent, attribute, layer)
        layers[name] = layer
    return layers


def wrap_blocks(
    model: nn.Module,
    decisions: Iterable[DecisionSpec],
    seats: Mapping[str, Seat],
    context: RoutingContext,
    mixed: Mapping[str, FeedForward] = MappingProxyType({}),
) -> dict[str, RoutedBlock]:
    """Wrap in place the modules that decide for several sites; call it once their sites are wrapped.

    Args:
        seats: site -> where it finds its decision. The seats' routers become the blocks'.
        mixed: the blocks whose experts are whole copies of them.
    """
    blocks = {}
    for decision in decisions:
        parent_name, _, attribute = decision.name.rpartition(".")
        parent = model.get_submodule(parent_name)
        base, shape = parent.get_submodule(attribute), mixed.get(decision.name)
        seat = seats[decision.sites[0]]
        facts = {"seat": seat, "num_experts": decision.num_experts, "context": context}
        plain = ProbedBlock if getattr(seat.router, "reads", "input") == "outputs" else RoutedBlock
        block = plain(base, **facts) if shape is None else MixedBlock(base, shape=shape, **facts)
        block.train(model.training)
        setattr(parent, attribute, block)
        blocks[decision.name] = block
    if any(isinstance(block, ProbedBlock) for block in blocks.values()):
        context.reads_prompts = True
        context.sequences.watch(model.base_model)
    return blocks


def share_inputs(model: nn.Module, layers: Mapping[str, ExpertLinear], context: RoutingContext) -> list[list[str]]:
    """Let sites that read the same tensor share their work; returns the groups of sites found, in call order.

    Found by running two tokens through the model with the experts off and comparing the tensors that arrive. A model
    that cannot be run like that shares nothing, which costs time and changes no result.
    """
    arrived: list[tuple[Tensor, str]] = []

    def note(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        arrived.append((args[0], layer.site))

    hooks = [layer.register_forward_pre_hook(note) for layer in layers.values()]
    training = model.training
    try:
        device = model.get_input_embeddings().weight.device
        with torch.no_grad(), context.override("off"):
            model.eval()(input_ids=torch.zeros(1, 2, dtype=torch.long, device=device), use_cache=False)
    except Exception:  # whatever a model says to such an input, it is no reason not to train it
        return []
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    by_tensor: dict[int, list[str]] = {}  # by identity: the list keeps every tensor alive, so none is reused
    for tensor, site in arrived:
        by_tensor.setdefault(id(tensor), []).append(site)
    groups = [sites for sites in by_tensor.values() if len(set(sites)) == len(sites) > 1]
    for sites in groups:
        share([layers[site] for site in sites])
    return groups


def trainable_groups(
    layers: Mapping[str, ExpertLinear], blocks: Mapping[str, Owner] = MappingProxyType({})
) -> dict[str, dict[str, nn.Parameter]]:
    """Parameters by kind, `experts` and `routers`, under the names of their sites and blocks."""
    groups: dict[str, dict[str, nn.Parameter]] = {"experts": {}, "routers": {}}
    for site, layer in layers.items():
        groups["experts"].update({f"{site}.bank.{name}": p for name, p in layer.bank.named_parameters()})
    for owner, module in (*layers.items(), *blocks.items()):
        if module.router is not None:
            groups["routers"].update({f"{owner}.router.{name}": p for name, p in module.router.named_parameters()})
    return groups
