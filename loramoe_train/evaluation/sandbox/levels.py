"""Which level is used: the strongest that holds, or the one that the user named."""

import shutil
import sys
from functools import cache

from loramoe_train.errors import ConfigError
from loramoe_train.evaluation.sandbox.box import Sandbox
from loramoe_train.evaluation.sandbox.probe import probe
from loramoe_train.evaluation.sandbox.types import LEVELS, Level, Limits

DEFAULT = Limits()
WEAK: tuple[Level, ...] = ("user",)


@cache
def detect(name: str = "auto", limits: Limits = DEFAULT, workers: int | None = None) -> Sandbox:
    """The strongest level that works here; a fraction of a second, once per process.

    Args:
        name: a level, or "auto" for the strongest. One that does not hide the user's files has to be named.

    Raises:
        ConfigError: model-written code cannot be contained on this machine, or not by the level that was named.
    """
    tried = []
    for level in possible_levels(name):
        sandbox = Sandbox(level, limits, workers)
        complaint = probe(sandbox)
        if complaint is None:
            return sandbox
        tried.append(f"{level} ({complaint})")
    reasons = f"; tried {', '.join(tried)}" if tried else "; that needs Linux"
    if name != "auto":
        raise ConfigError(f"eval.sandbox={name} does not work here{reasons}; leave it out for the strongest that does")
    raise ConfigError(
        f"eval.allow_code_execution=true, but nothing on this machine can contain model-written code{reasons}; install"
        " bubblewrap (apt install bubblewrap), leave benchmarks that run code out of eval.tasks, or accept that such"
        " code can read your files with eval.sandbox=user"
    )


def possible_levels(name: str) -> list[Level]:
    """What is worth trying, strongest first. Whether it works only a probe can tell."""
    if not sys.platform.startswith("linux"):
        return []
    levels = [level for level in LEVELS if level == name or (name == "auto" and level not in WEAK)]
    return levels if shutil.which("bwrap") or name != "auto" else [level for level in levels if level != "bubblewrap"]
