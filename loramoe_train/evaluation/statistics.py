"""Standard errors from the documents' own values; no resampling of documents in child processes, no output."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

RESAMPLES = 10_000


def standard_error(values: Sequence[Any], metric: str) -> float | None:
    """Of a benchmark metric over documents; None for fewer than two documents or a metric without a rule.

    Numbers: sample deviation / sqrt(n), as in lm-eval. (gold, prediction) pairs of two classes, `mcc` and `f1`: the
    deviation of 10,000 bootstrap resamples, drawn as counts of the four kinds of pairs, which is the same thing.
    """
    if len(values) < 2:
        return None
    if not isinstance(values[0], list | tuple):
        return float(np.std(np.asarray(values, dtype=float), ddof=1) / math.sqrt(len(values)))
    pairs = as_classes(values, metric)
    if pairs is None:
        return None
    counts = np.bincount(2 * pairs[:, 0] + pairs[:, 1], minlength=4)
    drawn = np.random.default_rng(0).multinomial(len(pairs), counts / len(pairs), size=RESAMPLES)
    right_no, false_yes, missed_yes, right_yes = drawn.T.astype(float)
    return float(np.std(SCORES[metric](right_no, false_yes, missed_yes, right_yes), ddof=1))


def as_classes(values: Sequence[Any], metric: str) -> np.ndarray | None:
    """(gold, prediction) pairs of two classes as (n, 2) integers; None for another metric, or more classes."""
    pairs = np.asarray(values) if metric in SCORES else np.empty(0)
    return pairs.astype(int) if pairs.ndim == 2 and np.isin(pairs, (0, 1)).all() else None


def _mcc(right_no: np.ndarray, false_yes: np.ndarray, missed_yes: np.ndarray, right_yes: np.ndarray) -> np.ndarray:
    spread = (right_yes + false_yes) * (right_yes + missed_yes) * (right_no + false_yes) * (right_no + missed_yes)
    return _ratio(right_yes * right_no - false_yes * missed_yes, np.sqrt(spread))


def _f1(right_no: np.ndarray, false_yes: np.ndarray, missed_yes: np.ndarray, right_yes: np.ndarray) -> np.ndarray:
    return _ratio(2 * right_yes, 2 * right_yes + false_yes + missed_yes)


def _ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """0 where the denominator is 0, as scikit-learn scores a constant prediction."""
    return np.divide(above, below, out=np.zeros_like(above), where=below > 0)


# of counts: gold no and predicted no, gold no predicted yes, gold yes predicted no, both yes
SCORES = {"mcc": _mcc, "f1": _f1}
