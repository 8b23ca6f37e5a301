"""Which linear layers of a model can carry experts: from site kinds or name patterns to a list of sites.

A pure function of the module tree, so it works on the meta device. The kinds (`attn_in`, `attn_out`, `ffn`, `ssm`) are
mapped to module names by the model group's `sites`, which is why one recipe serves a Llama and a Mamba alike. Inside,
a module goes by its name within its decoder layer, such as `self_attn.q_proj`.
"""

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import NoReturn

from torch import nn

from loramoe_train.errors import ConfigError, DataError, nearest
from loramoe_train.experts.plan import ExpertSpec
from loramoe_train.experts.sites import Site

ALL_LINEAR = "all_linear"
KINDS = ("attn_in", "attn_out", "ffn", "ssm")  # a recipe may ask any model for these; one without them skips them
OTHER = "other"  # kind of a linear layer that the model group does not name

Modules = list[tuple[int, str, nn.Module]]  # layer index, name within the layer, module


def find_sites(
    model: nn.Module, layers: str, kinds: Mapping[str, Sequence[str]], wanted: str | Sequence[str]
) -> list[Site]:
    """The sites that `wanted` selects, layer by layer in the model's own order, each once.

    Args:
        model: real or meta; quantised linear layers count, fused projections (`qkv_proj`) are one site.
        layers: dotted name of the list of decoder layers.
        kinds: site kind -> module names inside one layer; empty where the model has none of that kind.
        wanted: kinds, `all_linear`, module names, ends of module names (`q_proj`) or shell patterns (`mlp.*`).

    Raises ConfigError when an entry matches nothing, when a wanted kind names a module that no layer has, and when what
    is wanted is no linear layer (GPT-2's Conv1D, 3-D expert weights).
    """
    modules = _layer_modules(model, layers)
    entries = [wanted] if isinstance(wanted, str) else list(wanted)
    chosen: set[str] = set()
    for entry in entries:
        chosen |= _choose(entry, kinds, modules)
    if not chosen:
        having = [kind for kind, names in kinds.items() if names]
        raise ConfigError(
            f"experts.sites={','.join(entries)} selects nothing: this model has no site of these kinds;"
            f" it has {', '.join(having) or 'none at all'}; or use {ALL_LINEAR}"
        )
    return [
        Site(
            name=f"{layers}.{index}.{name}",
            layer=index,
            kind=next((kind for kind, patterns in kinds.items() if any(matches(name, p) for p in patterns)), OTHER),
            in_features=module.in_features,
            out_features=module.out_features,
            has_bias=module.bias is not None,
        )
        for index, name, module in modules
        if name in chosen and isinstance(module, nn.Linear)
    ]


def check_sites(model: nn.Module, plan: Mapping[str, ExpertSpec], source: str) -> None:
    """Raise DataError unless every site of a stored plan is a linear layer of the model, of the size that it says."""
    modules = dict(model.named_modules())
    for name, spec in plan.items():
        module, site = modules.get(name), spec.site
        if not isinstance(module, nn.Linear):
            raise DataError(f"{source}: the model has no linear layer {name}")
        if (module.in_features, module.out_features) != (site.in_features, site.out_features):
            raise DataError(
                f"{source}: {name} is said to be {site.in_features:,} x {site.out_features:,}, but in the model it is"
                f" {module.in_features:,} x {module.out_features:,}"
            )


def matches(name: str, pattern: str) -> bool:
    """Whether a module's name is meant by a name, the end of a name, or a shell-style pattern."""
    return name == pattern or name.endswith(f".{pattern}") or fnmatchcase(name, pattern)


def count_layers(model: nn.Module, layers: str) -> int:
    """How many decoder layers a model has. ConfigError where `layers` names no list of them."""
    return len(_layer_list(model, layers))


def _layer_list(model: nn.Module, layers: str) -> nn.ModuleList:
    lists = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    if layers not in lists:
        wrong = f"model.layers='{layers}' is no list of layers in {type(model).__name__}"
        raise ConfigError(f"{wrong}{nearest(layers, lists)}")
    return lists[layers]


def _layer_modules(model: nn.Module, layers: str) -> Modules:
    return [
        (index, name, module)
        for index, layer in enumerate(_layer_list(model, layers))
        for name, module in layer.named_modules()
        if name
    ]


def _choose(entry: str, kinds: Mapping[str, Sequence[str]], modules: Modules) -> set[str]:
    """Names of the linear layers that one entry of `experts.sites` selects."""
    linear = {name for _, name, module in modules if isinstance(module, nn.Linear)}
    if entry == ALL_LINEAR:
        _refuse_non_linear(entry, modules)
        if not linear:
            raise ConfigError(f"experts.sites={ALL_LINEAR}: the layers of this model hold no linear layer")
        return linear
    is_kind = entry in kinds or entry in KINDS
    chosen: set[str] = set()
    for pattern in kinds.get(entry, ()) if is_kind else (entry,):
        found = {name for name in linear if matches(name, pattern)}
        if not found:
            _explain(pattern, entry if is_kind else None, kinds, modules)
        chosen |= found
    return chosen


def _explain(pattern: str, kind: str | None, kinds: Mapping[str, Sequence[str]], modules: Modules) -> NoReturn:
    """Raise the ConfigError that tells why a pattern selects no linear layer."""
    linear = {name for _, name, module in modules if isinstance(module, nn.Linear)}
    first, last = pattern.split(".")[0], pattern.split(".")[-1]
    related = [(i, name, m) for i, name, m in modules if matches(name, pattern) or name.split(".")[0] == first]
    related += [(i, name, m) for i, name, m in modules if last in dict(m.named_parameters(recurse=False))]
    _refuse_non_linear(pattern if kind is None else kind, related)
    if kind is not None:
        raise ConfigError(
            f"model.sites.{kind} names '{pattern}', which no layer of this model has{nearest(pattern, linear)};"
            " choose the model group of this model, or its names with model/sites"
        )
    ends = {name.rpartition(".")[2] for name in linear}
    known = linear if "." in pattern else {*ends, *kinds, *KINDS, ALL_LINEAR}
    raise ConfigError(f"experts.sites: no site matches '{pattern}'{nearest(pattern, known)}")


def _refuse_non_linear(entry: str, modules: Modules) -> None:
    """Raise for a weight that is meant by `entry` but sits in no linear layer, which a wrapper could not reach."""
    for _, name, module in modules:
        kind = type(module).__name__
        if kind == "Conv1D":
            raise ConfigError(
                f"experts.sites={entry}: '{name}' is a Conv1D (its weight is stored in x out), which is not served;"
                " use a model with nn.Linear layers"
            )
        stacked = [key for key, value in module.named_parameters(recurse=False) if value.ndim == 3]
        if stacked and "expert" in kind.lower():
            raise ConfigError(
                f"experts.sites={entry}: '{name}' is a {kind} with 3-D expert weights ({', '.join(stacked)}), which a"
                " wrapped linear layer cannot reach; choose attention sites, such as experts.sites=[attn_in,attn_out]"
            )
