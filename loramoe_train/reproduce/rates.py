"""Which learning rate of a sweep of them is reported: the best by validation loss, which no benchmark has a say in."""

import math
from collections.abc import Sequence

from loramoe_train.errors import ConfigError
from loramoe_train.reproduce.folder import Found
from loramoe_train.sweeps.status import FAILED

DIVERGED = "diverged.json"  # what training leaves beside its log then


def best_variants(found: Sequence[Found]) -> tuple[list[Found], list[str]]:
    """Of runs that differ in the variant, those of the one with the lowest validation loss, on average over seeds.

    Returns them with all runs that have no variants, and a line for every choice.
    Raises ConfigError for a method of which some runs have a variant and others none.
    """
    groups: dict[tuple[str, str, str], dict[str, list[Found]]] = {}
    for run in found:
        groups.setdefault((run.base, run.method, run.train), {}).setdefault(run.variant, []).append(run)
    best, notes = [], []
    for (base, method, train), variants in groups.items():
        if set(variants) == {""}:
            best += variants[""]
            continue
        if "" in variants:
            raise ConfigError(
                f"{variants[''][0].id} was run without a sweep of rates, others of {method} with one; the best of"
                " them would mean nothing: give each a run_dir of its own"
            )
        seeds = max((frozenset(run.seed for run in runs) for runs in variants.values()), key=len)
        losses = {}
        for name, runs in variants.items():
            values = [loss for run in runs if (loss := _validation_loss(run)) is not None]
            if len(values) == len(runs) and {run.seed for run in runs} == seeds:
                losses[name] = sum(values) / len(values)
        if len(losses) < len(variants):  # a part of the grid would be another, easier choice for this method
            waiting = [run for runs in variants.values() for run in runs if _validation_loss(run) is None]
            why = f"{waiting[0].id} {waiting[0].status.state}" if waiting else "not every rate has every seed"
            notes.append(f"{method} on {base} ({train}): no rate is chosen yet, {why}")
            best += [run for run in waiting if not run.done][:1]
            continue
        name = min(losses, key=lambda key: losses[key])
        rates = sorted(losses, key=lambda key: float(key.removeprefix("lr-")))
        if losses[name] == math.inf:
            notes.append(f"{method} on {base} ({train}): training diverged at every rate")
            best += variants[name]
            continue
        said = f"{name} of {len(losses)} has the lowest validation loss ({losses[name]:.4f})"
        if name in (rates[0], rates[-1]):
            said += "; it is at the end of the grid, where a better one may lie beyond"
        notes.append(f"{method} on {base} ({train}): {said}")
        best += variants[name]
    return best, notes


def _validation_loss(run: Found) -> float | None:
    """At the end of training; infinite where it diverged, for that is the worst of rates and no gap in the grid."""
    if run.status.state == FAILED and (run.path / DIVERGED).is_file():
        return math.inf
    stages = (run.status.results.get("training") or {}).get("stages") or [{}]
    value = stages[-1].get("eval_loss")
    return float(value) if isinstance(value, int | float) else None
