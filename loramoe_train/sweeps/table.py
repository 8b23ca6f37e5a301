"""The scores of a sweep's runs side by side, from their results.json alone. No torch in here.

Rows are runs, or groups of runs that differ in one key only (`over=seed`), as mean ± standard deviation. Scores are
compared only where they were made alike: same task definition, number of documents, few-shot examples, same libraries.
"""

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import stdev
from typing import Any

from loramoe_train.errors import ConfigError, nearest, shown
from loramoe_train.sweeps.status import DONE, RunStatus
from loramoe_train.sweeps.sweep import Sweep
from loramoe_train.trust import value_at

SIDES = ("tuned", "base", "difference")
# of a benchmark's entry in results.json, and of its versions: what must be the same for two scores to be compared
MADE_WITH = ("metric", "n", "num_fewshot", "fewshot_seed", "version")
DECIDED_BY = {
    "the definition": "made_with.task.definition_sha256",
    "the data": "made_with.task.data",
    "eval.chat_template": "made_with.task.chat_template",
    "eval.max_length": "made_with.task.max_length",
    "the number of new tokens": "made_with.task.new_tokens",
}
LIBRARIES = ("lm_eval", "loramoe_train", "transformers")
MEAN, LOSS = "mean", "eval loss"


@dataclass(frozen=True)
class Table:
    """Plain data: `columns` are headings, `rows` texts; `notes` stand below."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...]


def make_table(
    sweep: Sweep, found: Sequence[RunStatus], *, side: str = "tuned", over: str | None = None, mark: bool = False
) -> Table:
    """Scores in per cent, one row a run.

    Args:
        side: which number of a benchmark: tuned, base or difference.
        over: a varying key; runs that agree in all others make one row.
        mark: show scores that were made otherwise than most, with a star, instead of refusing them.

    Raises:
        ConfigError: an unknown `over`, or scores that cannot be compared.
    """
    varying = sweep.varying()
    if over is not None and over not in varying:
        raise ConfigError(f"over={over} is no key that varies in {sweep.root}{nearest(over, varying)}")
    names = tuple(dict.fromkeys(name for each in found for name in each.results.get("scores", {})))
    odd = _made_otherwise(sweep, found, names)
    if odd and not mark:
        raise ConfigError(f"{next(iter(odd.values()))}; mixed=mark shows the table all the same, with a star there")
    keys = tuple(key for key in varying if key != over)
    groups: dict[tuple[str, ...], list[RunStatus]] = {}
    for each in found:
        values = sweep.values(each.run)
        label = tuple(values.get(key, "") for key in keys)
        groups.setdefault(label if over else (str(each.run.number), *label), []).append(each)
    measures = (*names, *((MEAN,) if len(names) > 1 else ()), LOSS)
    rows = [
        (*label, *(_cell(members, measure, side, names, odd) for measure in measures))
        for label, members in groups.items()
    ]
    notes = [f"{sweep.label(e.run)} {e.state}{f': {e.why}' if e.why else ''}" for e in found if e.state != DONE]
    notes += [f"* {text}" for text in dict.fromkeys(odd.values())]
    head = keys if over else ("run", *keys)
    return Table((*head, *measures), tuple(rows), tuple(notes))


def _number(results: Mapping[str, Any], measure: str, side: str, names: Sequence[str]) -> float | None:
    """Scores in per cent, the loss in nats; None where the run has none."""
    if measure == LOSS:
        stages = (results.get("training") or {}).get("stages") or [{}]
        return stages[-1].get("eval_loss")
    if measure == MEAN:
        values = [_number(results, name, side, names) for name in names]
        return None if None in values else sum(values) / len(values)  # type: ignore[arg-type]
    value = results.get("scores", {}).get(measure, {}).get(side)
    return None if value is None else 100 * value


def _cell(
    members: Sequence[RunStatus], measure: str, side: str, names: Sequence[str], odd: Mapping[tuple[int, str], str]
) -> str:
    """One number, or mean ± deviation; a missing one says why it is missing."""
    numbers = [_number(each.results, measure, side, names) for each in members]
    have = [number for number in numbers if number is not None]
    digits = 4 if measure == LOSS else 1
    star = "*" if any((each.run.number, measure) in odd for each in members) else ""
    if not have:
        states = {each.state for each in members if each.state != DONE}
        return "/".join(sorted(states)) if states else "-"
    text = f"{sum(have) / len(have):.{digits}f}"
    if len(members) > 1:
        spread = deviation(have)
        text += "" if spread is None else f" ± {spread:.{digits}f}"
        text += f" ({len(have)} of {len(members)})" if len(have) < len(members) else ""
    return text + star


def deviation(values: Sequence[float]) -> float | None:
    """n - 1; None for fewer than two values."""
    return stdev(values) if len(values) > 1 else None


def _made_otherwise(sweep: Sweep, found: Sequence[RunStatus], names: Iterable[str]) -> dict[tuple[int, str], str]:
    """(run number, benchmark) -> what is other there than in most runs."""
    results = {sweep.label(each.run): each.results for each in found}
    numbers = {sweep.label(each.run): each.run.number for each in found}
    odd = ((name, scored_otherwise(results, name)) for name in names)
    return {(numbers[label], name): text for name, texts in odd for label, text in texts.items()}


def scored_otherwise(results: Mapping[str, Mapping[str, Any]], name: str) -> dict[str, str]:
    """Label of a run -> what is other there, in the making of a benchmark's score, than in most of these results."""
    made = {}
    for label, content in results.items():
        entry, versions = content.get("scores", {}).get(name), content.get("versions") or {}
        if entry is not None:
            libraries = {f"version of {key}": versions.get(key) for key in LIBRARIES}
            decided = {key: value_at(entry, place) for key, place in DECIDED_BY.items()}
            made[label] = {**{key: entry.get(key) for key in MADE_WITH}, **decided, **libraries}
    return told_apart(made, name)


