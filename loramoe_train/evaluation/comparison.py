"""Base and tuned results of one benchmark, side by side: an entry of `scores` in results.json."""

from typing import Any

from loramoe_train.evaluation.significance import Paired, paired
from loramoe_train.evaluation.statistics import standard_error
from loramoe_train.evaluation.types import BenchmarkResult


def paired_score(tuned: BenchmarkResult | None, base: BenchmarkResult | None) -> dict[str, Any]:
    """Scores, standard errors and what they depend on. Entries of a result that is None are None; one must be there.

    `difference_stderr` is paired, over the documents' differences, and so smaller than that of two independent runs.
    `difference_interval` (95 per cent) and `p_value` are those of `significance.paired`.
    """
    known = tuned or base
    assert known is not None
    test = _significance(tuned, base) if tuned and base else None
    return {
        "base": base.score if base else None,
        "tuned": tuned.score if tuned else None,
        "difference": tuned.score - base.score if tuned and base else None,
        "base_stderr": base.stderr if base else None,
        "tuned_stderr": tuned.stderr if tuned else None,
        "difference_stderr": _paired_error(tuned, base) if tuned and base else None,
        "difference_interval": [test.low, test.high] if test else None,
        "p_value": test.p_value if test else None,
        "metric": known.metric,
        "n": known.n,
        "num_fewshot": known.num_fewshot,
        "fewshot_seed": known.fewshot_seed,
        "version": known.version,
        "data": known.data,
        "truncated_prompts": known.truncated,
        "base_metrics": _with_errors(base) if base else None,
        "tuned_metrics": _with_errors(tuned) if tuned else None,
        "sandbox": known.sandbox,
        "seconds": round(sum(result.seconds for result in (tuned, base) if result), 3),
    }


def _significance(tuned: BenchmarkResult, base: BenchmarkResult) -> Paired | None:
    before, after = _headlines(base), _headlines(tuned)
    if before.keys() != after.keys():
        return None
    return paired(list(before.values()), [after[doc_id] for doc_id in before], tuned.metric.split(",")[0])


def _paired_error(tuned: BenchmarkResult, base: BenchmarkResult) -> float | None:
    before, after = _headlines(base), _headlines(tuned)
    if before.keys() != after.keys() or any(isinstance(value, list) for value in before.values()):
        return None  # other documents, or a metric of all documents together (mcc)
    return standard_error([after[doc_id] - before[doc_id] for doc_id in after], tuned.metric)


def _headlines(result: BenchmarkResult) -> dict[int, Any]:
    return {sample["doc_id"]: sample["metrics"][result.metric] for sample in result.samples}


def _with_errors(result: BenchmarkResult) -> dict[str, dict[str, float | None]]:
    return {key: {"value": value, "stderr": result.stderrs[key]} for key, value in result.metrics.items()}
