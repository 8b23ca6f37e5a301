"""From the composed config to a typed `RunConfig`, with one line for whatever is wrong. Torch-free, so it is quick.

Hydra accepts `+anything=1`, so every key is checked again here. Then come the checks across fields, which
need no weights: at most the base model's config.json.
"""

from collections.abc import Mapping
from typing import Any, TypeVar, get_args, get_origin

from pydantic import BaseModel, ValidationError

from loramoe_train.errors import ConfigError, nearest, shown
from loramoe_train.experts.layouts import expand_layout, per_layer
from loramoe_train.parts import check_part, takes
from loramoe_train.schema.run import RunConfig

Schema = TypeVar("Schema", bound=BaseModel)

ROUTER_FACTS = ("d_in", "num_experts", "top_k", "heads", "num_tasks", "num_domains", "device", "generator")
AUX_FACTS = ("top_k", "num_experts", "tasks", "num_domains")
BANK_FACTS = ("d_in", "d_out", "ranks", "scales", "dropout", "device", "generator")


def validate(values: Mapping[str, Any]) -> RunConfig:
    """The typed config, or ConfigError naming the full key, the value, what would be right and the nearest name."""
    config = typed(RunConfig, values)
    check_parts(config)
    return config


def typed(schema: type[Schema], values: Mapping[str, Any]) -> Schema:
    """Plain values as a schema has them, or ConfigError as of `validate`."""
    try:
        return schema.model_validate(values)
    except ValidationError as error:
        raise ConfigError(_one_line(error, schema)) from error


def _one_line(error: ValidationError, schema: type[BaseModel]) -> str:
    first, others = error.errors()[0], error.error_count() - 1
    location = [str(part) for part in first["loc"]]
    value = "null" if first["input"] is None else shown(first["input"])
    key, more = ".".join(location), f" (and {others} more)" if others else ""
    if first["type"] == "extra_forbidden":
        return f"unknown key {key}={value}{nearest(location[-1], _fields_at(schema, location[:-1]))}{more}"
    if first["type"] == "missing" and location[0] == "aux_loss" and location[-1] == "make":
        name = ".".join(location[:-1])
        return f"{name} has no make: no auxiliary loss of that name is chosen; e.g. aux_loss=[load_balance]{more}"
    if first["type"] == "missing":
        return f"{key} is missing; give it a value{more}"
    message = (
        first["msg"].removeprefix("Value error, ").replace("Input should", "should").replace("String should", "should")
    )
    if first["type"] == "literal_error":
        expected = str(first["ctx"]["expected"]).replace("'", "").replace(" or ", ", ").split(", ")
        message = f"must be one of {', '.join(expected)}{nearest(str(first['input']), expected).split('; known')[0]}"
    if first["type"] == "list_type":
        message = f"must be a list; write {key}=[{'' if first['input'] is None else value}]"
    return f"{key}={value}: {message}{more}"


def _fields_at(schema: type[BaseModel], location: list[str]) -> list[str]:
    """Field names of the schema at a place; empty where keys are free."""
    model: Any = schema
    for part in location:
        if isinstance(model, type) and issubclass(model, BaseModel):
            field = model.model_fields.get(part)
            if field is None:
                return []
            model = field.annotation
        elif get_origin(model) is dict:
            model = get_args(model)[1]
        candidates = [a for a in get_args(model) if isinstance(a, type) and issubclass(a, BaseModel)]
        if candidates and get_origin(model) is not dict:
            model = candidates[0]
    return list(model.model_fields) if isinstance(model, type) and issubclass(model, BaseModel) else []


def check_parts(config: RunConfig) -> None:
    """Every `_target_` names a known class with fitting arguments; router, selection and losses agree."""
    trusted, router = config.trusted_modules, config.router
    check_part(config.experts.make, "experts.make", facts=BANK_FACTS, trusted=trusted)
    if (router.make is None) != (router.scope == "none"):
        raise ConfigError(
            f"router.scope={router.scope} and router.make contradict each other: scope none goes with make null"
        )
    if config.experts.mixing == "output" and router.scope != "block":
        raise ConfigError(
            f"experts.mixing=output weighs whole feed-forward blocks, but router.scope={router.scope} does not decide"
            " for those; set router.scope=block, or experts.mixing=delta"
        )
    if router.per_site and router.scope != "model":
        raise ConfigError(
            f"router.per_site=true goes with router.scope=model, but router.scope={router.scope}; change one of them"
        )
    if router.make is not None:
        check_part(router.make, "router.make", facts=ROUTER_FACTS, trusted=trusted)
        if router.per_site and not takes(router.make, "heads", trusted):
            raise ConfigError("router.per_site=true needs a score with a head for every site; use router=mlp")
        if takes(router.make, "top_k", trusted) and router.top_k is None:
            raise ConfigError(
                "router.top_k is missing: the router selects a number of experts; give e.g. router.top_k=2"
            )
    elif config.aux_loss:
        name = next(iter(config.aux_loss))
        raise ConfigError(f"aux_loss.{name} needs a learned router, but router.scope=none; set aux_loss=none")
    for name, term in config.aux_loss.items():
        check_part(term.make, f"aux_loss.{name}.make", facts=AUX_FACTS, trusted=trusted)
        if takes(term.make, "top_k", trusted) and router.top_k is None:
            raise ConfigError(f"aux_loss.{name} counts the top-k share; give router.top_k, e.g. router.top_k=2")


