"""A paper's table and finished runs of it, made up: no training, no composing."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from loramoe_train.reproduce.folder import Found
from loramoe_train.reproduce.schema import PaperTable
from loramoe_train.schema.launcher import LauncherConfig
from loramoe_train.sweeps.sweep import Job, Run, Sweep
from tests.composing import composed
from tests.sweeps.made import results


def table(**changes: Any) -> PaperTable:
    """Two methods, the base and one that is absent; two columns and their mean, one of them scored otherwise."""
    values: dict[str, Any] = {
        "paper": "A paper",
        "table": "Table 7",
        "reference": "lora",
        "methods": {
            "base": {"title": "base", "base": True},
            "other": {"title": "Other & co_", "absent": "nobody has it"},
            "lora": {"title": "LoRA", "recipe": "lora"},
            "mola": {"title": "MoLA", "recipe": "mola", "overrides": ["experts.layout=2468"]},
        },
        "columns": {
            "a": {"title": "A", "rule": "exact match"},
            "b": {"title": "B", "rule": "a judge", "not_comparable": "another judge"},
            "c": {"title": "C", "rule": "unknown"},
            "mean": {"title": "mean", "rule": "of A and B", "mean_of": ["a", "b"]},
        },
        "scales": {
            "paper": {
                "bases": {"tiny": {"title": "Tiny", "overrides": ["model=tiny"], "without": {}}},
                "train": {"all": ["data=tiny"]},
                "columns": {"a": {"benchmark": "tiny_math"}, "b": {"benchmark": "tiny_code"}},
                "seeds": [0, 1],
            }
        },
        "numbers": [
            {
                "base": "tiny",
                "mark": "seen",
                "source": "Table 7",
                "rows": {"lora": {"a": 50.0, "b": 60.5}, "mola": {"a": {"value": 90.0, "low": 89.0, "high": 91.0}}},
            }
        ],
    }
    return PaperTable(**{**values, **changes})


def finished(root: Path, runs: dict[str, dict[str, Any] | str | None], number: int = 1, **data: Any) -> Sweep:
    """ROOT/sweep-NUMBER on disk. `runs`: folder -> scores, or the text of results.json, or None for nothing.

    `data`: keys of the runs' `data` that are not the default's.
    """
    place = root / f"sweep-{number}"
    jobs = (Job("local-1", f".sweep/local-1/{n}.log") for n in range(len(runs)))
    made = []
    for index, (folder, job) in enumerate(zip(runs, jobs, strict=True)):
        base, method, train, *_, seed = folder.split("/")
        overrides = (f"base={base}", f"method={method}", f"train={train}", f"seed={seed}")
        made.append(Run(index, folder, overrides, method, (job,)))
    sweep = Sweep(place, str(root), LauncherConfig().model_dump(), (), tuple(made))
    (place / ".sweep" / "configs").mkdir(parents=True)
    sweep.write()
    config = composed("+recipe=lora")
    config = config.model_copy(update={"data": config.data.model_copy(update=data)})
    for run, content in zip(made, runs.values(), strict=True):
        values = config.model_copy(update={"seed": int(run.folder.rpartition("/")[2])}).plain()
        (place / ".sweep" / "configs" / f"{run.number}.yaml").write_text(yaml.safe_dump(values))
        if content is not None:
            (place / run.folder).mkdir(parents=True)
            text = content if isinstance(content, str) else json.dumps(results(content))
            (place / run.folder / "results.json").write_text(text)
    return sweep


def scores(a: float, b: float = 0.5, *, base: float | None = None, **made_with: Any) -> dict[str, Any]:
    """Of the two benchmarks, as fractions."""
    return {name: {"tuned": v, "base": base, **made_with} for name, v in (("tiny_math", a), ("tiny_code", b))}


def given(run: Found, *typed: str, computed: tuple[str, ...] = ()) -> Found:
    """The run as if the command line had said this of it."""
    own = (
        f"recipe={run.method}",
        "model=tiny",
        "data=tiny",
        *(["experts.layout=2468"] if run.method == "mola" else []),
    )
    overrides = (*own, *typed, "eval.base=true", *computed, "seed=0")
    return replace(run, status=replace(run.status, run=replace(run.status.run, overrides=overrides)))
