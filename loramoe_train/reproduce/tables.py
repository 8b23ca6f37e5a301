"""The tables below recipes/paper, by name."""

from pathlib import Path

import yaml
from pydantic import ValidationError

from loramoe_train.errors import ConfigError, nearest
from loramoe_train.paths import PAPER
from loramoe_train.reproduce.schema import PaperTable


def names() -> list[str]:
    return sorted(path.stem for path in PAPER.glob("*.yaml"))


def load(name: str) -> PaperTable:
    """A shipped table. Raises ConfigError for a name that is none."""
    if name not in names():
        raise ConfigError(f"there is no table '{name}'{nearest(name, names())}")
    return read(PAPER / f"{name}.yaml")


def read(path: Path) -> PaperTable:
    """Raises ConfigError naming file, key and what is wrong."""
    try:
        return PaperTable(**yaml.safe_load(path.read_text(encoding="utf-8")))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ConfigError(f"{path.name}: {where + ': ' if where else ''}{first['msg']}") from error
    except (OSError, TypeError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"{path.name} is no table: {str(error).splitlines()[0]}") from error
