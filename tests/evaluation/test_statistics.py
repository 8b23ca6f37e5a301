"""Standard errors against lm-eval's own, and against a plain bootstrap."""

import random

import numpy as np
import pytest

from loramoe_train.evaluation.statistics import standard_error


def test_of_a_mean_equals_lm_eval():
    from lm_eval.api.metrics import mean_stderr

    values = [1.0, 0.0, 0.0, 1.0, 1.0]
    assert standard_error(values, "acc") == pytest.approx(mean_stderr(values))


@pytest.mark.parametrize("metric", ["mcc", "f1"])
def test_of_counts_equals_a_plain_bootstrap(metric):
    from sklearn.metrics import f1_score, matthews_corrcoef

    score = {"mcc": matthews_corrcoef, "f1": f1_score}[metric]
    rng = random.Random(3)
    pairs = [(gold, gold if rng.random() < 0.75 else 1 - gold) for gold in [0, 1, 1] * 30]
    drawn = []
    for _ in range(400):
        golds, picks = zip(*rng.choices(pairs, k=len(pairs)), strict=True)
        drawn.append(score(golds, picks))
    # 400 resamples know the deviation to about 3.5 per cent
    assert standard_error(pairs, metric) == pytest.approx(np.std(drawn, ddof=1), rel=0.15)


def test_constant_predictions_have_no_correlation_and_no_error():
    assert standard_error([(0, 1), (1, 1), (1, 1)], "mcc") == 0.0


@pytest.mark.parametrize(
    ("values", "metric"),
    [([], "acc"), ([1.0], "acc"), ([(0, 1)], "mcc"), ([(0, 2), (1, 1)], "mcc"), ([(0, 1)] * 2, "x")],
)
def test_none_where_there_is_no_rule(values, metric):
    assert standard_error(values, metric) is None
