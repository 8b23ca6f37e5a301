"""Is a difference between two models more than noise? Both answered the same documents, so everything here is paired.

The p-value asks how often a difference of at least this size, in either direction, comes about when the two models are
exchanged at random within every document. Where scores are 0 or 1 that is the exact McNemar test, for other means it is
the sign-flip test, and for `mcc` and `f1` all exchanges are counted too, so that no test draws random numbers but that
of many documents with scores between 0 and 1. The interval is a bootstrap over documents (percentiles).

Sources: McNemar 1947, Psychometrika 12; Fisher 1935, The Design of Experiments, section 21; Yeh 2000, arXiv cs/0008005.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from loramoe_train.evaluation.statistics import RESAMPLES, SCORES, as_classes

FLIPS = 1 << 15  # sign flips: all of them for up to 15 documents that differ
CONFIDENCE = 0.95
SPREAD = 9.0  # standard deviations around the mean of a binomial outside of which nothing counts (below 1e-18)
CHUNK = 1 << 22  # numbers drawn at once


@dataclass(frozen=True)
class Paired:
    """How two models differ on the same documents. Scores as fractions."""

    first: float
    second: float
    low: float | None  # ends of the 95 per cent interval of the difference; None for fewer than two documents
    high: float | None
    p_value: float  # two-sided
    differing: int  # documents on which the two differ

    @property
    def difference(self) -> float:
        return self.second - self.first


def paired(first: Sequence[Any], second: Sequence[Any], metric: str) -> Paired | None:
    """Compare the documents' own values of a metric, in the same order.

    Args:
        first, second: numbers, whose mean is the score; or (gold, prediction) pairs of two classes for `mcc` and `f1`.

    Returns:
        None without documents, and for a metric of pairs without a rule.
    """
    if len(first) != len(second):
        raise ValueError(f"{len(first)} documents beside {len(second)}")
    if not len(first):
        return None
    if not isinstance(first[0], list | tuple):
        return _of_means(np.asarray(first, dtype=float), np.asarray(second, dtype=float))
    one, two = as_classes(first, metric), as_classes(second, metric)
    if one is None or two is None or (one[:, 0] != two[:, 0]).any():
        return None
    return _of_classes(one, two, metric)


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values corrected for their number, in the same order (Holm 1979): the chance of any false alarm stays."""
    order = np.argsort(p_values, kind="stable")
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def _of_means(first: np.ndarray, second: np.ndarray) -> Paired:
    changes = second - first
    differing = changes[changes != 0]
    binary = np.isin(first, (0.0, 1.0)).all() and np.isin(second, (0.0, 1.0)).all()
    p_value = mcnemar(int((differing > 0).sum()), int((differing < 0).sum())) if binary else sign_flips(differing)
    values, counts = np.unique(changes, return_counts=True)
    drawn = _resampled(counts, lambda counts_RK: counts_RK @ values / len(changes))
    return Paired(float(first.mean()), float(second.mean()), *_interval(drawn, len(changes)), p_value, len(differing))


def mcnemar(gained: int, lost: int) -> float:
    """Exact two-sided p-value; documents that only the second model has right, and only the first."""
    from scipy.stats import binomtest

    return float(binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0


def sign_flips(changes: np.ndarray) -> float:
    """Two-sided p-value of the sum of the documents' differences when each may as well have the other sign."""
    from scipy.stats import permutation_test

    if len(changes) < 2:  # either sign is as far from 0 as the other; scipy refuses to be asked
        return 1.0
    found = permutation_test(
        (changes,),
        lambda values, axis: np.sum(values, axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=FLIPS,
        batch=max(1, CHUNK // (2 * len(changes))),
        rng=np.random.default_rng(0),
    )
    return min(1.0, float(found.pvalue))


def _of_classes(first: np.ndarray, second: np.ndarray, metric: str) -> Paired:
    """Documents are counted by gold class G, and the predictions A and B of the two models: (G, A, B) as 0 or 1."""
    score = SCORES[metric]

    def scores(counts_R8: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        counts_RGAB = counts_R8.reshape(-1, 2, 2, 2).astype(float)
        tables = counts_RGAB.sum(axis=3), counts_RGAB.sum(axis=2)  # of A, of B: (R, gold, prediction)
        one, two = (score(t[:, 0, 0], t[:, 0, 1], t[:, 1, 0], t[:, 1, 1]) for t in tables)
        return one, two

    counts_8 = np.bincount(4 * first[:, 0] + 2 * first[:, 1] + second[:, 1], minlength=8)
    (one,), (two,) = scores(counts_8)
    drawn = _resampled(counts_8, lambda counts: np.subtract(*reversed(scores(counts))))
    p_value = _exchanges(counts_8.reshape(2, 2, 2), scores, abs(two - one))
    differing = int((first[:, 1] != second[:, 1]).sum())
    return Paired(float(one), float(two), *_interval(drawn, len(first)), p_value, differing)


def _exchanges(counts_GAB: np.ndarray, scores: Any, observed: float) -> float:
    """Chance of a difference of at least `observed` over all exchanges of the two models within documents.

    In each gold class the documents on which they differ fall to either side like coins, whichever document it is.
    """
    from scipy.stats import binom

    reached, chances = [], []
    for gold in (0, 1):
        coins = int(counts_GAB[gold, 0, 1] + counts_GAB[gold, 1, 0])
        width = SPREAD * coins**0.5 / 2
        heads = np.arange(max(0, int(coins / 2 - width)), min(coins, int(coins / 2 + width) + 1) + 1)
        reached.append(np.stack([heads, coins - heads], axis=1))
        chances.append(binom.pmf(heads, coins, 0.5))
    total = 0.0
    for (up, down), chance in zip(reached[0], chances[0], strict=True):
        counts = np.broadcast_to(counts_GAB, (len(reached[1]), 2, 2, 2)).copy()
        counts[:, 0, 0, 1], counts[:, 0, 1, 0] = up, down
        counts[:, 1, 0, 1], counts[:, 1, 1, 0] = reached[1].T
        one, two = scores(counts.reshape(-1, 8))
        total += chance * chances[1][np.abs(two - one) >= observed - 1e-12].sum()
    return min(1.0, float(total))


def _resampled(counts_K: np.ndarray, statistic: Any) -> np.ndarray:
    """A statistic of 10,000 samples of the documents with replacement, drawn as counts of their K kinds."""
    rng, total = np.random.default_rng(0), int(counts_K.sum())
    step = max(1, CHUNK // len(counts_K))
    sizes = [min(step, RESAMPLES - start) for start in range(0, RESAMPLES, step)]
    return np.concatenate([statistic(rng.multinomial(total, counts_K / total, size=size)) for size in sizes])


def _interval(drawn: np.ndarray, documents: int) -> tuple[float | None, float | None]:
    if documents < 2:
        return None, None
    low, high = np.quantile(drawn, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)