def told_apart(made: Mapping[str, Mapping[str, Any]], name: str) -> dict[str, str]:
    """Label of a run -> in which key what its number of `name` was made with differs from that of most."""
    rows = list(made.values())
    usual: Mapping[str, Any] = max(rows, key=rows.count, default={})
    first = next((label for label, row in made.items() if row == usual), "")
    odd = {}
    for label, row in made.items():
        key = next((key for key in row if row[key] != usual[key]), None)
        if key is not None:
            odd[label] = (
                f"{name} cannot be compared: {key} is {shown(row[key])} in {label} and {shown(usual[key])} in {first}"
            )
    return odd


def as_markdown(table: Table) -> str:
    """A pipe table, and the notes below it."""

    def line(cells: Sequence[str]) -> str:
        return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"

    parts = [line(table.columns), line(["---"] * len(table.columns)), *map(line, table.rows)]
    return "\n".join([*parts, *(["", *table.notes] if table.notes else [])])


def as_csv(sweep: Sweep, found: Sequence[RunStatus]) -> str:
    """Every run and every number as it is stored, for other programs; an empty cell is a number that is not there.

    Where scores were made otherwise than most, a last column says so.
    """
    names = list(dict.fromkeys(name for each in found for name in each.results.get("scores", {})))
    odd = _made_otherwise(sweep, found, names)
    last = ["made otherwise"] if odd else []
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    varying = sweep.varying()
    writer.writerow(["run", *varying, "state", *(f"{name} {side}" for name in names for side in SIDES), LOSS, *last])
    for each in found:
        values, scores = sweep.values(each.run), each.results.get("scores", {})
        cells = [scores.get(name, {}).get(side) for name in names for side in SIDES]
        loss = _number(each.results, LOSS, "tuned", names)
        why = ["; ".join(text for (number, _), text in odd.items() if number == each.run.number)] if odd else []
        writer.writerow([each.run.number, *(values.get(key) for key in varying), each.state, *cells, loss, *why])
    return out.getvalue().rstrip("\n")
