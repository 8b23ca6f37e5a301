"""The composition root: from a `RunConfig` to a base model with routed experts and the losses on their routing."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from loramoe_train.errors import ConfigError
from loramoe_train.experts.adapters import adapter_tensors
from loramoe_train.experts.bank import ExpertBank
from loramoe_train.experts.decisions import DecisionSpec
from loramoe_train.experts.feed_forward import check_bank, check_weights
from loramoe_train.experts.first_pass import add_first_passes
from loramoe_train.experts.inject import MakeBank, inject, share_inputs, trainable_groups, wrap_blocks
from loramoe_train.experts.linear import ExpertLinear
from loramoe_train.experts.peft_folder import LoraAdapter
from loramoe_train.experts.plan import ExpertSpec
from loramoe_train.experts.ssm import adapt_mixers
from loramoe_train.parts import build_part, takes
from loramoe_train.routing.context import RoutingContext
from loramoe_train.routing.seat import Owner, Seat
from loramoe_train.routing.types import Origin
from loramoe_train.schema.run import RunConfig
from loramoe_train.serving import origins_in
from loramoe_train.site_plan import decisions_of, feed_forwards
from loramoe_train.training.parts import AuxTerm
from loramoe_train.validation import domains_of, trains_base


@dataclass(frozen=True)
class RoutedModel:
    """A base model with experts beside its planned sites; or the base alone, to be trained itself."""

    model: nn.Module
    context: RoutingContext
    plan: dict[str, ExpertSpec]
    layers: dict[str, ExpertLinear]  # by site
    blocks: dict[str, Owner]  # by module name: what decides for several sites

    @property
    def groups(self) -> dict[str, dict[str, nn.Parameter]]:
        """What a stage may train: `experts`, `routers`, and `base` where there are no experts."""
        own = {} if self.layers else {"base": dict(self.model.named_parameters())}
        return trainable_groups(self.layers, self.blocks) | own

    @property
    def recorded(self) -> list[str]:
        """Names of the records of a pass: a site that follows another's decision has none."""
        own = [name for name, layer in self.layers.items() if layer.records]
        return [*own, *(name for owner in self.blocks.values() for name in owner.recorded)]

    def tensors(self) -> dict[str, Tensor]:
        """What an adapter stores; the model's own storage, not copies."""
        if self.layers:
            return adapter_tensors(self.layers, self.blocks)
        return {name: parameter.detach() for name, parameter in self.model.named_parameters()}


def attach(
    config: RunConfig,
    model: nn.Module,
    plan: Mapping[str, ExpertSpec],
    *,
    num_domains: int,
    num_tasks: int | None = None,
    adapters: Sequence[LoraAdapter] = (),
) -> RoutedModel:
    """Wrap the planned sites. What is fresh is seeded by (seed, site), whatever else the layout holds.

    Args:
        num_domains, num_tasks: of the mixture that is trained on, or was. `num_tasks` None: that of the config.
    """
    check_parts_fit(config, plan, model)
    context = RoutingContext(num_domains)
    make_bank, make_router = _makers(config, num_domains=num_domains, num_tasks=num_tasks)
    if not plan and trains_base(config):
        return RoutedModel(model.requires_grad_(False), context, {}, {}, {})
    decisions = decisions_of(config, plan, model)
    wide = [decision for decision in decisions.values() if decision.name not in plan]
    mixed = feed_forwards(config, model, plan)
    device = next(model.parameters()).device
    seats, of_model = {}, config.router.scope == "model"
    for decision in wide:
        shared = Seat(decision.name, make_router(decision, device))
        seats |= {site: Seat(shared.name, shared.router) if of_model else shared for site in decision.sites}
    layers = inject(
        model,
        plan,
        make_bank=make_bank,
        make_router=lambda spec, device: make_router(decisions[spec.site.name], device),
        context=context,
        seats=seats,
    )
    adapt_mixers(model, layers)  # first: it looks for the modules that hold the sites
    if of_model:
        blocks = add_first_passes(model, wide, seats, context)
    else:
        blocks = wrap_blocks(model, wide, seats, context, mixed)
    share_inputs(model, layers, context)
    for expert, adapter in enumerate(adapters):
        for name, pair in adapter.modules.items():
            bank = layers[name].bank
            with torch.no_grad():
                bank.down[bank.rows(expert)] = pair.down.to(bank.down.device)
                bank.up[bank.rows(expert)] = pair.up.T.to(bank.up.device)
    return RoutedModel(model, context, dict(plan), layers, blocks)


