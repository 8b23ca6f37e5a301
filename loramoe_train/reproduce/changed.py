"""What a run was given beyond its table: keys of the command line, ranks of a budget.

A number made with fewer steps or documents than the table asks for must not stand beside the paper's as if it were the
table's own.
"""

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from loramoe_train.errors import shown
from loramoe_train.reproduce.folder import FREE, Found
from loramoe_train.reproduce.schema import PaperTable
from loramoe_train.trust import value_at

if TYPE_CHECKING:
    from loramoe_train.reproduce.outcome import Cell

# besides FREE: how a run goes about the same work
SAME_WORK = ("trainer.micro_batch_size", "trainer.parallel", "model.gradient_checkpointing", "eval.sandbox")
ALLOWS = "eval.allow_code_execution"
OF_BASE = ("eval", "data", "model")  # what changes the score of an untuned base
SCORED_WITH = {"limit": None, "max_length": None, "chat_template": False}  # keys of `eval` that a score stores
COMPUTED_FROM = "eval.base"  # the first of what the command itself adds to the overrides of a run (runs.py)


def changes(table: PaperTable, scale: str, run: Found) -> list[str]:
    """The overrides of a run that its table does not have, without those that change no number."""
    settings = table.scales[scale]  # type: ignore[index]
    given = run.status.run.overrides
    first = next((place for place, text in enumerate(given) if _key(text) == COMPUTED_FROM), None)
    known = run.method in table.methods and run.base in settings.bases and run.train in settings.train
    if not known or first is None:
        return []
    own = table.overrides(scale, run.base, run.method, run.train)
    typed = [text for text in given[:first] if text not in own and not _below(_key(text), (*FREE, *SAME_WORK, ALLOWS))]
    return [*typed, *(text for text in given[first:] if _below(_key(text), ("experts",)))]


def scored_later(run: Found, benchmark: str) -> list[str]:
    """How `loramoe-eval` has scored the run since, where that is not what the run itself was told."""
    own = run.sweep.values(run.status.run)
    stored = value_at(run.status.results.get("scores", {}).get(benchmark), "made_with.task")
    found = []
    for key, usual in SCORED_WITH.items():
        said = own.get(
            f"eval.{key}", json.dumps(usual)
        )  # as YAML: of such values JSON is a part, but for True and Null
        if isinstance(stored, dict) and key in stored and json.dumps(stored[key]) != said.lower():
            found.append(f"eval.{key}={shown(json.dumps(stored[key]))}")
    return found


def told(cell: "Cell", table: PaperTable, scale: str) -> "Cell":
    """The cell, not comparable with the paper's where its runs were given something else than the table says."""
    from loramoe_train.reproduce.outcome import NOT_COMPARABLE

    found = dict.fromkeys(text for run in cell.runs for text in changes(table, scale, run))
    if table.methods[cell.method].base:
        found = {text: None for text in found if _below(_key(text), OF_BASE)}
    places = (table.scales[scale].columns.get(name) for name in table.columns[cell.column].mean_of or [cell.column])  # type: ignore[index]
    scored = [place.benchmark for place in places if place is not None and place.benchmark is not None]
    later = dict.fromkeys(text for run in cell.runs for name in scored for text in scored_later(run, name))
    reasons = [
        f"run with {' '.join(found)}, which the table does not say" if found else "",
        f"scored with {' '.join(later)}, which its run was not told" if later else "",
    ]
    if not cell.scores or not any(reasons):
        return cell
    return replace(cell, status=NOT_COMPARABLE, why="; ".join(filter(None, (cell.why, *reasons))))


def _key(override: str) -> str:
    return override.lstrip("+~").partition("=")[0]


def _below(key: str, names: Sequence[str]) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in names)
