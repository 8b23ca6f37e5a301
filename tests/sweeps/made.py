"""Sweeps without a training: combinations as Hydra would hand them over, and folders with made-up results."""

import json
from pathlib import Path
from typing import Any

from loramoe_train.schema.launcher import LauncherConfig
from loramoe_train.sweeps.sweep import Composed, Job, Run, Sweep
from tests.composing import composed


def combination(*overrides: str, subfolder: str = "0", folder: str = "multirun/now", **changes: Any) -> Composed:
    """One run of a sweep; `changes` are top-level keys of its config."""
    config = composed("+recipe=mola").model_copy(update=changes)
    return Composed(tuple(overrides), config, {}, "mola", subfolder, folder)


def seeds(root: Path, count: int = 2) -> list[Composed]:
    return [combination(f"seed={n}", subfolder=str(n), seed=n, run_dir=str(root)) for n in range(count)]


def finished(root: Path, runs: list[tuple[str, ...]], scores: list[dict[str, Any] | None]) -> Sweep:
    """A sweep on disk; a run whose scores are None has left nothing."""
    parameters = LauncherConfig().model_dump()
    made = (Run(n, str(n), texts, None, (Job("local-1", f".sweep/local-1/{n}.log"),)) for n, texts in enumerate(runs))
    sweep = Sweep(root, str(root), parameters, (), tuple(made))
    root.mkdir(parents=True, exist_ok=True)
    sweep.write()
    for run, entry in zip(sweep.runs, scores, strict=True):
        if entry is not None:
            sweep.folder(run).mkdir()
            (sweep.folder(run) / "results.json").write_text(json.dumps(results(entry)))
    return sweep


def results(scores: dict[str, Any], **more: Any) -> dict[str, Any]:
    """The content of results.json; a number instead of an entry is the tuned score."""
    made_with = {"metric": "acc,none", "n": 100, "num_fewshot": 0, "fewshot_seed": None, "version": "1.0"}
    entries = {
        name: {"base": 0.25, "tuned": value, "difference": value - 0.25, **made_with}
        if isinstance(value, float)
        else {**made_with, "base": 0.25, "difference": None, **value}
        for name, value in scores.items()
    }
    stages = [{"name": "train", "eval_loss": 1.25}]
    versions = {"lm_eval": "0.4.13", "loramoe_train": "0.1.0", "transformers": "5.23.0"}
    return {"schema": 1, "scores": entries, "versions": versions, "training": {"stages": stages}, **more}
