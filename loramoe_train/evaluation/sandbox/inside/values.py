"""Plain values as JSON, for the pipe between the foreign code and its judge.

Numbers, text, bytes, None, the built-in containers of these and a few more arrive as equal values, of the built-in type
whatever subclass they were; built-in types and modules as the receiver's own. Everything else stays where it is and
only a number goes over the pipe: see `judge.Reference`.
"""

import builtins
import importlib
import json
import sys
import types
from collections.abc import Callable
from typing import Any

sys.set_int_max_str_digits(0)

SEQUENCES: dict[str, type] = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}
MUTABLE = (list, dict, set, bytearray)

# types of the standard library whose objects are equal to others, numbers among them -> what makes one anew
STANDARD: dict[str, Callable[[Any], list[Any]]] = {
    "fractions.Fraction": lambda value: [value.numerator, value.denominator],
    "decimal.Decimal": lambda value: [str(value)],
    "collections.deque": lambda value: [list(value), value.maxlen],
    "datetime.date": lambda value: [value.year, value.month, value.day],
    "datetime.timedelta": lambda value: [value.days, value.seconds, value.microseconds],
    "datetime.datetime": lambda value: [*value.timetuple()[:6], value.microsecond],
    "datetime.time": lambda value: [value.hour, value.minute, value.second, value.microsecond],
}


def dumps(value: Any, hold: Callable[[Any], int]) -> str:
    """`hold` keeps an object that is not plain and says under which number. May raise RecursionError or MemoryError."""
    return json.dumps(_encode(value, hold))


def loads(text: str | bytes, resolve: Callable[[int], Any], module: Callable[[str], Any]) -> Any:
    """The value; `resolve` makes that of a number, `module` that of a module's name."""
    return _decode(json.loads(text), resolve, module)


def _encode(value: Any, hold: Callable[[Any], int]) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    for kind, made in SEQUENCES.items():
        if isinstance(value, made):
            return [kind, *[_encode(entry, hold) for entry in value]]  # type: ignore[attr-defined]
    if isinstance(value, dict):
        return ["dict", *[[_encode(key, hold), _encode(entry, hold)] for key, entry in value.items()]]
    if isinstance(value, bytes | bytearray):
        return ["bytes" if isinstance(value, bytes) else "bytearray", value.hex()]
    if isinstance(value, complex):
        return ["complex", value.real, value.imag]
    if isinstance(value, range):
        return ["range", value.start, value.stop, value.step]
    name = f"{type(value).__module__}.{type(value).__qualname__}"
    if name in STANDARD and getattr(value, "tzinfo", None) is None:
        return [name, *[_encode(entry, hold) for entry in STANDARD[name](value)]]
    if isinstance(value, type({}.keys()) | type({}.items())):
        kind = "keys" if isinstance(value, type({}.keys())) else "items"
        return [kind, *[_encode(entry, hold) for entry in value]]
    if isinstance(value, types.ModuleType):
        return ["module", value.__name__]
    if isinstance(value, type) and getattr(builtins, value.__name__, None) is value:
        return ["type", value.__name__]
    return ["held", hold(value)]


def _decode(value: Any, resolve: Callable[[int], Any], module: Callable[[str], Any]) -> Any:
    if not isinstance(value, list):
        return value
    kind, *parts = value
    if kind in SEQUENCES:
        return SEQUENCES[kind](_decode(part, resolve, module) for part in parts)
    if kind == "dict":
        return {_decode(key, resolve, module): _decode(entry, resolve, module) for key, entry in parts}
    if kind in ("bytes", "bytearray"):
        return {"bytes": bytes, "bytearray": bytearray}[kind].fromhex(parts[0])
    if kind == "complex":
        return complex(*parts)
    if kind == "range":
        return range(*parts)
    if kind in STANDARD:
        home, _, name = kind.rpartition(".")
        return getattr(importlib.import_module(home), name)(*[_decode(part, resolve, module) for part in parts])
    if kind == "keys":
        return dict.fromkeys(_decode(part, resolve, module) for part in parts).keys()
    if kind == "items":
        return dict(_decode(part, resolve, module) for part in parts).items()
    if kind == "module":
        return module(parts[0])
    if kind == "type":
        found = getattr(builtins, parts[0])
        if not isinstance(found, type):
            raise TypeError(f"{parts[0]} is no type")
        return found
    return resolve(int(parts[0]))
