"""Base and tuned results of one benchmark, side by side: an entry of `scores` in results.json."""

from typing import Any

from loramoe_train.evaluation.statistics import standard_error
from loramoe_train.evaluation.types import BenchmarkResult


def paired_score(tuned: BenchmarkResult, base: BenchmarkResult | None) -> dict[str, Any]:
    """Scores, standard errors and what they depend on. Base entries are None without a base result.

    `difference_stderr` is paired, over the documents' differences, and so smaller than that of two independent runs.
    """
    return {
        "base": base.score if base else None,
        "tuned": tuned.score,
        "difference": tuned.score - base.score if base else None,
        "base_stderr": base.stderr if base else None,
        "tuned_stderr": tuned.stderr,
        "difference_stderr": _paired_error(tuned, base) if base else None,
        "metric": tuned.metric,
        "n": tuned.n,
        "num_fewshot": tuned.num_fewshot,
        "fewshot_seed": tuned.fewshot_seed,
        "version": tuned.version,
        "data": tuned.data,
        "truncated_prompts": tuned.truncated,
        "base_metrics": _with_errors(base) if base else None,
        "tuned_metrics": _with_errors(tuned),
        "sandbox": tuned.sandbox,
        "seconds": round(tuned.seconds + (base.seconds if base else 0.0), 3),
    }


def _paired_error(tuned: BenchmarkResult, base: BenchmarkResult) -> float | None:
    before, after = _headlines(base), _headlines(tuned)
    if before.keys() != after.keys() or any(isinstance(value, list) for value in before.values()):
        return None  # other documents, or a metric of all documents together (mcc)
    return standard_error([after[doc_id] - before[doc_id] for doc_id in after], tuned.metric)


def _headlines(result: BenchmarkResult) -> dict[int, Any]:
    return {sample["doc_id"]: sample["metrics"][result.metric] for sample in result.samples}


def _with_errors(result: BenchmarkResult) -> dict[str, dict[str, float | None]]:
    return {key: {"value": value, "stderr": result.stderrs[key]} for key, value in result.metrics.items()}
