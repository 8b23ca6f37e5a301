"""Small task files and mixtures for the data tests."""

import json
from pathlib import Path
from typing import Any

from loramoe_train.data.build import build_mixture
from loramoe_train.data.mixture import Mixture
from loramoe_train.schema.data import DataConfig, TaskConfig


def write_lines(path: Path, rows: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def qa_rows(name: str, count: int) -> list[dict[str, Any]]:
    """Rows of varying length; the question names task and row, so that any token stream can be traced back."""
    return [{"q": f"{name} {i} " + "dog " * (i * 7 % 11), "a": f"{i} " + "fox " * (i * 5 % 4)} for i in range(count)]


def qa_task(name: str, *, validation: bool = False, **changes: Any) -> dict[str, Any]:
    files = {"train": f"{name}/train.jsonl"} | ({"validation": f"{name}/validation.jsonl"} if validation else {})
    task = {"source": {"files": files}, "prompt": "Question: {{q}}\nAnswer:", "answer": " {{a}}"}
    return task | changes


def qa_config(root: Path, sizes: dict[str, int], **changes: Any) -> DataConfig:
    """A config of question-answer tasks whose train files are written below `root`."""
    for name, count in sizes.items():
        write_lines(root / name / "train.jsonl", qa_rows(name, count))
    plain = {
        "root": str(root),
        "tasks": list(sizes),
        "definitions": {name: qa_task(name) for name in sizes},
        "validation_examples": 0,
        "max_length": 64,
        "cache_dir": None,
    }
    return DataConfig.model_validate(plain | changes)


def qa_mixture(root: Path, sizes: dict[str, int], tokenizer: Any, **changes: Any) -> Mixture:
    return build_mixture(qa_config(root, sizes, **changes), tokenizer, seed=3)


def task_config(**changes: Any) -> TaskConfig:
    return TaskConfig.model_validate({"source": {"files": {}}} | changes)