def trains_base(config: RunConfig) -> bool:
    """Whether a stage trains the base's own weights."""
    return any("base" in stage.train for stage in config.trainer.stages.values())


def check_layout(
    config: RunConfig, num_layers: int, domains: list[str]
) -> tuple[list[int], list[int], list[int] | None]:
    """Experts, rank and top-k per layer; ConfigError where they do not fit the model or each other.

    Imported adapters fix counts and ranks; then only top_k is checked. No layer has experts where the base trains.
    """
    experts, top_k = config.experts, config.router.top_k
    try:
        if experts.adapters:
            counts = [len(experts.adapters)] * num_layers
        elif str(experts.layout) == "0" and trains_base(config):
            counts = [0] * num_layers
        else:
            mixture = {"num_domains": len(domains), "num_tasks": len(config.data.tasks)}
            counts = expand_layout(experts.layout, num_layers, **mixture)
    except ValueError as error:
        raise ConfigError(f"experts.layout={shown(experts.layout)} {error}") from error
    if trains_base(config):
        _check_base_trains(config, counts)
    ranks = _per_layer("experts.rank", experts.rank, num_layers)
    chosen = None if top_k is None else _per_layer("router.top_k", top_k, num_layers)
    if min(ranks) < 1:
        raise ConfigError(f"experts.rank={shown(experts.rank)}: a rank must be at least 1")
    if config.router.make is not None and chosen is not None:
        for layer, (count, k) in enumerate(zip(counts, chosen, strict=True)):
            if count and not 1 <= k <= count:
                raise ConfigError(
                    f"router.top_k={k} does not fit layer {layer}, which has {count} expert{'s'[: count != 1]};"
                    f" give at most {count}, or more experts (experts.layout={shown(experts.layout)})"
                )
    if config.router.make is None and max(counts) > 1 and not _hard_only(config):
        raise ConfigError(
            f"experts.layout={shown(experts.layout)} gives a layer {max(counts)} experts, but router.scope=none"
            " chooses nothing; use experts.layout=1 or a router"
        )
    return counts, ranks, chosen


def _check_base_trains(config: RunConfig, counts: list[int]) -> None:
    for name, stage in config.trainer.stages.items():
        if any(counts):
            raise ConfigError(
                f"trainer.stages.{name}: the base trains only without experts, and here a layer gets {max(counts)}; set"
                " experts=none, or train=[experts]"
            )
        if stage.train != ["base"]:
            raise ConfigError(
                f"trainer.stages.{name}.train={shown(stage.train)}: experts.layout=0 leaves the base alone to train;"
                " set train=[base]"
            )
    if config.router.make is not None:
        raise ConfigError("router.make chooses among experts, and experts.layout=0 gives none; set router=none")
    if config.experts.plain is not None:
        raise ConfigError("experts.plain cannot stand beside a base that trains; set experts.plain=null")
    if config.model.quantization != "none":
        raise ConfigError(
            f"model.quantization={config.model.quantization}: packed weights cannot train; set model.quantization=none,"
            " or train experts beside them"
        )


def _per_layer(key: str, value: int | list[int], num_layers: int) -> list[int]:
    try:
        return per_layer(value, num_layers)
    except ValueError as error:
        raise ConfigError(f"{key}={shown(value)} {error}") from error


def _hard_only(config: RunConfig) -> bool:
    return all(stage.routing == "by_domain" for stage in config.trainer.stages.values())


def domains_of(config: RunConfig) -> list[str]:
    """The mixture's domains in order of first appearance."""
    names = (config.data.definitions[task].domain or task for task in config.data.tasks)
    return list(dict.fromkeys(names))
