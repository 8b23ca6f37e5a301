"""From a `RunConfig` and a model, on the meta device perhaps, to plain data: which sites get which experts, who decides
for them, and which blocks are mixed as a whole. ConfigError where something does not fit."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import nn

from loramoe_train.errors import ConfigError, nearest
from loramoe_train.experts.decisions import DecisionSpec, plan_decisions
from loramoe_train.experts.feed_forward import FeedForward, describe
from loramoe_train.experts.peft_folder import LoraAdapter, read_peft_folder
from loramoe_train.experts.plan import ExpertSpec, plan_experts, plan_imported
from loramoe_train.experts.sites import Site
from loramoe_train.models import count_layers, find_sites
from loramoe_train.models.sites import matches
from loramoe_train.schema.run import RunConfig
from loramoe_train.validation import check_layout


def read_adapters(config: RunConfig) -> list[LoraAdapter]:
    """The PEFT folders of `experts.adapters`; their base must be this one as far as its name tells."""
    adapters = [read_peft_folder(Path(path)) for path in config.experts.adapters]
    own = {config.model.name, config.model.path}
    for path, adapter in zip(config.experts.adapters, adapters, strict=True):
        base = adapter.base_model
        if base and Path(base).name not in {Path(name).name for name in own if name}:
            raise ConfigError(
                f"experts.adapters: {path} was trained on '{base}', but the base is '{config.model.name}';"
                " name the same model"
            )
    return adapters


def plan_sites(
    config: RunConfig, model: nn.Module, domains: Sequence[str], adapters: Sequence[LoraAdapter] = ()
) -> dict[str, ExpertSpec]:
    """Which site gets which experts. `model` may be on the meta device. ConfigError where nothing fits."""
    counts, ranks, top_k = check_layout(config, count_layers(model, config.model.layers), list(domains))
    if not any(counts):
        return {}
    sites = find_sites(model, config.model.layers, config.model.sites, config.experts.sites)
    experts = config.experts
    if experts.plain is not None:
        return _with_plain(config, model, sites, counts, ranks, top_k)
    if not adapters:
        return plan_experts(sites, counts=counts, ranks=ranks, top_k=top_k, alpha=experts.alpha, scale=experts.scale)
    _check_coverage(adapters, sites, experts.adapters)
    rank_of = [{name: pair.down.shape[0] for name, pair in adapter.modules.items()} for adapter in adapters]
    return plan_imported(sites, rank_of, top_k=top_k)


def _with_plain(
    config: RunConfig,
    model: nn.Module,
    sites: Sequence[Site],
    counts: Sequence[int],
    ranks: Sequence[int],
    top_k: Sequence[int] | None,
) -> dict[str, ExpertSpec]:
    """A mixture and, on sites of its own, plain LoRA; in the model's order."""
    experts, plain = config.experts, config.experts.plain
    beside = find_sites(model, config.model.layers, config.model.sites, plain.sites)
    both = sorted({site.name for site in sites} & {site.name for site in beside})
    if both:
        raise ConfigError(f"experts.plain.sites and experts.sites both select {both[0]}; a site carries one of them")
    if experts.adapters:
        raise ConfigError("experts.plain cannot stand beside experts.adapters; set experts.plain=null")
    layers = len(counts)
    plan = plan_experts(sites, counts=counts, ranks=ranks, top_k=top_k, alpha=experts.alpha, scale=experts.scale)
    ones, own = [1] * layers, {"alpha": plain.alpha, "scale": experts.scale}
    plan |= plan_experts(beside, counts=ones, ranks=[plain.rank] * layers, top_k=None, routed=False, **own)
    order = find_sites(model, config.model.layers, config.model.sites, "all_linear")
    return {site.name: plan[site.name] for site in order if site.name in plan}


def feed_forwards(config: RunConfig, model: nn.Module, plan: Mapping[str, ExpertSpec]) -> dict[str, FeedForward]:
    """The blocks whose whole copies are the experts, by name; none unless experts.mixing=output. `model` may be on the
    meta device. ConfigError where the sites of a block are not those of a feed-forward block."""
    if config.experts.mixing != "output":
        return {}
    order = config.model.sites.get("ffn", [])

    def place(site: Site) -> int:
        return next((number for number, pattern in enumerate(order) if matches(site.name, pattern)), len(order))

    found = {}
    for decision in plan_decisions(plan, config.router.scope).values():
        sites = sorted((plan[name].site for name in decision.sites), key=place)
        found[decision.name] = describe(decision.name, model.get_submodule(decision.name), sites)
    return found


def _check_coverage(adapters: Sequence[LoraAdapter], sites: Sequence[Site], paths: Sequence[str]) -> None:
    """Every module of every adapter must be a site of the right size: weights are never dropped without a word."""
    known = {site.name: site for site in sites}
    for path, adapter in zip(paths, adapters, strict=True):
        for name, pair in adapter.modules.items():
            if name not in known:
                raise ConfigError(
                    f"experts.adapters: {path} has weights for {name}, which experts.sites does not select"
                    f"{nearest(name, known).split('; known')[0]}; use experts.sites=all_linear or name its module"
                )
            shape, wanted = (pair.down.shape[1], pair.up.shape[0]), (known[name].in_features, known[name].out_features)
            if shape != wanted:
                raise ConfigError(f"experts.adapters: {path}: {name} is {shape} (in, out), the base has {wanted}")


def decisions_of(
    config: RunConfig, plan: Mapping[str, ExpertSpec], model: nn.Module | None = None
) -> dict[str, DecisionSpec]:
    """Who decides for which sites. `model`, which may be on the meta device: where routers are to be made."""
    router, width = config.router, 0
    if model is not None and router.scope in ("block", "model"):
        width = model.config.get_text_config().hidden_size
    return plan_decisions(plan, router.scope, per_site=router.per_site, width=width)
