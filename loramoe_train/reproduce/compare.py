"""Every method beside the table's reference: paired over documents and over seeds. Differences within noise say so."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from loramoe_train.errors import LoramoeError
from loramoe_train.evaluation.results import p_cell
from loramoe_train.evaluation.significance import Paired, holm, paired
from loramoe_train.evaluation.units import SAMPLES, read_unit
from loramoe_train.reproduce.changed import changes as told_beyond
from loramoe_train.reproduce.folder import Found
from loramoe_train.reproduce.outcome import Cell, Outcome, interval

LEVEL = 0.05


@dataclass(frozen=True)
class Compared:
    """A method less the reference, in points, over the seeds that both have."""

    base: str
    method: str
    column: str
    difference: float
    seeds: int
    interval: tuple[float, float] | None  # over seeds; None for fewer than two
    p_value: float | None  # paired over documents, their scores averaged over seeds; None where that cannot be done
    p_holm: float | None  # corrected for all rows of the base
    why: str  # where there is no p_value
    words: tuple[str, str] = ("better", "worse")  # for more and for less
    unequal: str = ""  # how the two were not made alike, which no test makes good

    @property
    def verdict(self) -> str:
        """A difference is more than noise where documents and seeds both say so."""
        if self.unequal:
            return f"not comparable: {self.unequal}"
        if self.p_holm is None and self.interval is None:
            return "not tested: one seed and no documents' scores"
        documents = self.p_holm is None or self.p_holm < LEVEL
        seeds = self.interval is None or not self.interval[0] <= 0 <= self.interval[1]
        if not (documents and seeds):
            return "within noise"
        return self.words[0] if self.difference > 0 else self.words[1]

    def line(self, outcome: Outcome) -> str:
        table = outcome.table
        reference = table.methods[str(table.reference)].title
        count = f"{self.seeds} seed{'s' * (self.seeds > 1)}"
        spread = (
            "" if self.interval is None else f", 95 % over seeds {self.interval[0]:+.1f} to {self.interval[1]:+.1f}"
        )
        test = (
            f", p {p_cell(self.p_value)}, Holm {p_cell(self.p_holm)}" if self.p_value is not None else f", {self.why}"
        )
        return (
            f"{table.methods[self.method].title} less {reference}, {table.columns[self.column].title}:"
            f" {self.difference:+.1f} ({count}{spread}{test}): {self.verdict}"
        )


def compare(outcome: Outcome, base: str) -> list[Compared]:
    """All measured rows beside the reference on one base; means of columns and loads are tested over seeds alone."""
    reference = outcome.cells[base].get(str(outcome.table.reference))
    if reference is None:
        return []
    found = []
    for method, cells in outcome.cells[base].items():
        for own, other in zip(cells, reference, strict=True):
            seeds = sorted(own.scores.keys() & other.scores.keys())
            if method == outcome.table.reference or not seeds or outcome.table.methods[method].base:
                continue
            changes = [own.scores[seed] - other.scores[seed] for seed in seeds]
            test, why = _over_documents(outcome, own, other, seeds)
            words = ("larger", "smaller") if _is_load(outcome, own.column) else ("better", "worse")
            p_value = test.p_value if test else None
            mean, spread, unequal = sum(changes) / len(changes), interval(changes), _unequal(outcome, own, other)
            row = Compared(base, method, own.column, mean, len(seeds), spread, p_value, None, why, words, unequal)
            found.append(row)
    corrected = iter(holm([row.p_value for row in found if row.p_value is not None]))
    return [row if row.p_value is None else Compared(**{**vars(row), "p_holm": next(corrected)}) for row in found]


def _is_load(outcome: Outcome, column: str) -> bool:
    """Whether a column, or any that it is the mean of, is a load: which is neither good nor bad."""
    names = (column, *outcome.table.columns[column].mean_of)
    return any(place is not None and place.load is not None for place in map(outcome.settings.columns.get, names))


def _unequal(outcome: Outcome, own: Cell, other: Cell) -> str:
    """Scores or data that only `mixed=mark` lets stand, or keys of the command line that one of the two had alone."""
    if own.odd or other.odd:
        return "see *"
    given = [
        {text for run in cell.runs for text in told_beyond(outcome.table, outcome.scale, run)} for cell in (own, other)
    ]
    alone = sorted(text for text in given[0] ^ given[1] if not text.startswith("experts."))
    return f"{alone[0]} was given to one of the two alone" if alone else ""


def _over_documents(outcome: Outcome, own: Cell, other: Cell, seeds: list[int]) -> tuple[Paired | None, str]:
    place = outcome.settings.columns.get(own.column)
    if place is None:
        return None, "a mean of columns: tested over seeds alone"
    if place.benchmark is None:
        return None, "a load, which no document has: tested over seeds alone"
    try:
        first, second = (_documents(cell, place.benchmark, seeds) for cell in (other, own))
    except LoramoeError as error:
        return None, f"documents cannot be paired: {error}"
    if first.keys() != second.keys():
        return None, "documents cannot be paired: they are not the same"
    if any(isinstance(value, list | tuple) for value in first.values()):
        return None, "a metric of all documents together: tested over seeds alone"
    return paired(list(first.values()), [second[key] for key in first], ""), ""


def _documents(cell: Cell, benchmark: str, seeds: list[int]) -> Mapping[Any, Any]:
    """(document's number, its hash) -> its score, the mean over seeds."""
    values: dict[Any, list[Any]] = {}
    runs: dict[int, Found] = {run.seed: run for run in cell.runs}
    for seed in seeds:
        result = read_unit(runs[seed].path / SAMPLES, benchmark, "tuned").result
        for sample in result.samples:
            values.setdefault((sample["doc_id"], sample["hash"]), []).append(sample["metrics"][result.metric])
    whole = {key: own for key, own in values.items() if len(own) == len(seeds)}
    return {
        key: own[0] if isinstance(own[0], list | tuple) else sum(own) / len(own) for key, own in sorted(whole.items())
    }
