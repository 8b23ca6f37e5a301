"""tiny_code, the shape of HumanEval: a `def` line with a one-line docstring, to be completed by one or two lines.

Answers are compared as text, never executed, so a description has one canonical solution. Half of the functions carry
a name that says nothing. The corpus shows the same operations as assignments under comments and as functions explained
afterwards, never as a docstring to complete.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

NUMBER_NAMES = ["x", "n", "value", "number"]
TEXT_NAMES = ["text", "word", "line", "s"]
LIST_NAMES = ["items", "values", "numbers", "data"]
VAGUE_NAMES = ["helper", "solve", "task", "work", "run", "step", "check", "func"]
LETTERS = "abcdefghijklmnoprstuw"


@dataclass(frozen=True)
class Operation:
    """`what` describes the value of `expression` over the variable `variable`; `setup` is an optional first line."""

    variable: str
    what: str
    expression: str
    name: str
    setup: str = ""

    @property
    def body(self) -> str:
        first = f"    {self.setup}\n" if self.setup else ""
        return f"{first}    return {self.expression}\n"


def arithmetic(rng: random.Random) -> Operation:
    x, a, b = rng.choice(NUMBER_NAMES), rng.randint(2, 20), rng.randint(2, 20)
    word_1, sign_1 = rng.choice([("plus", "+"), ("minus", "-")])
    return rng.choice(
        [
            lambda: Operation(x, f"{x} {word_1} {a}", f"{x} {sign_1} {a}", f"{word_1}_{a}"),
            lambda: Operation(x, f"{x} times {a}", f"{x} * {a}", f"times_{a}"),
            lambda: Operation(x, f"{x} times {a} {word_1} {b}", f"{x} * {a} {sign_1} {b}", f"times_{a}_{word_1}_{b}"),
            lambda: Operation(x, f"{a} times the sum of {x} and {b}", f"{a} * ({x} + {b})", "scaled_sum"),
            lambda: Operation(x, f"the square of {x} {word_1} {a}", f"{x} ** 2 {sign_1} {a}", "square_change"),
            lambda: Operation(x, f"the remainder of {x} divided by {a}", f"{x} % {a}", "remainder"),
            lambda: Operation(
                x, f"twice y where y is {x} {word_1} {a}", "2 * y", "double_change", f"y = {x} {sign_1} {a}"
            ),
        ]
    )()


def condition(rng: random.Random) -> Operation:
    x, a, b = rng.choice(NUMBER_NAMES), rng.randint(2, 20), rng.randint(2, 20)
    return rng.choice(
        [
            lambda: Operation(x, f"whether {x} is greater than {a}", f"{x} > {a}", f"above_{a}"),
            lambda: Operation(x, f"whether {x} is smaller than {a}", f"{x} < {a}", f"below_{a}"),
            lambda: Operation(x, f"whether {x} is a multiple of {a}", f"{x} % {a} == 0", f"multiple_of_{a}"),
            lambda: Operation(x, f"whether {x} is not {a}", f"{x} != {a}", f"is_not_{a}"),
            lambda: Operation(x, f"whether {x} lies between {a} and {a + b}", f"{a} < {x} < {a + b}", "in_range"),
            lambda: Operation(x, f"the larger one of {x} and {a}", f"max({x}, {a})", f"at_least_{a}"),
            lambda: Operation(x, f"the smaller one of {x} and {a}", f"min({x}, {a})", f"at_most_{a}"),
        ]
    )()


def text(rng: random.Random) -> Operation:
    s, a = rng.choice(TEXT_NAMES), rng.randint(2, 20)
    p, q = rng.sample(LETTERS, 2)
    return rng.choice(
        [
            lambda: Operation(s, f"the first {a} letters of {s}", f"{s}[:{a}]", f"first_{a}"),
            lambda: Operation(s, f"the last {a} letters of {s}", f"{s}[-{a}:]", f"last_{a}"),
            lambda: Operation(s, f"{s} without the first {a} letters", f"{s}[{a}:]", f"skip_{a}"),
            lambda: Operation(s, f"{s} repeated {a} times", f"{s} * {a}", f"repeat_{a}"),
            lambda: Operation(s, f"how often {p} occurs in {s}", f'{s}.count("{p}")', f"count_{p}"),
            lambda: Operation(s, f"{s} with {q} in place of {p}", f'{s}.replace("{p}", "{q}")', f"replace_{p}"),
            lambda: Operation(s, f"whether {s} starts with {p}", f'{s}.startswith("{p}")', f"starts_with_{p}"),
            lambda: Operation(s, f"whether {s} ends with {p}", f'{s}.endswith("{p}")', f"ends_with_{p}"),
            lambda: Operation(s, f"the parts of {s} between each {p}", f'{s}.split("{p}")', f"split_at_{p}"),
            lambda: Operation(
                s, f"{s} backwards and without the last {a} letters", f"t[:-{a}]", "backwards", f"t = {s}[::-1]"
            ),
        ]
    )()


def sequence(rng: random.Random) -> Operation:
    xs, a = rng.choice(LIST_NAMES), rng.randint(2, 20)
    word, sign = rng.choice([("greater", ">"), ("smaller", "<")])
    return rng.choice(
        [
            lambda: Operation(xs, f"the sum of {xs} plus {a}", f"sum({xs}) + {a}", f"sum_plus_{a}"),
            lambda: Operation(
                xs, f"the {xs} {word} than {a}", f"[v for v in {xs} if v {sign} {a}]", f"{word}_than_{a}"
            ),
            lambda: Operation(xs, f"every one of {xs} times {a}", f"[v * {a} for v in {xs}]", f"all_times_{a}"),
            lambda: Operation(xs, f"every one of {xs} plus {a}", f"[v + {a} for v in {xs}]", f"all_plus_{a}"),
            lambda: Operation(xs, f"the largest of {xs} minus {a}", f"max({xs}) - {a}", f"largest_minus_{a}"),
            lambda: Operation(xs, f"the smallest {a} of {xs}", f"sorted({xs})[:{a}]", f"smallest_{a}"),
            lambda: Operation(
                xs, f"how many {xs} are {word} than {a}", f"len([v for v in {xs} if v {sign} {a}])", f"how_many_{word}"
            ),
            lambda: Operation(
                xs, f"the largest {a} of {xs}", f"ordered[-{a}:]", f"largest_{a}", f"ordered = sorted({xs})"
            ),
            lambda: Operation(xs, f"whether {xs} has more than {a} members", f"len({xs}) > {a}", f"longer_than_{a}"),
        ]
    )()


def operation(rng: random.Random) -> Operation:
    return rng.choice((arithmetic, condition, text, sequence))(rng)


def rows(rng: random.Random, count: int) -> list[dict[str, object]]:
    """`count` rows with different (description, variable); columns as in HumanEval, without its unit tests."""
    made: dict[str, tuple[Operation, str]] = {}
    while len(made) < count:
        new = operation(rng)
        name = new.name if rng.random() < 0.5 else f"{rng.choice(VAGUE_NAMES)}_{rng.randint(1, 9)}"
        made.setdefault(new.what, (new, name))
    return [
        {
            "task_id": f"tiny_code/{index}",
            "prompt": f'def {name}({new.variable}):\n    """Return {new.what}."""\n',
            "canonical_solution": new.body,
            "entry_point": name,
        }
        for index, (new, name) in enumerate(made.values())
    ]


def secret(row: dict[str, object]) -> str:
    """The description; it contains the variable, so the same operation on another variable stays allowed."""
    return str(row["prompt"]).split("Return ")[1].rsplit('."""', 1)[0]


def document(rng: random.Random, secrets: frozenset[str]) -> str:
    """One to three snippets: an assignment under a comment, or a function and its explanation."""
    snippets = []
    while len(snippets) < rng.randint(1, 3):
        new = operation(rng)
        if new.what in secrets:
            continue
        if rng.random() < 0.5:
            setup = f"{new.setup}\n" if new.setup else ""
            snippets.append(f"# {new.what}\n{setup}result = {new.expression}\n")
        else:
            name = rng.choice(VAGUE_NAMES)
            snippets.append(f"{name} gives {new.what} :\ndef {name}({new.variable}):\n{new.body}")
    return "\n".join(snippets)
