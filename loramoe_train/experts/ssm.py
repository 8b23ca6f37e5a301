"""Routed projections inside state-space mixers, which do not always call them.

transformers' Mamba mixers multiply `dt_proj.weight` themselves (the bias joins later, in float32, inside the scan), and
in training they offer the raw weights of `x_proj`, `dt_proj` and `out_proj` to a fused kernel. A wrapped linear would
be bypassed there. `adapt_mixers` swaps the class of every mixer with such a projection for a subclass whose forward is
the original one, run on a view of the mixer in which

- `training` is False, which is what the mixers ask before they offer their weights to the fused kernel; the separate
  convolution and scan kernels stay in use;
- a routed `dt_proj` is a call-through object: `weight @ t` runs the wrapper on t, and `bias` is the base's. It is no
  tensor, so a kernel that asked for the weight all the same would fail rather than ignore the experts.

Names, parameters and other mixers stay as they are; `restore_mixers` undoes it. Read in transformers 5.23, models
mamba, falcon_mamba, jamba, mamba2, bamba, falcon_h1, granitemoehybrid, nemotron_h, zamba, zamba2.

Legend: B rows, S positions, D in (time step rank), O out.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from torch import Tensor, nn

from loramoe_train.errors import ConfigError, nearest

_SELECTIVE = frozenset({"in_proj", "x_proj", "dt_proj", "out_proj"})
_STATE_SPACE_DUAL = frozenset({"in_proj", "out_proj"})  # dt comes out of in_proj, no further linear layers
SERVED: dict[str, frozenset[str]] = {
    "MambaMixer": _SELECTIVE,
    "FalconMambaMixer": _SELECTIVE,
    "JambaMambaMixer": _SELECTIVE,
    "ZambaMambaMixer": _STATE_SPACE_DUAL,  # its x and dt projections are bare parameters
    "Mamba2Mixer": _STATE_SPACE_DUAL,
    "BambaMixer": _STATE_SPACE_DUAL,
    "FalconH1Mixer": _STATE_SPACE_DUAL,
    "GraniteMoeHybridMambaLayer": _STATE_SPACE_DUAL,
    "NemotronHMamba2Mixer": _STATE_SPACE_DUAL,
    "Zamba2MambaMixer": _STATE_SPACE_DUAL,
}
"""Mixer class -> the projections that can carry experts. Each is covered by a test on a tiny model."""


def adapt_mixers(model: nn.Module, site_names: Iterable[str]) -> list[str]:
    """Make the state-space mixers among the parents of the wrapped sites call every wrapped projection.

    To be called after wrapping; calling it again changes nothing. Returns the names of the mixers adapted now, which
    are those with a routed projection besides `in_proj` (that one is always called). Parents that are no state-space
    mixers are left alone. Raises ConfigError for a mixer class, or a projection of one, that is not known to be served.
    """
    routed: dict[str, set[str]] = {}
    for site in site_names:
        parent, _, own = site.rpartition(".")
        routed.setdefault(parent, set()).add(own)
    adapted = []
    for name, projections in routed.items():
        mixer = model.get_submodule(name)
        if isinstance(mixer, _Adapted) or not is_mixer(mixer):
            continue
        _check_served(mixer, name, projections)
        if projections - {"in_proj"}:
            mixer.__class__ = _adapted_class(type(mixer))
            adapted.append(name)
    return adapted


def restore_mixers(model: nn.Module) -> list[str]:
    """Give adapted mixers their own class back (before unwrapping); returns their names."""
    restored = []
    for name, module in model.named_modules():
        if isinstance(module, _Adapted):
            module.__class__ = module.original
            restored.append(name)
    return restored


def is_mixer(module: nn.Module) -> bool:
    """Whether a module is a state-space (or related recurrent) mixer: it has a decay matrix or a causal convolution."""
    known = type(module).__name__ in SERVED
    return known or isinstance(module, _Adapted) or hasattr(module, "A_log") or hasattr(module, "conv1d")


def _check_served(mixer: nn.Module, name: str, projections: set[str]) -> None:
    kind = type(mixer).__name__
    if kind not in SERVED:
        raise ConfigError(
            f"experts.sites: {name} is a {kind}, a state-space mixer that routed layers cannot serve: it may read raw"
            f" weights past them; choose attention or ffn sites (served mixers: {', '.join(sorted(SERVED))})"
        )
    strangers = projections - SERVED[kind]
    if strangers:
        first = min(strangers)
        raise ConfigError(f"experts.sites: '{first}' of {name} ({kind}) cannot be routed{nearest(first, SERVED[kind])}")
    if "forward" in vars(mixer):
        raise ConfigError(
            f"model: the forward of {name} ({kind}) was replaced on the instance (accelerate does that when it spreads"
            " or offloads a model); load a state-space model onto one device"
        )


class _Adapted(nn.Module):
    """Marks an adapted mixer; `original` is the class it had."""

    original: type[nn.Module]


@cache
def _adapted_class(original: type[nn.Module]) -> type[nn.Module]:
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return original.forward(_MixerView(self), *args, **kwargs)

    members = {"forward": forward, "original": original, "__module__": __name__, "__doc__": original.__doc__}
    return type(f"Routed{original.__name__}", (original, _Adapted), members)


class _MixerView:
    """A mixer as its own forward shall see it. Reading passes through; setting an attribute fails."""

    __slots__ = ("_mixer",)
    training = False

    def __init__(self, mixer: nn.Module) -> None:
        object.__setattr__(self, "_mixer", mixer)

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._mixer, name)
        if name == "dt_proj" and is_wrapper(value):
            return _CallThrough(value)
        return value

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"a routed {type(self._mixer).__name__} must not set '{name}' during its forward")


def is_wrapper(module: nn.Module) -> bool:
    """Whether a linear layer has been wrapped: the frozen layer is its `base`, and it has no weight of its own."""
    return isinstance(getattr(module, "base", None), nn.Module) and not hasattr(module, "weight")


class _CallThrough:
    """Stands for a wrapped `dt_proj`: its `weight @ t` is the wrapper's output without the bias.

    It has no `_hf_hook`, so that accelerate's decorator of the mixers' forward finds nothing to fire here.
    """

    __slots__ = ("_module",)

    def __init__(self, module: nn.Module) -> None:
        self._module = module

    @property
    def weight(self) -> "_ThroughWeight":
        return _ThroughWeight(self._module)

    @property
    def bias(self) -> Tensor | None:
        return self._module.base.bias

    def __call__(self, x_BSD: Tensor) -> Tensor:
        """Mixers of a quantised model call `dt_proj(t) - bias` instead."""
        return self._module(x_BSD)


class _ThroughWeight:
    __slots__ = ("_module",)

    def __init__(self, module: nn.Module) -> None:
        self._module = module

    def __matmul__(self, x_BDS: Tensor) -> Tensor:
        with _leaving_out_bias(self._module.base):
            y_BSO = self._module(x_BDS.transpose(-1, -2))
        return y_BSO.transpose(-1, -2)


@contextmanager
def _leaving_out_bias(base: nn.Module) -> Iterator[None]:
    """For a while `base(x)` is W x: adding the bias and taking it off again would cost digits, in bf16 all that matter.

    A plain linear then multiplies in the very order of the mixers, so that without experts the result is the mixer's
    own, bit for bit.
    """
    plain = type(base) is nn.Linear
    if plain:
        base.forward = lambda x_BSD: (base.weight @ x_BSD.transpose(-1, -2)).transpose(-1, -2)
    # a quantised linear reads its bias at each call, and so do experts that scale W x
    bias, base.bias = base.bias, None
    try:
        yield
    finally:
        base.bias = bias
        if plain:
            del base.forward
