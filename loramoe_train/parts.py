"""Parts of the program named in YAML: `_target_` is a class, the other keys its arguments, nested parts included.

A config from a stranger must not run a stranger's code, so `_target_` may only name a class of the folders that parts
live in (other classes of this package open files), or below a module prefix that the user lists in `trusted_modules`.
`check_part` verifies names and arguments by reading the class's source, without importing it, so that a typo is told
within a second and before torch is loaded. `build_part` makes the object; constructors that ask for a fact by name
(`d_in`, `num_experts`, `top_k`, ...) get it from `facts` unless the YAML gives it.
"""

import ast
import importlib
import inspect
from collections.abc import Collection, Mapping
from functools import lru_cache
from typing import Any

from loramoe_train.errors import ConfigError, nearest
from loramoe_train.paths import PACKAGE

TARGET = "_target_"
OWN_PREFIX = "loramoe_train"
FOLDERS = ("experts", "routers", "aux_losses")  # of this package, with parts in them


Signature = tuple[tuple[str, ...], tuple[str, ...]]  # all arguments, required ones
NOTHING: Signature = (), ()


@lru_cache(maxsize=256)
def _own_classes(module: str) -> dict[str, Signature] | None:
    """The constructors of a module of this package, by class name; None if there is no such module."""
    path = PACKAGE.joinpath(*module.split(".")[1:])
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    if not path.is_file():
        return None
    body = ast.parse(path.read_text(encoding="utf-8")).body
    classes = {node.name: node for node in body if isinstance(node, ast.ClassDef)}
    imports = [node for node in body if isinstance(node, ast.ImportFrom) and str(node.module).startswith(OWN_PREFIX)]
    origin = {alias.asname or alias.name: (str(node.module), alias.name) for node in imports for alias in node.names}

    def signature(name: str) -> Signature:
        if name in classes:
            own, passes_on = _arguments(classes[name])
            bases = [signature(ast.unparse(base)) for base in classes[name].bases] if passes_on else []
            return _joined(own, *bases)
        home, there = origin.get(name, (OWN_PREFIX, name))
        return (_own_classes(home) or {}).get(there, NOTHING)

    return {name: signature(name) for name in classes}


def _arguments(node: ast.ClassDef) -> tuple[Signature, bool]:
    """Arguments of `__init__`, of a dataclass its fields; and whether those of the bases are arguments, too: a class
    without a constructor has theirs, and one with `**more` hands them on."""
    for entry in node.body:
        if isinstance(entry, ast.FunctionDef) and entry.name == "__init__":
            spec = entry.args
            positional = [a.arg for a in [*spec.posonlyargs, *spec.args][1:]]
            required = positional[: len(positional) - len(spec.defaults)]
            keyword = [a.arg for a in spec.kwonlyargs]
            required += [a for a, d in zip(keyword, spec.kw_defaults, strict=True) if d is None]
            return (tuple(positional + keyword), tuple(required)), spec.kwarg is not None
    fields = [e for e in node.body if isinstance(e, ast.AnnAssign) and isinstance(e.target, ast.Name)]
    if not any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list):
        fields = []
    return (tuple(f.target.id for f in fields), tuple(f.target.id for f in fields if f.value is None)), True


def _joined(own: Signature, *others: Signature) -> Signature:
    """What a class takes itself, then what it hands on and does not take itself."""
    allowed, required = list(own[0]), list(own[1])
    for more, needed in others:
        required += [name for name in needed if name not in allowed]
        allowed += [name for name in more if name not in allowed]
    return tuple(allowed), tuple(required)


def _known_modules() -> list[str]:
    files = [p for p in PACKAGE.rglob("*.py") if p.name != "__init__.py"]
    names = [p.relative_to(PACKAGE).with_suffix("").parts for p in files]
    return [".".join([OWN_PREFIX, *parts]) for parts in names if parts[0] in FOLDERS]


