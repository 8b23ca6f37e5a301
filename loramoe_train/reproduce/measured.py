"""What a run has measured for a column, and whether it was made as in most of the table's runs."""

from collections.abc import Sequence

from loramoe_train.errors import DataError, shown
from loramoe_train.reproduce.folder import Found
from loramoe_train.reproduce.schema import Load, Place, Scale
from loramoe_train.sweeps.table import LIBRARIES, scored_otherwise, told_apart


def score(run: Found, place: Place, side: str) -> float | None:
    """In per cent; None where the run has none."""
    if place.load is not None:
        found = None if side == "base" else load_of(run, place.load)
        return found if isinstance(found, float) else None
    value = run.status.results.get("scores", {}).get(place.benchmark, {}).get(side)
    return 100 * value if isinstance(value, int | float) and not isinstance(value, bool) else None


def load_of(run: Found, load: Load) -> float | str:
    """In per cent, or why the run has none."""
    if not run.done:
        return run.status.state
    try:
        return run.load(load.task, load.take)
    except DataError as error:
        return str(error)


def other_data(found: Sequence[Found]) -> dict[tuple[str, str], str]:
    """(run id, "") -> how the run was trained on other data than most runs of its data set."""
    odd: dict[tuple[str, str], str] = {}
    groups: dict[tuple[str, str], list[Found]] = {}
    for run in found:
        if run.done:
            groups.setdefault((run.base, run.train), []).append(run)
    for members in groups.values():
        data = [run.training_data() for run in members]
        usual = data.index(max(data, key=data.count))
        for run, own in zip(members, data, strict=True):
            keys = [key for key in sorted(own.keys() | data[usual].keys()) if own.get(key) != data[usual].get(key)]
            if keys:
                values = f"{shown(own.get(keys[0]))}, there {shown(data[usual].get(keys[0]))}"
                odd[run.id, ""] = f"{run.id} was trained on other data than {members[usual].id}: {keys[0]} is {values}"
    return odd


def other_scoring(scale: Scale, found: Sequence[Found]) -> dict[tuple[str, str], str]:
    """(run id, what is measured) -> what is other there than in most runs, over methods and seeds of all bases."""
    results = {run.id: run.status.results for run in found}
    odd = {}
    for name, place in {place.name: place for place in scale.columns.values()}.items():
        if place.load is None:
            texts = scored_otherwise(results, name)
        else:  # what it was measured on is a part of the training data, which is looked at beside
            measured = [run for run in found if score(run, place, "tuned") is not None]
            versions = {run.id: run.status.results.get("versions") or {} for run in measured}
            libraries = [key for key in LIBRARIES if key != "lm_eval"]
            made = {run: {f"version of {key}": own.get(key) for key in libraries} for run, own in versions.items()}
            texts = told_apart(made, name)
        odd.update({(run, name): text for run, text in texts.items()})
    return odd
