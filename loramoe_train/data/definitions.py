"""Task files: `NAME.yaml` in a folder of tasks -> the plain dict that `TaskConfig` validates. No torch."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml

from loramoe_train.errors import ConfigError, nearest


def load_definitions(tasks: Iterable[str], folders: Sequence[Path]) -> dict[str, dict[str, Any]]:
    """`{task: its definition}` in the order of `tasks`; the first folder that has the file wins.

    Raises ConfigError for a task without a file (with the nearest known name) and a file that is not a YAML mapping.
    """
    # a task is a plain name: "../x" must not reach outside the folders
    known: dict[str, Path] = {}
    for folder in folders:
        for path in sorted(Path(folder).glob("*.yaml")):
            known.setdefault(path.stem, path)
    definitions = {}
    for task in tasks:
        if task not in known:
            raise ConfigError(f"data.tasks: no task is called '{task}'{nearest(task, known)}")
        definitions[task] = _load(task, known[task])
    return definitions


def _load(task: str, path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise ConfigError(
            f"{path}{line}: not valid YAML ({getattr(error, 'problem', None) or 'syntax error'})"
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: cannot be read ({error})") from error
    if not isinstance(content, dict):
        raise ConfigError(
            f"{path}: task {task} must be a mapping with the keys of a task (source, prompt, answer, ...)"
        )
    return content