def _signature(target: object, key: str, trusted: Collection[str]) -> Signature:
    if not isinstance(target, str) or "." not in target or not all(map(str.isidentifier, target.split("."))):
        raise ConfigError(f"{key}.{TARGET}: '{target}' is no class; give package.module.Class")
    module, _, name = target.rpartition(".")
    if module == OWN_PREFIX or module.startswith(OWN_PREFIX + "."):
        folder = "".join(module.split(".")[1:2])
        classes = _own_classes(module) if folder in FOLDERS else None
        if classes is None:
            near = nearest(module, _known_modules())
            raise ConfigError(f"{key}.{TARGET}: there is no module {module} with parts in it{near}")
        if name.startswith("_") or name not in classes:
            raise ConfigError(f"{key}.{TARGET}: {module} has no class '{name}'{nearest(name, classes)}")
        return classes[name]
    if not any(module == prefix or module.startswith(prefix + ".") for prefix in trusted):
        raise ConfigError(
            f"{key}.{TARGET}: '{target}' lies outside {OWN_PREFIX}; if you trust that code, add its package to"
            f" trusted_modules, e.g. trusted_modules=[{module.split('.')[0]}]"
        )
    parameters = inspect.signature(_load(target, key)).parameters.values()
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    return tuple(p.name for p in named), tuple(p.name for p in named if p.default is p.empty)


def check_part(part: Mapping[str, Any], key: str, *, facts: Collection[str], trusted: Collection[str] = ()) -> None:
    """Raise ConfigError, with the full key, for an unknown class, an unknown argument or a missing one."""
    if TARGET not in part:
        raise ConfigError(f"{key}.{TARGET} is missing; a part needs the class that it is made of")
    allowed, required = _signature(part[TARGET], key, trusted)
    given = [name for name in part if name != TARGET]
    for name in given:
        if name not in allowed:
            raise ConfigError(f"{key}.{name}: {part[TARGET]} takes no such argument{nearest(name, allowed)}")
        if isinstance(part[name], Mapping) and TARGET in part[name]:
            check_part(part[name], f"{key}.{name}", facts=facts, trusted=trusted)
        elif _holds_part(part[name]):
            raise ConfigError(
                f"{key}.{name} holds a {TARGET} where nothing is made of it; a part is an argument itself"
            )
    for name in required:
        if name not in given and name not in facts:
            raise ConfigError(f"{key}.{name} is missing: {part[TARGET]} needs it")


def _holds_part(value: Any) -> bool:
    if isinstance(value, Mapping):
        return TARGET in value or any(map(_holds_part, value.values()))
    return isinstance(value, list | tuple) and any(map(_holds_part, value))


def takes(part: Mapping[str, Any], fact: str, trusted: Collection[str] = ()) -> bool:
    """Whether a part, or one nested in it, asks for `fact` and does not fix it itself."""
    allowed, _ = _signature(part[TARGET], "part", trusted)
    nested = (value for value in part.values() if isinstance(value, Mapping) and TARGET in value)
    return (fact in allowed and fact not in part) or any(takes(value, fact, trusted) for value in nested)


def build_part(part: Mapping[str, Any], key: str, *, facts: Mapping[str, Any], trusted: Collection[str] = ()) -> Any:
    """The object that a checked part describes. ConfigError if its constructor refuses a value."""
    allowed, _ = _signature(part[TARGET], key, trusted)
    arguments = {name: value for name, value in facts.items() if name in allowed}
    for name, value in part.items():
        if isinstance(value, Mapping) and TARGET in value:
            value = build_part(value, f"{key}.{name}", facts=facts, trusted=trusted)
        if name != TARGET:
            arguments[name] = value
    try:
        return _load(str(part[TARGET]), key)(**arguments)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{key}: {error}") from error


def _load(target: str, key: str) -> Any:
    module, _, name = target.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"{key}.{TARGET}: cannot import {target}: {error}") from error
