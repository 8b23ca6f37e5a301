"""Our adapter on disk: `adapter.safetensors` with every bank and router, and `adapter.json` to rebuild them from.

Tensor names are `<site>.bank.down` (R, D), `<site>.bank.up` (R, O) and `<site>.router.*`, or `<owner>.router.*` where a
module decides for several; all float32. A site's experts lie one below the other, with the ranks and scales in the
manifest. The frozen base is never stored, only what identifies it; a base that was trained itself, without experts, is
stored under its tensors' own names. Reading is strict: another base, another layout, a missing or surplus tensor or a
damaged file is an error with one line.
"""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from loramoe_train.errors import ConfigError, DataError, MissingFileError, shown
from loramoe_train.experts.linear import ExpertLinear
from loramoe_train.experts.plan import ExpertSpec
from loramoe_train.experts.sites import Site
from loramoe_train.files import read_json, sha256, sync, write_json
from loramoe_train.routing.seat import Owner

WEIGHTS, MANIFEST = "adapter.safetensors", "adapter.json"
FORMAT, VERSION = "loramoe_train.adapter", 3
MAX_EXPERTS = 1 << 16  # at one site; far above any real number of them
KINDS = {"tasks": list, "domains": list, "base": dict, "sites": list, "weights_sha256": str}  # in a manifest
OPTIONAL = ("tasks", "domains", "base")  # read as empty where they are absent


def adapter_tensors(
    layers: Mapping[str, ExpertLinear], blocks: Mapping[str, Owner] = MappingProxyType({})
) -> dict[str, Tensor]:
    """Every stored tensor by name; the model's own storage, not copies."""
    found = {}
    for site, layer in layers.items():
        state = layer.bank.state_dict(keep_vars=True)
        found.update({f"{site}.bank.{name}": t.detach() for name, t in state.items()})
    for owner, module in (*layers.items(), *blocks.items()):
        if module.router is not None:
            state = module.router.state_dict(keep_vars=True)
            found.update({f"{owner}.router.{name}": t.detach() for name, t in state.items()})
    return found


def save_adapter(
    folder: Path, tensors: Mapping[str, Tensor], plan: Mapping[str, ExpertSpec], facts: Mapping[str, Any]
) -> None:
    """Write weights and manifest into an existing folder, each aside first and then renamed.

    Args:
        tensors: what `adapter_tensors` names, or copies of it taken earlier.
        facts: further JSON values for the manifest: base identity, domains, tasks, config, versions.
    """
    from safetensors.torch import save_file

    weights = folder / WEIGHTS
    aside = weights.with_suffix(".tmp")
    try:
        save_file({name: t.to("cpu").contiguous() for name, t in tensors.items()}, aside, metadata={"format": "pt"})
        sync(aside)
    except BaseException:
        aside.unlink(missing_ok=True)  # it would keep a full disk full
        raise
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        **facts,
        "sites": [asdict(spec) for spec in plan.values()],
        "weights_sha256": sha256(aside),
    }
    aside.replace(weights)
    write_json(folder / MANIFEST, manifest)


def find_adapter(path: str | Path, key: str) -> Path:
    """The folder that holds an adapter: `path` itself or, for a run folder, what lies directly below it."""
    folder = Path(path)
    if not folder.exists():
        raise MissingFileError(f"{key}: there is no {folder}")
    for candidate in (folder, folder / "adapter"):
        if (candidate / MANIFEST).is_file():
            return candidate
    raise MissingFileError(f"{key}: {folder} holds no {MANIFEST}; give a run folder, a checkpoint or an adapter folder")


def read_manifest(folder: Path) -> dict[str, Any]:
    """The checked manifest of an adapter folder."""
    path = folder / MANIFEST
    manifest = read_json(path)
    if manifest.get("format") != FORMAT:
        raise DataError(f"{path} is not an adapter manifest of this program")
    if manifest.get("version") != VERSION:
        raise DataError(f"{path} has format version {manifest.get('version')}; this program reads version {VERSION}")
    for key, kind in KINDS.items():
        if key in OPTIONAL:
            manifest.setdefault(key, kind())
        if not isinstance(manifest.get(key), kind):
            raise DataError(f"{path}: {key} is damaged: it is no {kind.__name__}")
    for key in ("tasks", "domains"):
        if not all(isinstance(name, str) for name in manifest[key]):
            raise DataError(f"{path}: {key} is damaged: it holds something else than names")
    return manifest


