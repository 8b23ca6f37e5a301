"""What has been measured for every cell of a table, beside what the paper prints. Reads results.json files, and logs
for routers' loads; no torch.

A cell is never filled from the paper: its number is ours or there is none.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from loramoe_train.errors import ConfigError
from loramoe_train.reproduce.changed import told
from loramoe_train.reproduce.folder import Found
from loramoe_train.reproduce.measured import load_of, other_data, other_scoring, score
from loramoe_train.reproduce.rates import best_variants
from loramoe_train.reproduce.runs import chosen, scale_of
from loramoe_train.reproduce.schema import Number, PaperTable, Scale
from loramoe_train.sweeps.table import deviation

MEASURED, NOT_RUN, NOT_COMPARABLE = "measured here", "not run", "not comparable"
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Cell:
    """Scores in per cent."""

    base: str
    method: str
    column: str
    status: str
    why: str = ""
    scores: Mapping[int, float] = field(default_factory=dict)  # by seed
    runs: tuple[Found, ...] = ()  # whose scores these are
    paper: Number | None = None
    mark: str = ""
    source: str = ""
    odd: str = ""  # how some of these scores were made otherwise than most of the column

    @property
    def mean(self) -> float | None:
        return sum(self.scores.values()) / len(self.scores) if self.scores else None

    @property
    def deviation(self) -> float | None:
        """Over seeds, n - 1; None for fewer than two."""
        return deviation(list(self.scores.values()))

    @property
    def interval(self) -> tuple[float, float] | None:
        """95 per cent, of the mean over seeds (Student's t)."""
        return interval(list(self.scores.values()))

    @property
    def difference(self) -> float | None:
        """Ours less the paper's, where the two can be set against each other."""
        if self.status != MEASURED or self.mean is None or self.paper is None or self.paper.value is None:
            return None
        return self.mean - self.paper.value

    @property
    def within_noise(self) -> bool | None:
        """Whether the paper's number lies in our interval; None where nothing can be said."""
        if self.difference is None or self.interval is None or self.paper is None or self.paper.value is None:
            return None
        return self.interval[0] <= self.paper.value <= self.interval[1]


@dataclass(frozen=True)
class Outcome:
    """Cells by base, in the order of the table's rows and columns."""

    table: PaperTable
    scale: str
    columns: tuple[str, ...]
    cells: Mapping[str, Mapping[str, tuple[Cell, ...]]]  # base -> method -> cells
    notes: tuple[str, ...] = ()

    @property
    def settings(self) -> Scale:
        return scale_of(self.table, self.scale)

    def all(self) -> Iterable[Cell]:
        for rows in self.cells.values():
            for cells in rows.values():
                yield from cells


def interval(values: Sequence[float]) -> tuple[float, float] | None:
    """95 per cent interval of the mean (Student's t); None for fewer than two values."""
    spread = deviation(values)
    if spread is None:
        return None
    from scipy.stats import t

    half = float(t.ppf((1 + CONFIDENCE) / 2, len(values) - 1)) * spread / math.sqrt(len(values))
    mean = sum(values) / len(values)
    return mean - half, mean + half


def outcome(
    table: PaperTable,
    scale_name: str,
    found: Sequence[Found],
    *,
    methods: Sequence[str] | None = None,
    bases: Sequence[str] | None = None,
    seeds: Sequence[int] | None = None,
    mark: bool = False,
) -> Outcome:
    """Put runs into cells; of tuned models those of `seeds`, if given.

    Raises ConfigError where scores of a column were made otherwise than others, or runs trained on other data, unless
    `mark`: then these cells get a star.
    """
    scale = scale_of(table, scale_name)
    best, notes = best_variants([run for run in found if seeds is None or run.seed in seeds])
    # the untuned base has no seed and no learning rate: whichever run scored it serves
    places = scale.columns.values()
    with_base = [run for run in found if any(score(run, place, "base") is not None for place in places)]
    every = [*best, *(run for run in with_base if run not in best)]
    sources = {method: every if row.base else best for method, row in table.methods.items()}
    odd = {**other_data(best), **other_scoring(scale, every)}
    if odd and not mark:
        raise ConfigError(f"{next(iter(odd.values()))}; mixed=mark shows the table all the same, with a star there")
    cells = {
        base: {
            method: tuple(
                told(_cell(table, scale, sources[method], odd, base, method, column), table, scale_name)
                for column in table.columns
            )
            for method in chosen("methods", methods, table.methods)
        }
        for base in chosen("bases", bases, scale.bases)
    }
    stars = tuple(f"* {text}" for text in dict.fromkeys(odd.values()))
    return Outcome(table, scale_name, tuple(table.columns), cells, (*notes, *stars))


def _cell(
    table: PaperTable,
    scale: Scale,
    found: Sequence[Found],
    odd: Mapping[tuple[str, str], str],
    base: str,
    method: str,
    column: str,
) -> Cell:
    printed = table.number(scale.bases[base].beside or base, method, column)
    said = {"paper": printed[0], "mark": printed[1].mark, "source": printed[1].source} if printed else {}
    row, about = table.methods[method], table.columns[column]
    part_only = None
    if about.mean_of:
        here = [name for name in about.mean_of if name in scale.columns]
        if len(here) < len(about.mean_of):
            part_only = f"the mean of the {len(here)} columns that this scale has"
        parts = [_cell(table, scale, found, odd, base, method, name) for name in here]
        scores, runs, stars = _mean_of(parts)
        lacking = [part for part in parts if not part.scores]
        why = lacking[0].why if lacking else "no seed has all its columns"
    else:
        place = scale.columns.get(column)
        members = [
            run
            for run in found
            if place and run.base == base and run.train == place.train and (row.base or run.method == method)
        ]
        side = "base" if row.base else "tuned"
        scored = {run.seed: (run, own) for run in members if place and (own := score(run, place, side)) is not None}
        if row.base and len({own for _, own in scored.values()}) == 1:  # scored once or more, it is one number
            scored = dict(list(scored.items())[:1])
        scores = {seed: own for seed, (_, own) in sorted(scored.items())}
        runs = tuple(run for run, _ in scored.values())
        about_run = [(run.id, name) for run in runs for name in ("", place.name if place else "")]
        stars = [odd[key] for key in about_run if key in odd]
        why = "" if scores else _why_not(table, scale, base, method, column, members)
    if not scores:
        return Cell(base, method, column, NOT_RUN, why, **said)
    columns = (about, *(table.columns[name] for name in about.mean_of))
    first = scale.not_comparable or next((each.not_comparable for each in columns if each.not_comparable), None)
    reason = "; ".join(filter(None, (first, part_only)))
    status = NOT_COMPARABLE if reason else MEASURED
    return Cell(base, method, column, status, reason, scores, runs, odd="; ".join(dict.fromkeys(stars)), **said)


def _mean_of(parts: Sequence[Cell]) -> tuple[dict[int, float], tuple[Found, ...], list[str]]:
    """By seed, of the seeds that every column has: a mean over a part would mislead."""
    seeds = set.intersection(*(set(part.scores) for part in parts)) if parts else set()
    scores = {seed: sum(part.scores[seed] for part in parts) / len(parts) for seed in sorted(seeds)}
    runs = {run.id: run for part in parts for run in part.runs if run.seed in seeds}
    return scores, tuple(runs.values()), [part.odd for part in parts if part.odd]


def _why_not(table: PaperTable, scale: Scale, base: str, method: str, column: str, members: Sequence[Found]) -> str:
    row, place = table.methods[method], scale.columns.get(column)
    if row.absent:
        return row.absent
    if method in scale.bases[base].without:
        return scale.bases[base].without[method]
    if place is None:
        return table.columns[column].absent or "nothing measures it at this scale"
    if place.load is not None and row.base:
        return "the untuned base has no routers"
    for run in members:
        if not run.done:
            return f"{run.id} {run.status.state}{f': {run.status.why}' if run.status.why else ''}"
        if place.load is not None:
            return f"{run.id}: {load_of(run, place.load)}"
        skipped = run.status.results.get("skipped") or {}
        if place.benchmark in skipped or "all" in skipped:
            return f"{run.id} skipped it: {skipped.get(place.benchmark, skipped.get('all'))}"
    return "its results lack this benchmark" if members else "no run was started"
