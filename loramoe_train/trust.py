"""What a file from somebody else may not decide. Torch-free.

A config file, an adapter's manifest and a run folder are data. None of them may say whose code runs, and none may lead
what this program writes out of the folder that the user named. `parts.py` restricts `_target_`; here is the rest.
"""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from loramoe_train.errors import ConfigError
from loramoe_train.paths import CONFIGS

# Keys that let further code run (what a module, a model's repository or a model has written, lines of a job's script)
# or say how that is contained, each with the value that anybody may give.
TYPED_ONLY: dict[str, object] = {
    "trusted_modules": [],
    "model.trust_remote_code": False,
    "eval.allow_code_execution": False,
    "eval.sandbox": "auto",
    "launcher.setup": [],
    "launcher.additional_parameters": {},
}
HYDRA = re.compile(r"\bhydra\b")


def value_at(values: Any, key: str) -> Any:
    """What nested plain values hold at a dotted key; None where there is nothing."""
    for part in key.split("."):
        values = values.get(part) if isinstance(values, Mapping) else None
    return values


def is_typed(key: str, overrides: Sequence[str]) -> bool:
    """Whether the command line itself sets a key."""
    return any(text.lstrip("+").partition("=")[0] == key for text in overrides)


def refuse_untyped(values: Mapping[str, Any], overrides: Sequence[str]) -> None:
    """Raise ConfigError where a config file, and not the command line, sets one of TYPED_ONLY."""
    for key, harmless in TYPED_ONLY.items():
        value = value_at(values, key)
        each = isinstance(value, Mapping) and all(is_typed(f"{key}.{name}", overrides) for name in value)
        if value not in (None, harmless) and not each and not is_typed(key, overrides):
            raise ConfigError(
                f"{key} may only be set on the command line: a file must not widen what it may run; if you trust it,"
                f" add {key}={_typed(value)}"
            )


def _typed(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"{{{','.join(f'{name}: {entry}' for name, entry in value.items())}}}"
    return f"[{','.join(map(str, value))}]" if isinstance(value, list) else str(value).lower()


def guard_config_files() -> None:
    """From now on Hydra refuses a config file, other than the shipped ones, that sets something of Hydra itself.

    Hydra makes the objects named below `hydra.callbacks` before it calls us, hands `hydra.job_logging` to a function
    that calls whatever it names, and takes overrides out of `hydra.sweeper.params` for typed ones. Damaged files become
    ConfigErrors too.
    """
    import yaml
    from hydra._internal.core_plugins.file_config_source import FileConfigSource as HydrasOwn
    from hydra._internal.sources_registry import SourcesRegistry
    from hydra.plugins.config_source import ConfigLoadError, ConfigResult
    from omegaconf import OmegaConf

    class FileConfigSource(HydrasOwn):  # Hydra's registry goes by the name
        def load_config(self, config_path: str) -> ConfigResult:
            place = Path(self.path) / config_path
            try:
                found = super().load_config(config_path)
            except ConfigLoadError:  # no such file, which Hydra explains
                raise
            except (yaml.YAMLError, OSError, ValueError, RecursionError) as error:
                reason = "nested too deeply" if isinstance(error, RecursionError) else _line(error)
                raise ConfigError(f"{place}: not a config file ({reason})") from error
            if Path(self.path) != CONFIGS:
                content = OmegaConf.to_container(found.config, resolve=False)
                defaults = content.get("defaults") if isinstance(content, dict) else None
                said = [*config_path.split("/"), *map(str, content), str(defaults), *map(str, found.header.values())]
                if any(HYDRA.search(text) for text in said):
                    raise ConfigError(
                        f"{place} sets something of hydra, which can run any code; give hydra.KEY=VALUE on the command"
                        " line instead"
                    )
            return found

    SourcesRegistry.instance().types[FileConfigSource.scheme()] = FileConfigSource


def _line(error: Exception) -> str:
    mark = getattr(error, "problem_mark", None)
    text = str(getattr(error, "problem", None) or error).split("\n")[0]
    return f"line {mark.line + 1}: {text}" if mark else text


def refuse_outside_links(folder: Path) -> None:
    """Raise ConfigError where a link inside a run folder leads out of it: what is written there would land elsewhere.

    `wandb` links its log to a folder of its own, and makes those links anew without following them.
    """
    home = Path(os.path.realpath(folder))
    for place, folders, files in os.walk(home):
        for name in (*folders, *files):
            path = Path(place, name)
            if path.is_symlink() and not Path(os.path.realpath(path)).is_relative_to(home):
                raise ConfigError(
                    f"{path} is a link that leads out of the folder, to {os.readlink(path)}, and what is written there"
                    " would change files elsewhere; replace the link, or give another run_dir"
                )
        if Path(place) == home and "wandb" in folders:
            folders.remove("wandb")