def plan_of(manifest: Mapping[str, Any]) -> dict[str, ExpertSpec]:
    """The plan that a manifest describes."""
    plan = {}
    try:
        for entry in manifest["sites"]:
            site = Site(**entry["site"])
            spec = ExpertSpec(site, tuple(entry["ranks"]), tuple(entry["scales"]), entry["top_k"], entry["routed"])
            _check_spec(spec)
            plan[site.name] = spec
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise DataError(f"{MANIFEST}: damaged list of sites ({error})") from error
    return plan


def _check_spec(spec: ExpertSpec) -> None:
    """ValueError unless every entry is of its kind: a file may say anything."""
    site, ranks, scales = spec.site, spec.ranks, spec.scales
    whole = [site.layer, *ranks, *(() if spec.top_k is None else (spec.top_k - 1,))]
    if not all(type(number) is int and number >= 0 for number in whole):
        raise ValueError(f"{site.name!r}: layer, ranks and top_k must be whole numbers, got {shown(whole)}")
    if not all(type(number) is int and number > 0 for number in (site.in_features, site.out_features)):
        raise ValueError(f"{site.name!r}: its sizes must be whole numbers above 0")
    if not all(type(number) in (int, float) and math.isfinite(number) for number in scales):
        raise ValueError(f"{site.name!r}: its scales must be numbers, got {shown(scales)}")
    if not 0 < len(ranks) <= MAX_EXPERTS or len(ranks) != len(scales):
        raise ValueError(f"{site.name!r}: {len(ranks)} ranks and {len(scales)} scales; one each for every expert")
    if not isinstance(site.name, str) or not isinstance(site.kind, str):
        raise ValueError(f"{site.name!r}: names must be text")


def check_stored(folder: Path, plan: Mapping[str, ExpertSpec]) -> None:
    """Raise DataError unless the weights hold as much for every site as the plan claims.

    Reads the header alone: nothing is to be made in a size that is only claimed.
    """
    from safetensors import SafetensorError, safe_open

    path = folder / WEIGHTS
    if not path.is_file():
        raise MissingFileError(f"{path} is missing")
    try:
        with safe_open(path, framework="pt") as file:
            sizes = {name: math.prod(file.get_slice(name).get_shape()) for name in file.keys()}
    except (SafetensorError, OSError) as error:
        raise DataError(f"{path} is damaged: {error}") from error
    held = Counter({site: 0 for site in plan})
    for name, size in sizes.items():
        held[name.rpartition(".bank.")[0]] += size
    for name, spec in plan.items():
        claimed = sum(spec.ranks) * spec.site.out_features
        if claimed > held[name]:
            raise DataError(
                f"{folder / MANIFEST} claims ranks of {sum(spec.ranks):,} in all for {name}, but {WEIGHTS} holds only"
                f" {held[name]:,} numbers for it"
            )


def read_weights(folder: Path, manifest: Mapping[str, Any]) -> dict[str, Tensor]:
    """All tensors of an adapter, verified against the manifest's checksum."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = folder / WEIGHTS
    if not path.is_file():
        raise MissingFileError(f"{path} is missing")
    if sha256(path) != manifest.get("weights_sha256"):
        raise DataError(f"{path} is damaged: its checksum is not the one in {MANIFEST}")
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise DataError(f"{path} is damaged: {error}") from error


def load_weights(wanted: Mapping[str, Tensor], tensors: Mapping[str, Tensor], source: str) -> None:
    """Copy tensors into those of a routed model (`adapter_tensors`); names and shapes must agree exactly."""
    missing, surplus = sorted(set(wanted) - set(tensors)), sorted(set(tensors) - set(wanted))
    if missing or surplus:
        what = f"lacks {missing[0]}" if missing else f"holds {surplus[0]}, which this model has not"
        raise ConfigError(
            f"{source} {what} ({len(missing)} missing, {len(surplus)} surplus tensors); the layouts differ"
        )
    for name, tensor in tensors.items():
        if tensor.shape != wanted[name].shape:
            shapes = f"{tuple(tensor.shape)}, the model wants {tuple(wanted[name].shape)}"
            raise ConfigError(f"{source}: {name} has shape {shapes}; the layouts differ")
        if not torch.isfinite(tensor).all():
            raise DataError(f"{source}: {name} holds a value that is not finite")
    with torch.no_grad():
        for name, tensor in tensors.items():
            wanted[name].copy_(tensor)
