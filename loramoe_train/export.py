"""`loramoe-export`: a static route of a routed adapter as one PEFT LoRA folder. Needs the adapter, not its base."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loramoe_train.errors import ConfigError, DataError, nearest
from loramoe_train.trust import value_at

KEYS = ("route",)
KNOWN = {"task": "tasks", "domain": "domains"}  # kind of route -> where the manifest lists what there is


def export(arguments: list[str]) -> Path:
    """`RUN_OR_ADAPTER NEW_FOLDER [route=...]`; returns the folder. Raises ConfigError for anything else."""
    places = [text for text in arguments if "=" not in text]
    settings = dict(text.split("=", 1) for text in arguments if "=" in text)
    for key in settings:
        if key not in KEYS:
            raise ConfigError(f"unknown key {key}{nearest(key, KEYS)}")
    if len(places) != 2:
        routes = "uniform|all|expert:NUMBER|domain:NAME|task:NAME"
        raise ConfigError(f"loramoe-export RUN_OR_ADAPTER NEW_FOLDER route={routes}")

    from loramoe_train.experts.adapters import check_stored, find_adapter, plan_of, read_manifest, read_weights
    from loramoe_train.experts.fold import fold
    from loramoe_train.experts.peft_folder import write_peft_folder

    source, target = places
    folder = find_adapter(source, "loramoe-export")
    manifest = read_manifest(folder)
    plan = plan_of(manifest)
    if not plan:
        raise ConfigError(
            f"{folder} holds no experts but the base's own weights, all of them trained: there is no LoRA in it"
        )
    check_stored(folder, plan)
    tensors = read_weights(folder, manifest)
    config = manifest.get("config")
    if not all(isinstance(value_at(config, key), dict) for key in ("router", "experts", "model")):
        raise DataError(f"{folder} stores no config in its manifest")
    route = settings.get("route") or ("all" if config["router"].get("make") is None else "")
    if not route:
        raise ConfigError(
            f"{folder} has routers, whose choice depends on the token or its task: name a static route, such as"
            f" route=domain:{next(iter(manifest['domains']), 'NAME')} or route=uniform"
        )
    weights = _decided(manifest, plan, tensors, route)
    whole = config["experts"].get("mixing") == "output"
    factors = fold(plan, tensors, weights or route, domains=manifest["domains"], whole_blocks=whole)
    base = config["model"]
    named = base.get("path") or base.get("name")
    return write_peft_folder(target, factors, base_model=str(named), revision=base.get("revision"))


def _decided(
    manifest: Mapping[str, Any], plan: Mapping[str, Any], tensors: Mapping[str, Any], route: str
) -> dict[str, list[float]] | None:
    """The routers' own weights for `task:NAME` or `domain:NAME`; None where they do not decide by that."""
    from loramoe_train.build import static_routes
    from loramoe_train.validation import validate

    kind, _, name = route.partition(":")
    stored = manifest["config"]
    # a file must not say whose code to run, so routers from elsewhere are not made here
    if kind not in KNOWN or stored["router"].get("make") is None or stored.get("trusted_modules"):
        return None
    names = manifest[KNOWN[kind]]
    if name not in names:
        raise ConfigError(f"route={route}: no such {kind}{nearest(name, names)}")
    counts = {f"num_{key}": len(manifest[key]) for key in KNOWN.values()}
    return static_routes(validate(stored), plan, tensors, kind, names.index(name), **counts)
