"""The estimator against enumeration, and what the executing filter passes on."""

from itertools import combinations
from typing import Any

import pytest
from jinja2 import UndefinedError

from loramoe_train.evaluation.pass_at_k import assembler, code_scoring, pass_at_k
from loramoe_train.evaluation.sandbox import Outcome, Program


@pytest.mark.parametrize("num_samples", [1, 3, 6])
def test_estimator_equals_counting_all_draws(num_samples):
    for passed in range(num_samples + 1):
        for k in range(1, num_samples + 1):
            draws = list(combinations([True] * passed + [False] * (num_samples - passed), k))
            assert pass_at_k(num_samples, passed, k) == pytest.approx(sum(map(any, draws)) / len(draws))


@pytest.mark.parametrize("arguments", [(1, 1, 2), (1, 2, 1), (3, -1, 1), (3, 1, 0)])
def test_impossible_counts_are_refused(arguments):
    with pytest.raises(ValueError, match="not defined"):
        pass_at_k(*arguments)


DOCS = [
    {"prompt": "def f():\n", "test": "def check(c): ...", "entry_point": "f"},
    {"prompt": "def g():\n", "test": "def check(c): assert c", "entry_point": "g"},
]


def test_programs_are_run_at_once_and_scored_by_problem():
    ran: list[Program] = []
    heard: list[dict[str, Any]] = []

    def run(programs, on_outcome):
        ran.extend(programs)
        outcomes = [Outcome("passed" if "good" in program.code else "failed", "", 0.1) for program in programs]
        for index in reversed(range(len(outcomes))):
            on_outcome(index, outcomes[index])
        return outcomes

    assemble = assembler("{{prompt}}{{response}}", "{{test}}\ncheck({{entry_point}})")
    entries = code_scoring(run, assemble=assemble, metric="pass@2", filter_name="made", k=2, on_program=heard.append)
    assert entries["filter_list"][0]["name"] == "made"
    execute = entries["filter_list"][0]["filter"][0]["filter_fn"]
    found = execute(iter([["  good\n", "  bad\n", "  bad2\n"], ["  good\n", "  good\n"]]), iter(DOCS))
    assert ran[0] == Program("def f():\n  good\n", "def check(c): ...\ncheck(f)")
    assert len(ran) == 5 and ran[4].tests.endswith("check(g)")
    assert [entry["verdict"] for entry in found[0]] == ["passed", "failed", "failed"]
    assert found[0][0]["code"] == "def f():\n  good\n"
    assert [entry["index"] for entry in heard] == [4, 3, 2, 1, 0]
    assert [entry | {"index": None} for entry in reversed(heard)] == [
        entry | {"index": None} for entry in found[0] + found[1]
    ]
    assert entries["process_results"](DOCS[0], [found[0]]) == {"pass@2": pytest.approx(2 / 3)}
    assert entries["process_results"](DOCS[1], [found[1]]) == {"pass@2": 1.0}


def test_templates_keep_their_text_and_leave_that_of_a_response_alone():
    fenced = assembler("{{prompt}}{{response.split('```')[0]}}", "{{tests[0]}}\n{{tests[1]}}\n")
    made = fenced({"prompt": "a\n", "tests": ["t", "u"]}, "{{prompt}}<&\n```\nrest")
    assert made == Program("a\n{{prompt}}<&\n", "t\nu\n")
    with pytest.raises(UndefinedError):
        fenced({"prompt": "a\n"}, "")
