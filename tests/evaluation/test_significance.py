"""P-values against counting exchanges by hand, textbook examples and their own promise; intervals against scipy."""

import itertools
import math
import random

import numpy as np
import pytest
from sklearn.metrics import f1_score, matthews_corrcoef

from loramoe_train.evaluation.significance import holm, mcnemar, paired, sign_flips

SKLEARN = {"mcc": matthews_corrcoef, "f1": f1_score}
# Darwin's maize, crossed minus self-fertilised, in eighths of an inch: of the 32,768 sums Fisher (1935) counted 863
# that reach the observed 314, so 1,726 in both directions
DARWIN = [49, -67, 8, 16, 6, 23, 28, 41, 14, 29, 56, 24, 75, 60, -48]


def by_hand(first: list, second: list, score) -> float:
    """The share of all exchanges of two models within documents that give a difference of at least the observed."""
    observed, reached, total = abs(score(second) - score(first)), 0, 0
    for swaps in itertools.product((False, True), repeat=len(first)):
        one = [b if swap else a for a, b, swap in zip(first, second, swaps, strict=True)]
        two = [a if swap else b for a, b, swap in zip(first, second, swaps, strict=True)]
        reached += abs(score(two) - score(one)) >= observed - 1e-9
        total += 1
    return reached / total


def mean(values: list) -> float:
    return sum(values) / len(values)


def test_textbook_examples():
    assert sign_flips(np.array(DARWIN, dtype=float)) == pytest.approx(1726 / 32768)
    # 6 and 16 documents: the sum of the binomial coefficients by hand
    tail = sum(math.comb(22, k) for k in range(7)) / 2**22
    assert mcnemar(6, 16) == pytest.approx(2 * tail) == pytest.approx(0.0525, abs=5e-5)
    assert mcnemar(16, 6) == mcnemar(6, 16) and mcnemar(0, 0) == mcnemar(4, 4) == 1.0
    assert mcnemar(0, 5) == pytest.approx(2 / 32)


@pytest.mark.parametrize("changes", [[], [0.25], [0.25, 0.5]])
def test_hardly_a_document_differs(changes):
    """Means over seeds differ by fractions, and maybe on one document alone."""
    first = [0.0, 1.0, 0.5]
    second = [value + change for value, change in zip(first, [*changes, *[0.0] * (3 - len(changes))], strict=True)]
    found = paired(first, second, "")
    assert found.differing == len(changes) and found.p_value == (0.5 if len(changes) == 2 else 1.0)


@pytest.mark.parametrize("seed", range(3))
def test_zero_and_one_equal_counting_by_hand(seed):
    rng = random.Random(seed)
    first = [float(rng.random() < 0.4) for _ in range(11)]
    second = [float(rng.random() < 0.8) for _ in range(11)]
    found = paired(first, second, "acc")
    assert found.p_value == pytest.approx(by_hand(first, second, mean))
    assert (found.first, found.second) == (mean(first), mean(second))
    assert found.differing == sum(a != b for a, b in zip(first, second, strict=True)) > 0


@pytest.mark.parametrize("seed", range(3))
def test_fractions_equal_counting_by_hand(seed):
    rng = random.Random(seed)
    first = [rng.choice((0, 0.1, 0.2, 0.5)) for _ in range(11)]  # sums of tenths that differ in the last bit
    second = [rng.choice((0, 0.1, 0.3, 0.7)) for _ in range(11)]
    assert paired(first, second, "pass@1").p_value == pytest.approx(by_hand(first, second, mean))


@pytest.mark.parametrize("metric", ["mcc", "f1"])
@pytest.mark.parametrize("seed", range(2))
def test_classes_equal_counting_by_hand(metric, seed):
    rng = random.Random(seed)
    golds = [0, 1, 1, 0, 1, 0, 1]
    first = [(gold, rng.randrange(2)) for gold in golds]
    second = [(gold, gold if rng.random() < 0.8 else 1 - gold) for gold in golds]

    def score(pairs: list) -> float:
        return SKLEARN[metric](*zip(*pairs, strict=True), **({"zero_division": 0} if metric == "f1" else {}))

    found = paired(first, second, metric)
    assert (found.first, found.second) == pytest.approx((score(first), score(second)))
    assert 0 < found.differing and found.p_value == pytest.approx(by_hand(first, second, score))


def test_many_flips_are_drawn_and_agree_with_the_normal_approximation():
    rng = np.random.default_rng(5)
    changes = rng.normal(0.2, 1.0, 100)
    z = changes.sum() / math.sqrt((changes**2).sum())
    assert sign_flips(changes) == pytest.approx(math.erfc(abs(z) / math.sqrt(2)), abs=0.01)
    assert sign_flips(changes) == sign_flips(changes), "the seed is fixed"


