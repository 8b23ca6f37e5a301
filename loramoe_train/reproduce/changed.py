"""What a run was given beyond its table: keys of the command line, ranks of a budget.

A number made with fewer steps or documents than the table asks for must not stand beside the paper's as if it were the
table's own.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from loramoe_train.reproduce.folder import FREE, Found
from loramoe_train.reproduce.schema import PaperTable

if TYPE_CHECKING:
    from loramoe_train.reproduce.outcome import Cell

# besides FREE: how a run goes about the same work
SAME_WORK = ("trainer.micro_batch_size", "trainer.parallel", "model.gradient_checkpointing", "eval.sandbox")
ALLOWS = "eval.allow_code_execution"
OF_BASE = ("eval", "data", "model")  # what changes the score of an untuned base
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


def told(cell: "Cell", table: PaperTable, scale: str) -> "Cell":
    """The cell, not comparable with the paper's where its runs were given something else than the table says."""
    from loramoe_train.reproduce.outcome import NOT_COMPARABLE

    found = dict.fromkeys(text for run in cell.runs for text in changes(table, scale, run))
    if table.methods[cell.method].base:
        found = {text: None for text in found if _below(_key(text), OF_BASE)}
    if not cell.scores or not found:
        return cell
    reason = f"run with {' '.join(found)}, which the table does not say"
    return replace(cell, status=NOT_COMPARABLE, why="; ".join(filter(None, (cell.why, reason))))


def _key(override: str) -> str:
    return override.lstrip("+~").partition("=")[0]


def _below(key: str, names: Sequence[str]) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in names)
