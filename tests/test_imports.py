"""Which folder may import which: read from the source, so that a lazy import counts as well."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from loramoe_train.paths import PACKAGE

HEAVY = {"torch", "transformers", "datasets", "accelerate", "peft", "lm_eval", "bitsandbytes", "wandb"}
# folder or file -> what it may not import, ours (dotted below the package) or others'
FORBIDDEN = {
    "routing": {"transformers", "hydra", "datasets", "accelerate", "loramoe_train.experts", "loramoe_train.training"},
    "routers": {"transformers", "hydra", "datasets", "accelerate", "loramoe_train.experts", "loramoe_train.training"},
    "aux_losses": {
        "transformers",
        "hydra",
        "datasets",
        "accelerate",
        "loramoe_train.experts",
        "loramoe_train.training",
    },
    "experts": {
        "hydra",
        "datasets",
        "accelerate",
        "loramoe_train.routers",
        "loramoe_train.training",
        "loramoe_train.data",
    },
    "data": {"hydra", "accelerate", "loramoe_train.experts", "loramoe_train.routers", "loramoe_train.models"},
    "training": {"hydra", "lm_eval", "loramoe_train.routers", "loramoe_train.aux_losses", "loramoe_train.models"},
    "evaluation": {"hydra", "loramoe_train.training", "loramoe_train.data", "loramoe_train.routers"},
    "schema": HEAVY | {"hydra"},
}


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module)
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


@pytest.mark.parametrize("folder", sorted(FORBIDDEN))
def test_folders_know_only_what_they_may(folder):
    files = list((PACKAGE / folder).rglob("*.py"))
    assert files
    for path in files:
        for name in imported(path):
            wrong = [bad for bad in FORBIDDEN[folder] if name == bad or name.startswith(bad + ".")]
            assert not wrong, f"{path.relative_to(PACKAGE)} imports {name}"


def test_only_one_file_knows_the_harness():
    users = [p for p in PACKAGE.rglob("*.py") if any(n.split(".")[0] == "lm_eval" for n in imported(p))]
    assert {p.parent.name for p in users} <= {"evaluation", "tasks"}


@pytest.mark.parametrize(
    "module",
    ["cli", "validation", "settle", "training.stages", "data.definitions", "parts", "sweeps.command", "sweeps.job"],
)
def test_what_answers_at_once_stays_light(module):
    code = f"import sys, loramoe_train.{module}; print(sorted({HEAVY!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
