"""pass@k over programs that were run: the share of problems that at least one of k samples would solve.

Of n samples with c right ones, pass@k = 1 - C(n - c, k) / C(n, k), the unbiased estimator of "Evaluating Large Language
Models Trained on Code" (arXiv:2107.03374, section 2.1).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from math import comb
from typing import Any

from loramoe_train.evaluation.sandbox import Outcome

Run = Callable[[Sequence[str]], Sequence[Outcome]]


def pass_at_k(num_samples: int, num_passed: int, k: int) -> float:
    """The estimate in [0, 1]. Raises ValueError if there are fewer than k samples."""
    if not 0 <= num_passed <= num_samples or not 1 <= k <= num_samples:
        raise ValueError(f"pass@{k} of {num_passed} passed among {num_samples} samples is not defined")
    return 1.0 - comb(num_samples - num_passed, k) / comb(num_samples, k)


def code_scoring(run: Run, *, k: int = 1) -> dict[str, Any]:
    """The two lm-eval task entries that execute completions: a filter that runs them all, and the score of a problem.

    The filter sees all documents at once, so `run` can work on many programs in parallel. A program is prompt,
    completion and the document's tests; each outcome stays in the samples.
    """

    def execute(responses: Sequence[Sequence[str]], docs: Sequence[Mapping[str, Any]]) -> list[list[dict[str, Any]]]:
        responses, docs = list(responses), list(docs)
        completed = [[doc["prompt"] + text for text in texts] for texts, doc in zip(responses, docs, strict=True)]
        programs = [
            f"{code}\n{doc['test']}\ncheck({doc['entry_point']})"
            for codes, doc in zip(completed, docs, strict=True)
            for code in codes
        ]
        outcomes = iter(run(programs))
        return [[{"code": code, **asdict(next(outcomes))} for code in codes] for codes in completed]

    def score(doc: Mapping[str, Any], results: Sequence[Sequence[Mapping[str, Any]]]) -> dict[str, float]:
        runs = results[0]
        passed = sum(entry["verdict"] == "passed" for entry in runs)
        return {f"pass@{k}": pass_at_k(len(runs), passed, k)}

    return {
        "filter_list": [{"name": "create_test", "filter": [{"function": "custom", "filter_fn": execute}]}],
        "process_results": score,
    }