def _makers(
    config: RunConfig, *, num_domains: int, num_tasks: int | None = None
) -> tuple[MakeBank, Callable[[DecisionSpec, torch.device], nn.Module | None]]:
    """How banks and routers are made. Random numbers depend on the seed and the site's name alone."""

    whole = config.experts.mixing == "output"

    def make(part: dict[str, Any], key: str, owner: str, device: torch.device, **facts: Any) -> nn.Module:
        stays = device.type in ("meta", "cpu")  # a GPU's numbers would differ, so its parts are drawn on the CPU
        digest = hashlib.sha256(f"{config.seed}:{key}:{owner}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        facts = {**facts, "device": device if stays else "cpu", "generator": generator}
        built = build_part(part, key, facts=facts, trusted=config.trusted_modules)
        return built if stays else built.to(device)

    def make_bank(spec: ExpertSpec, device: torch.device) -> Any:
        shape = {"d_in": spec.site.in_features, "d_out": spec.site.out_features}
        shape |= {"ranks": spec.ranks, "scales": spec.scales, "dropout": config.experts.dropout}
        shape |= {"form": config.experts.form}
        bank = make(config.experts.make, "experts.make", spec.site.name, device, **shape)
        if whole and spec.routed:
            check_bank(bank)
        return bank

    def make_router(decision: DecisionSpec, device: torch.device) -> nn.Module | None:
        if config.router.make is None:
            return None
        facts = {"d_in": decision.d_in, "num_experts": decision.num_experts, "top_k": decision.top_k}
        facts["heads"] = len(decision.sites) if decision.per_site else None
        facts |= {"num_domains": num_domains, "num_tasks": len(config.data.tasks) if num_tasks is None else num_tasks}
        router = make(config.router.make, "router.make", decision.name, device, **facts)
        if whole:
            check_weights(router)
        return router

    return make_bank, make_router


def build_aux(config: RunConfig, plan: Mapping[str, ExpertSpec]) -> dict[str, AuxTerm]:
    """The configured auxiliary losses, with the facts that they ask for; those that count top-k shares get each site's
    own k. ConfigError where a loss does not fit the plan or the mixture."""
    terms, decisions = {}, decisions_of(config, plan)
    recorded = {name: decision for decision in decisions.values() for name in decision.records}
    for name, term in config.aux_loss.items():
        facts: dict[str, Any] = {"num_experts": {name: decision.num_experts for name, decision in recorded.items()}}
        facts |= {"tasks": tuple(config.data.tasks), "num_domains": len(domains_of(config))}
        if takes(term.make, "top_k", config.trusted_modules):
            facts["top_k"] = {name: decision.top_k for name, decision in recorded.items()}
        loss = build_part(term.make, f"aux_loss.{name}.make", facts=facts, trusted=config.trusted_modules)
        terms[name] = AuxTerm(name, term.weight, term.scope, loss)
    return terms


def check_fit(config: RunConfig, plan: Mapping[str, ExpertSpec], model: nn.Module | None = None) -> None:
    """Make, without weights, one of every kind of router and bank in the plan, and the losses. ConfigError where a part
    refuses its site. `model`, on the meta device perhaps, tells the width of its hidden states."""
    check_parts_fit(config, plan, model)
    build_aux(config, plan)


def check_parts_fit(config: RunConfig, plan: Mapping[str, ExpertSpec], model: nn.Module | None = None) -> None:
    """The same for routers and banks alone, and whether they go together."""
    (make_bank, make_router), meta = _makers(config, num_domains=len(domains_of(config))), torch.device("meta")
    kinds = {(s.site.in_features, s.site.out_features, s.ranks, s.scales, s.top_k): s for s in plan.values()}
    banks = [make_bank(spec, meta) for spec in kinds.values()]
    for bank in banks:
        _check_bank(config, bank)
    whole = next((type(bank).__name__ for bank in banks if bank.mixes_outputs), None)
    deciding = {(d.num_experts, d.top_k, d.d_in): d for d in decisions_of(config, plan, model).values()}
    for decision in deciding.values():
        router = make_router(decision, meta)
        _check_router(config, router, whole)
        lonely = router is None and decision.num_experts == 1
        if whole and not lonely and not getattr(router, "sums_to_one", False):
            raise ConfigError(
                f"experts.make={whole} mixes whole outputs, so a token's weights must sum to one, which"
                f" {'they do not without a router' if router is None else 'those of router.make need not do'}; use"
                " router=soft or weight=renormalised in training and evaluation, or one expert with router=none"
            )


def _check_bank(config: RunConfig, bank: ExpertBank) -> None:
    """ConfigError where a bank cannot stand beside this base, or take these adapters."""
    name, packed = type(bank).__name__, config.model.quantization
    if bank.reads_base and packed != "none":
        raise ConfigError(
            f"model.quantization={packed}: experts.make={name} computes with the base's weight, which is packed then;"
            " set model.quantization=none or use experts=default"
        )
    if config.experts.adapters and not bank.takes_adapters:
        raise ConfigError(
            f"experts.adapters: imported LoRAs cannot become experts of experts.make={name}; use experts=default"
        )


def _check_router(config: RunConfig, router: nn.Module | None, whole: str | None) -> None:
    """ConfigError where a router cannot be asked for what the config wants. `whole`: the bank that mixes outputs."""
    scope, mixing = config.router.scope, config.experts.mixing
    if getattr(router, "reads", "input") == "outputs" and (scope != "block" or mixing == "output" or whole):
        raise ConfigError(
            f"router.scope={scope}, experts.mixing={mixing}, experts.make={whole or 'default'}: a router that reads"
            " what each expert adds needs router.scope=block, experts.mixing=delta and experts=default"
        )
    if config.aux_loss and not getattr(router, "scores", True):
        name = next(iter(config.aux_loss))
        raise ConfigError(f"aux_loss.{name} needs a router that scores experts, and router.make does not; set none")


def static_routes(
    config: RunConfig,
    plan: Mapping[str, ExpertSpec],
    tensors: Mapping[str, Tensor],
    origin: Origin,
    index: int,
    *,
    num_domains: int,
    num_tasks: int,
) -> dict[str, list[float]] | None:
    """Site -> the weights that its router, with the stored `tensors`, gives the experts for every token of one task or
    domain; None where the routers depend on anything else. Sites without a router are left out."""
    if set(origins_in(config.router.make or {})) != {origin}:
        return None
    _, make_router = _makers(config, num_domains=num_domains, num_tasks=num_tasks)
    context, found = RoutingContext(num_domains), {}
    for decision in decisions_of(config, plan).values():
        router = make_router(decision, torch.device("cpu"))
        prefix = f"{decision.name}.router."
        router.load_state_dict({n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)})
        with torch.no_grad(), context.serving(**{origin: index}):
            (weights_E,) = router.eval()(torch.zeros(1, decision.d_in), context).weights_NE
        found.update(dict.fromkeys(decision.sites, weights_E.tolist()))
    return found
