"""`loramoe-export`: a static route of a routed adapter as one PEFT LoRA folder. Needs the adapter, not its base."""

from pathlib import Path

from loramoe_train.errors import ConfigError, nearest

KEYS = ("route",)


def export(arguments: list[str]) -> Path:
    """`RUN_OR_ADAPTER NEW_FOLDER [route=...]`; returns the folder. Raises ConfigError for anything else."""
    places = [text for text in arguments if "=" not in text]
    settings = dict(text.split("=", 1) for text in arguments if "=" in text)
    for key in settings:
        if key not in KEYS:
            raise ConfigError(f"unknown key {key}{nearest(key, KEYS)}")
    if len(places) != 2:
        raise ConfigError("loramoe-export RUN_OR_ADAPTER NEW_FOLDER route=uniform|all|expert:NUMBER|domain:NAME")

    from loramoe_train.experts.adapters import find_adapter, plan_of, read_manifest, read_weights
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
    tensors = read_weights(folder, manifest)
    routed = any(".router." in name for name in tensors)
    route = settings.get("route") or ("" if routed else "all")
    if not route:
        raise ConfigError(
            f"{folder} has routers, whose choice depends on the token: name a static route, such as"
            f" route=domain:{manifest['domains'][0]} or route=uniform"
        )
    whole = manifest["config"]["experts"].get("mixing") == "output"
    factors = fold(plan, tensors, route, domains=manifest["domains"], whole_blocks=whole)
    base = manifest["config"]["model"]
    return write_peft_folder(
        target, factors, base_model=base.get("path") or base["name"], revision=base.get("revision")
    )