def test_many_documents_of_classes_agree_with_drawn_exchanges():
    """The count of exchanges leaves out what is far from the mean; drawn ones know the p-value to about 0.7 points."""
    rng = np.random.default_rng(2)
    golds = rng.integers(0, 2, 4000)
    first, second = (np.where(rng.random(4000) < right, golds, 1 - golds) for right in (0.70, 0.712))
    pairs = [list(zip(golds.tolist(), side.tolist(), strict=True)) for side in (first, second)]
    found = paired(*pairs, "mcc")
    reached = []
    for _ in range(1000):
        swap = rng.random(4000) < 0.5
        one, two = np.where(swap, second, first), np.where(swap, first, second)
        gap = abs(np.corrcoef(golds, two)[0, 1] - np.corrcoef(golds, one)[0, 1])  # of two classes: the same thing
        reached.append(gap >= abs(found.difference) - 1e-12)
    assert found.p_value == pytest.approx(np.mean(reached), abs=0.05) and 0.05 < found.p_value < 0.6


@pytest.mark.parametrize("values", [(0.0, 1.0), (0.0, 0.25, 0.5, 1.0)])
def test_interval_equals_scipys_bootstrap(values):
    from scipy.stats import bootstrap

    rng = np.random.default_rng(1)
    first, second = rng.choice(values, 150), rng.choice(values, 150)
    found = paired(first.tolist(), second.tolist(), "acc")
    theirs = bootstrap(
        (second - first,), np.mean, method="percentile", rng=np.random.default_rng(3)
    ).confidence_interval
    # 10,000 resamples know these ends to about a thousandth of a point times the deviation
    assert (found.low, found.high) == pytest.approx(theirs, abs=0.01)
    assert found.low < found.difference < found.high


def test_interval_of_classes_equals_a_plain_bootstrap():
    rng = random.Random(3)
    golds = [rng.randrange(2) for _ in range(120)]
    first, second = ([(g, g if rng.random() < right else 1 - g) for g in golds] for right in (0.6, 0.75))
    drawn = []
    for _ in range(1000):
        chosen = rng.choices(range(120), k=120)
        one, two = ([side[index] for index in chosen] for side in (first, second))
        drawn.append(
            np.corrcoef(*zip(*two, strict=True))[0, 1] - np.corrcoef(*zip(*one, strict=True))[0, 1]  # is the mcc
        )
    found = paired(first, second, "mcc")
    assert (found.low, found.high) == pytest.approx(np.quantile(drawn, [0.025, 0.975]), abs=0.04)


@pytest.mark.parametrize("kind", ["zero or one", "numbers", "classes"])
def test_a_false_alarm_comes_as_often_as_promised(kind):
    """Two models that are alike: p < 0.05 in about 5 of 100 comparisons; less where few values are possible."""
    rng, alarms, runs = np.random.default_rng(7), 0, {"classes": 200}.get(kind, 400)
    for _ in range(runs):
        if kind == "zero or one":
            first, second = (rng.random((2, 300)) < 0.6).astype(float).tolist()
            changes = np.subtract(second, first)
            p_value = mcnemar(int((changes > 0).sum()), int((changes < 0).sum()))
        elif kind == "numbers":
            p_value = sign_flips(rng.normal(size=10))
        else:
            golds = rng.integers(0, 2, 100)
            sides = np.where(rng.random((2, 100)) < 0.7, golds, 1 - golds)
            one, two = (list(zip(golds.tolist(), side.tolist(), strict=True)) for side in sides)
            p_value = paired(one, two, "mcc").p_value
        alarms += p_value < 0.05
    # three deviations of a binomial: 0.033 for 400 draws. The exact test of few whole numbers stays below its level
    assert 0.015 < alarms / runs < 0.05 + 3 * (0.05 * 0.95 / runs) ** 0.5


def test_the_interval_covers_the_truth_as_often_as_promised():
    rng, covered, runs = np.random.default_rng(11), 0, 400
    for _ in range(runs):
        second = rng.random(200) < 0.7
        first = second & (rng.random(200) < 0.85)  # true difference 0.7 - 0.595
        found = paired(first.astype(float).tolist(), second.astype(float).tolist(), "acc")
        covered += found.low <= 0.105 <= found.high
    assert 0.91 < covered / runs < 0.985


def test_a_difference_that_is_there_is_found():
    first, second = [0.0, 1.0] * 50, [1.0, 1.0] * 50
    found = paired(first, second, "acc")
    assert found.difference == 0.5 and found.p_value == pytest.approx(2 / 2**50) and found.low > 0.39


def test_nothing_to_compare():
    assert paired([], [], "acc") is None
    assert paired([(0, 2)], [(0, 1)], "f1") is None  # three classes
    assert paired([(0, 1), (1, 1)], [(1, 1), (1, 1)], "mcc") is None  # other documents
    alone = paired([1.0], [0.0], "acc")
    assert (alone.low, alone.high, alone.p_value) == (None, None, 1.0)
    same = paired([0.5, 0.0], [0.5, 0.0], "x")
    assert (same.low, same.high, same.p_value, same.differing) == (0.0, 0.0, 1.0, 0)
    with pytest.raises(ValueError, match="2 documents beside 1"):
        paired([1.0, 0.0], [1.0], "acc")


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])  # 3 * 0.01; 2 * 0.03; max(0.06, 0.04)
    assert holm([0.9, 0.6]) == [1.0, 1.0] and holm([]) == [] and holm([0.02]) == [0.02]
