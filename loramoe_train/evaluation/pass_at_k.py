"""pass@k over programs that were run: the share of problems that at least one of k samples would solve.

Of n samples with c right ones, pass@k = 1 - C(n - c, k) / C(n, k), the unbiased estimator of "Evaluating Large Language
Models Trained on Code" (arXiv:2107.03374, section 2.1).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from math import comb
from typing import Any

from jinja2 import Environment, StrictUndefined

from loramoe_train.evaluation.sandbox import OnOutcome, Outcome, Program

Run = Callable[[Sequence[Program], OnOutcome | None], Sequence[Outcome]]  # outcomes in the order of the programs
OnProgram = Callable[[dict[str, Any]], None]  # hears `index`, `code` and the outcome of each program as it ends
Assemble = Callable[[Mapping[str, Any], str], Program]  # a row and a response -> what is run


def pass_at_k(num_samples: int, num_passed: int, k: int) -> float:
    """The estimate in [0, 1]. Raises ValueError if there are fewer than k samples."""
    if not 0 <= num_passed <= num_samples or not 1 <= k <= num_samples:
        raise ValueError(f"pass@{k} of {num_passed} passed among {num_samples} samples is not defined")
    return 1.0 - comb(num_samples - num_passed, k) / comb(num_samples, k)


def assembler(code: str, tests: str) -> Assemble:
    """Makes programs from two jinja templates over a row's columns, `code` also over the `response`.

    They are rendered as lm-eval renders its own. For example `{{prompt}}{{response}}` where the response goes on, or
    `{{response.split("```")[0]}}` where it is the whole program up to the end of a code block.
    """
    environment = Environment(undefined=StrictUndefined, keep_trailing_newline=True)
    of_code, of_tests = environment.from_string(code), environment.from_string(tests)
    return lambda doc, response: Program(of_code.render(**doc, response=response), of_tests.render(**doc))


def code_scoring(
    run: Run,
    *,
    assemble: Assemble,
    metric: str = "pass@1",
    filter_name: str = "create_test",
    k: int = 1,
    on_program: OnProgram | None = None,
) -> dict[str, Any]:
    """The two lm-eval task entries that execute completions: a filter that runs them all, and the score of a problem.

    The filter sees all documents at once, so `run` can work on many programs in parallel. The code and the outcome of
    each stay in the samples.

    Args:
        run: runs programs and gives their outcomes; `Sandbox.run_all`.
        assemble: makes the program of a row and a response; see `assembler`.
        metric, filter_name: as they appear in the task's headline.
        on_program: called for each program when it has ended, in any order, before the filter returns.
    """

    def execute(responses: Sequence[Sequence[str]], docs: Sequence[Mapping[str, Any]]) -> list[list[dict[str, Any]]]:
        programs = [
            [assemble(doc, text) for text in texts] for texts, doc in zip(list(responses), list(docs), strict=True)
        ]
        flat = [program for several in programs for program in several]

        def tell(index: int, outcome: Outcome) -> None:
            if on_program is not None:
                on_program({"index": index, "code": flat[index].code, **asdict(outcome)})

        outcomes = iter(run(flat, tell))
        return [[{"code": program.code, **asdict(next(outcomes))} for program in several] for several in programs]

    def score(doc: Mapping[str, Any], results: Sequence[Sequence[Mapping[str, Any]]]) -> dict[str, float]:
        runs = results[0]
        passed = sum(entry["verdict"] == "passed" for entry in runs)
        return {metric: pass_at_k(len(runs), passed, k)}

    return {
        "filter_list": [{"name": filter_name, "filter": [{"function": "custom", "filter_fn": execute}]}],
        "process_results": score,
    }
