"""How the routers of a finished run share out their weight, read from its metrics.jsonl. No torch in here.

A record holds, by layer and task, the share of the weight that each expert gets: the mean over the layer's sites.
Records of kind `eval_routing` are of held-out examples, routed as at inference; those of kind `routing` are of the
training steps since the line before.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from loramoe_train.errors import DataError, nearest

HELD_OUT, TRAINING = "eval_routing", "routing"
LOG = "metrics.jsonl"


def last_record(run: Path, kinds: Sequence[str] = (HELD_OUT,)) -> dict[str, Any]:
    """The newest record of the first of these kinds that a run has. Raises DataError for a run without one."""
    path = run / LOG
    newest: dict[str, bytes] = {}
    try:
        with path.open("rb") as file:
            for line in file:  # only what is wanted is parsed: a log has thousands of lines
                newest.update({kind: line for kind in kinds if line.startswith(f'{{"kind": "{kind}"'.encode())})
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror})") from error
    found = next((newest[kind] for kind in kinds if kind in newest), None)
    if found is None:
        raise DataError(
            f"{path} has no routing of held-out examples: the run has no routers that decide token by token, or no"
            " held-out examples (data.validation_examples=0), or an older version made it"
        )
    try:
        record = json.loads(found)
        _check(record["layers"])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"{path} is damaged: its last line of kind {kinds[0]} is no routing record") from error
    return record


def _check(layers: Mapping[str, Mapping[str, Sequence[float]]]) -> None:
    for weights in (weights for tasks in layers.values() for weights in tasks.values()):
        if not weights or not all(0 <= weight <= 1.001 for weight in weights):  # shares are rounded
            raise ValueError


def shares(record: Mapping[str, Any]) -> dict[str, list[float]]:
    """Task -> per cent of the weight that each expert gets, the mean over layers; where layers differ, over those with
    the largest number of experts.
    """
    layers = list(record["layers"].values())
    most = max((len(weights) for tasks in layers for weights in tasks.values()), default=0)
    found = {}
    for task in dict.fromkeys(task for tasks in layers for task in tasks):
        rows = [tasks[task] for tasks in layers if task in tasks and len(tasks[task]) == most and sum(tasks[task]) > 0]
        if rows:
            found[task] = [100 * sum(row[e] / sum(row) for row in rows) / len(rows) for e in range(most)]
    return found


def mean_share(found: Mapping[str, Sequence[float]]) -> list[float]:
    """Per cent that each expert gets of all tasks, each task counting alike; of no task, nothing."""
    rows = list(found.values())
    return [sum(column) / len(rows) for column in zip(*rows, strict=True)]


def share(record: Mapping[str, Any], task: str | None, take: str) -> float:
    """Per cent that the expert with the `largest` or `smallest` share gets, of one task or, for None, of all alike.

    Raises DataError where the record has no such task.
    """
    found = shares(record)
    if not found:
        raise DataError("its routing record has no layer in which anything was decided")
    if task is not None and task not in found:
        raise DataError(f"its routing record has no task '{task}'{nearest(task, found)}")
    values = mean_share(found) if task is None else found[task]
    return max(values) if take == "largest" else min(values)
