"""Options and choices of groups as they were typed (`router=soft`), checked before Hydra composes: it takes a null or a
number for a defect of its own, and lays two recipes over each other without a word.

Options of a group that do not exist are left for Hydra to find, for there may be others in a folder of the user's.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

from loramoe_train.errors import ConfigError, shown
from loramoe_train.paths import CONFIGS, recipe_files

SEVERAL = "aux_loss"  # the group of which any number may be chosen
INSTEAD = {"eval": "to train without evaluation: eval.enabled=false", "recipe": "for none leave it out"}
MALFORMED = (
    "cannot be read; close quotes and brackets, and give a value with accents or other rare characters quotes of its"
    " own: 'KEY=\"VALUE\"'"
)


def groups() -> dict[str, list[str]]:
    """Every shipped group and its options."""
    found: dict[str, list[str]] = {}
    for path in sorted(CONFIGS.glob("*/**/*.yaml")):
        found.setdefault(path.parent.relative_to(CONFIGS).as_posix(), []).append(path.stem)
    return {**found, "recipe": list(recipe_files())}


def check_options(arguments: Sequence[str]) -> None:
    """Raise ConfigError for options that Hydra does not take: it would print all its usage, or a traceback."""
    from hydra._internal.utils import get_args_parser

    def refuse(message: str) -> NoReturn:
        raise ConfigError(f"{message}; --hydra-help lists the options")

    parser = get_args_parser()
    parser.error = refuse  # type: ignore[method-assign]
    given = parser.parse_args(list(arguments))
    if given.experimental_rerun is not None:
        refuse("--experimental-rerun loads a pickled job, which could run any code; give the run's own command")
    if given.resolve and not (given.cfg or given.help):
        refuse("--resolve goes with --cfg job")
    ways = {"--run": given.run, "--multirun": given.multirun, "--cfg": given.cfg, "--info": given.info}
    chosen = [name for name, value in ways.items() if value]
    if len(chosen) > 1:
        refuse(f"{' and '.join(chosen)} exclude each other")


def check_choices(overrides: Sequence[str]) -> None:
    """Raise ConfigError for a choice that no composition can make. What cannot be read is left for Hydra to refuse."""
    known = groups()
    recipes = [text for text in overrides if text.lstrip("+").startswith("recipe=")]
    if len(recipes) > 1:
        raise ConfigError(f"recipe is given twice ({' '.join(text.lstrip('+') for text in recipes)}); give one")
    for text in overrides:
        bare = text.lstrip("+")
        key, equals, typed = bare.partition("=")
        group = key.partition("@")[0]
        if equals and not key.strip("~"):
            raise ConfigError(f"{shown(text)}: there is no key before the =")
        if key.startswith("~") and key[1:] in known and key != "~recipe":
            raise ConfigError(f"{text}: a group cannot be left out{_cure(key[1:], known[key[1:]])}")
        if not equals or (group not in known and not group.startswith("hydra/")):
            continue
        cure = _cure(group, known.get(group, []))
        for value in _values(bare):
            if isinstance(value, list) and not all(isinstance(name, str) for name in value):
                raise ConfigError(f"{group}={shown(typed)}: {group} takes names{cure}")
            if isinstance(value, list) and group != SEVERAL and group in known:
                raise ConfigError(f"{group}={shown(typed)}: {group} takes one name and no list{cure}")
            if not isinstance(value, str | list | dict):
                raise ConfigError(f"{group}={shown(typed)}: {group} is a group and takes a name{cure}")


def _cure(group: str, options: Sequence[str]) -> str:
    if not options:
        return ""
    names = f"; choose one of {', '.join(options[:20])}{', ...' if len(options) > 20 else ''}"
    nothing = f"{group}=none" if "none" in options else ""
    instead = INSTEAD.get(group) or (nothing and f"for nothing: {nothing}")
    return names + (f"; {instead}" if instead else "")


def _values(override: str) -> Iterator[Any]:
    """The value of an override, or all values of one that is swept; nothing for one that cannot be read."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.core.override_parser.types import ChoiceSweep, Glob, Override
    from hydra.errors import HydraException

    try:
        value = OverridesParser.create().parse_override(override).value()
    except HydraException:
        return
    each = value.list if isinstance(value, ChoiceSweep) else [value]
    yield from (Override._convert_value(entry) for entry in each if not isinstance(entry, Glob))
