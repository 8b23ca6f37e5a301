"""`loramoe-compare RUN_A RUN_B`: two evaluations document by document, or with one run its base and its tuned model.

Only what was asked alike is compared: the same documents with the same prompts, settings and definitions.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from loramoe_train.errors import ConfigError, DataError, MissingFileError, nearest
from loramoe_train.evaluation.results import p_cell, read_results
from loramoe_train.evaluation.significance import CONFIDENCE, holm, paired
from loramoe_train.evaluation.statistics import RESAMPLES
from loramoe_train.evaluation.types import Side
from loramoe_train.evaluation.units import SAMPLES, Unit, read_unit

FORMATS, METRICS = ("text", "markdown", "json"), ("headline", "all")
LEVEL = 0.05
HEADINGS = ("benchmark", "metric", "n", "shots", "A", "B", "difference", "95% interval", "differ", "p", "p (Holm)")


@dataclass(frozen=True)
class Row:
    """One metric of one benchmark. Scores as fractions; None where a metric has no paired test."""

    benchmark: str
    metric: str
    n: int  # documents
    num_fewshot: int
    first: float
    second: float
    difference: float
    low: float | None
    high: float | None
    p_value: float | None
    p_holm: float | None  # corrected for the number of rows
    differing: tuple[int, ...]  # ids of the documents that the two score differently

    @property
    def verdict(self) -> str:
        if self.p_holm is None:
            return "not tested"
        if self.p_holm >= LEVEL:
            return "within noise"
        return "B is better" if self.difference > 0 else "A is better"


@dataclass(frozen=True)
class Scored:
    """One side of an evaluation, as a folder holds it."""

    folder: Path
    side: Side
    units: Mapping[str, Unit]

    @property
    def label(self) -> str:
        return f"{self.folder} ({self.side})"


@dataclass(frozen=True)
class Comparison:
    first: Scored
    second: Scored
    rows: tuple[Row, ...]
    notes: tuple[str, ...]


def compare_runs(first: Path, second: Path | None = None, *, metrics: str = "headline") -> Comparison:
    """Compare two folders with results, or with one its base and its tuned side.

    Raises:
        ConfigError: the same folder twice, no benchmark in common, or benchmarks that were asked differently.
        MissingFileError: a folder without results, or without the records of its documents.
        DataError: a damaged file.
    """
    if second is not None and first.exists() and second.exists() and first.samefile(second):
        raise ConfigError(f"{first} and {second} are the same run; give one of them to compare its base with its tuned")
    a = _read(first, "base" if second is None else None)
    b = _read(first if second is None else second, "tuned" if second is None else None)
    common = [name for name in a.units if name in b.units]
    if not common:
        raise ConfigError(
            f"{a.label} and {b.label} have no benchmark in common: {', '.join(a.units)}; {', '.join(b.units)}"
        )
    for name in common:
        _check_alike(name, a, b)
    rows = [row for name in common for row in _rows(name, a.units[name], b.units[name], metrics)]
    tested = [row.p_value for row in rows if row.p_value is not None]
    corrected = iter(holm(tested))
    rows = [row if row.p_value is None else Row(**{**vars(row), "p_holm": next(corrected)}) for row in rows]
    return Comparison(a, b, tuple(rows), tuple(_notes(a, b, common)))


def _read(folder: Path, side: Side | None) -> Scored:
    """The wished side; without a wish the tuned one, or the base where nothing was tuned."""
    if not folder.is_dir():
        siblings = [entry.name for entry in folder.parent.iterdir() if entry.is_dir()] if folder.parent.is_dir() else []
        hint = nearest(folder.name, siblings).split("; known")[0]
        raise MissingFileError(f"loramoe-compare: there is no folder {folder}{hint}")
    scores = read_results(folder)["scores"]
    if side is None:
        side = "tuned" if any(_number(score.get("tuned")) for score in scores.values()) else "base"
    names = [name for name, score in scores.items() if _number(score.get(side))]
    if not names:
        raise ConfigError(f"{folder} has no {side} scores; score them with: loramoe-eval {folder} eval.base=true")
    units = {}
    for name in names:
        try:
            units[name] = read_unit(folder / SAMPLES, name, side)
        except MissingFileError as error:
            raise MissingFileError(
                f"{folder} holds a score of {name}, but not its documents ({SAMPLES}/{name}.{side}.json);"
                " an older version wrote it, or they were removed: evaluate again"
            ) from error
        if units[name].result.score != scores[name][side]:
            raise DataError(
                f"{folder}: {name} scores {units[name].result.score} in {SAMPLES}/{name}.{side}.json, and"
                f" {scores[name][side]} in results.json; an evaluation was interrupted since, start it again"
            )
    return Scored(folder, side, units)


def _check_alike(name: str, a: Scored, b: Scored) -> None:
    """ConfigError, naming what differs, unless both were asked the same."""
    one, two = a.units[name], b.units[name]
    asked = [{**unit.facts["task"], **_asked(unit)} for unit in (one, two)]
    for key in sorted(asked[0].keys() | asked[1].keys()):
        before, after = (facts.get(key) for facts in asked)
        if key != "data" and before != after:  # the documents themselves tell more than their files
            raise ConfigError(
                f"{name} cannot be compared: {key} is {before} in {a.label} and {after} in {b.label}; score one of them"
                " again as the other was"
            )
    for before, after in zip(one.result.samples, two.result.samples, strict=True):
        if (before["doc_id"], before["hash"]) != (after["doc_id"], after["hash"]):
            raise ConfigError(
                f"{name} cannot be compared: document {before['doc_id']} of {a.label} is another one, or was asked"
                f" with another prompt, in {b.label}; score both on the same data"
            )


def _asked(unit: Unit) -> dict[str, Any]:
    result = unit.result
    return {
        "documents": result.n,
        "metric": result.metric,
        "version": result.version,
        "fewshot_seed": result.fewshot_seed,
        "lm_eval version": unit.facts["versions"].get("lm_eval"),
    }


def _rows(name: str, one: Unit, two: Unit, metrics: str) -> Iterator[Row]:
    shared = [key for key in one.result.metrics if key in two.result.metrics]
    for key in shared if metrics == "all" else [one.result.metric]:
        before, after = ([sample["metrics"].get(key) for sample in unit.result.samples] for unit in (one, two))
        first, second = one.result.metrics[key], two.result.metrics[key]
        test = None if None in before + after else paired(before, after, key.split(",")[0])
        if test is not None and max(abs(test.first - first), abs(test.second - second)) > 1e-9:
            test = None  # no mean over documents, and no metric with a rule of its own
        yield Row(
            benchmark=name,
            metric=key,
            n=one.result.n,
            num_fewshot=one.result.num_fewshot,
            first=first,
            second=second,
            difference=second - first,
            low=test.low if test else None,
            high=test.high if test else None,
            p_value=test.p_value if test else None,
            p_holm=None,
            differing=tuple(
                sample["doc_id"] for sample, x, y in zip(one.result.samples, before, after, strict=True) if x != y
            ),
        )


def _notes(a: Scored, b: Scored, common: Sequence[str]) -> Iterator[str]:
    for scored in (a, b):
        alone = [name for name in scored.units if name not in common]
        if alone:
            yield f"only in {scored.label}: {', '.join(alone)}"
    seen = set()
    for name in common:
        one, two = ({**unit.facts["versions"], "commit": unit.commit} for unit in (a.units[name], b.units[name]))
        for key in one.keys() | two.keys():
            if one.get(key) != two.get(key):
                seen.add(f"{key} is {one.get(key)} in A and {two.get(key)} in B")
    yield from sorted(seen)


def _number(value: Any) -> bool:
    return isinstance(value, int | float)


# -- how it reads ------------------------------------------------------------------------------------------------------


def explained(comparison: Comparison) -> list[str]:
    """What the columns mean, and what to keep in mind."""
    count = sum(row.p_value is not None for row in comparison.rows)
    return [
        f"A is {comparison.first.label}, B is {comparison.second.label}; scores in per cent, difference B - A.",
        "p: two-sided, the two exchanged at random within documents; exact McNemar where scores are 0 or 1.",
        f"Holm: corrected for the {count} rows tested; within noise: p (Holm) is not below {LEVEL}.",
        f"Interval: {CONFIDENCE:.0%}, paired bootstrap over documents, {RESAMPLES:,} resamples, seed 0.",
        *(f"note: {note}" for note in comparison.notes),
    ]


def cells(row: Row) -> list[str]:
    """A row as text, as HEADINGS name it, and the verdict."""
    interval = "-" if row.low is None or row.high is None else f"{100 * row.low:+.1f} to {100 * row.high:+.1f}"
    numbers = [f"{100 * row.first:.1f}", f"{100 * row.second:.1f}", f"{100 * row.difference:+.1f}", interval]
    counts = [str(row.n), str(row.num_fewshot)]
    tests = [str(len(row.differing)), p_cell(row.p_value), p_cell(row.p_holm)]
    return [row.benchmark, row.metric.removesuffix(",none"), *counts, *numbers, *tests, row.verdict]


def as_markdown(comparison: Comparison) -> str:
    headings = [*HEADINGS, ""]
    lines = [" | ".join(headings), " | ".join("---" for _ in headings)]
    lines += [" | ".join(cells(row)) for row in comparison.rows]
    return "\n".join([*(f"| {line} |" for line in lines), "", *(f"- {line}" for line in explained(comparison))])


def as_json(comparison: Comparison) -> str:
    sides = {"a": comparison.first, "b": comparison.second}
    content = {
        **{key: {"folder": str(scored.folder), "side": scored.side} for key, scored in sides.items()},
        "rows": [{**asdict(row), "verdict": row.verdict} for row in comparison.rows],
        "made_with": {
            key: {name: unit.facts | {"commit": unit.commit} for name, unit in scored.units.items()}
            for key, scored in sides.items()
        },
        "notes": list(comparison.notes),
    }
    return json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False)


def show(arguments: Sequence[str]) -> None:
    """The command: print a comparison. Raises ConfigError for arguments that it does not know."""
    places = [Path(text) for text in arguments if "=" not in text]
    settings = dict(text.split("=", 1) for text in arguments if "=" in text)
    known = {"format": FORMATS, "metrics": METRICS}
    for key, value in settings.items():
        if key not in known:
            raise ConfigError(f"unknown key {key}{nearest(key, known)}")
        if value not in known[key]:
            raise ConfigError(f"{key}={value}: must be one of {', '.join(known[key])}")
    if len(places) not in (1, 2):
        raise ConfigError(f"loramoe-compare wants one folder or two, got {len(places)}: RUN_A [RUN_B] [KEY=VALUE ...]")
    comparison = compare_runs(*places, metrics=settings.get("metrics", "headline"))
    wished = settings.get("format", "text")
    if wished == "text":
        _print_table(comparison)
    else:
        print({"markdown": as_markdown, "json": as_json}[wished](comparison))


def _print_table(comparison: Comparison) -> None:
    from rich.table import Table

    from loramoe_train.screen import screen

    console, table = screen(), Table(title="A and B on the same documents, per cent", title_justify="left")
    for index, heading in enumerate((*HEADINGS, "")):
        text = index < 2
        table.add_column(heading, justify="left" if text or not heading else "right", no_wrap=not text)
    for row in comparison.rows:
        table.add_row(*cells(row))
    console.print(table)
    for line in explained(comparison):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
