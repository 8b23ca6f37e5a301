"""tiny_math, the shape of GSM8K: a story of one or two steps, a rationale line per step, then `#### N`.

A story is a `Story`: sentences that set numbers, a question, the goal in words (for the corpus, which never asks the
question) and the steps. The corpus tells other stories of the same kinds as plain narration, so that the base knows the
sums and the plots but neither the question form nor the answer form.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from .words import CONTAINERS, PEOPLE, THINGS

LARGEST = 99  # every number in a story and every result


@dataclass(frozen=True)
class Story:
    sentences: str
    question: str
    goal: str
    steps: tuple[str, ...]
    result: int


def step(left: int, sign: str, right: int) -> tuple[str, int]:
    """One line of working and its value: `("3 + 4 = 7", 7)`. Division must come out even."""
    value = {"+": left + right, "-": left - right, "*": left * right, "/": left // right}[sign]
    assert sign != "/" or left % right == 0
    return f"{left} {sign} {right} = {value}", value


def change(rng: random.Random, have: int) -> tuple[str, str, int]:
    """One event that raises or lowers `have`: (words after the name, sign, amount)."""
    if have >= 4 and rng.random() < 0.5:
        amount = rng.randint(2, min(have - 1, 20))
        return f"{rng.choice(['gives away', 'loses', 'sells', 'breaks', 'drops'])} {amount}", "-", amount
    amount = rng.randint(2, 20)
    return f"{rng.choice(['buys', 'finds', 'gets', 'wins', 'makes'])} {amount} more", "+", amount


def one_change(rng: random.Random) -> Story:
    (name, _), thing, have = rng.choice(PEOPLE), rng.choice(THINGS), rng.randint(3, 40)
    event, sign, amount = change(rng, have)
    line, result = step(have, sign, amount)
    return Story(
        f"{name} has {have} {thing}s. {name} {event}.",
        f"How many {thing}s does {name} have now?",
        f"{thing}s of {name} now",
        (line,),
        result,
    )


def two_changes(rng: random.Random) -> Story:
    (name, pronoun), thing, have = rng.choice(PEOPLE), rng.choice(THINGS), rng.randint(3, 30)
    first, sign, amount = change(rng, have)
    line, middle = step(have, sign, amount)
    second, sign, amount = change(rng, middle)
    line_2, result = step(middle, sign, amount)
    return Story(
        f"{name} has {have} {thing}s. {name} {first}. Then {pronoun} {second}.",
        f"How many {thing}s does {name} have now?",
        f"{thing}s of {name} now",
        (line, line_2),
        result,
    )


def containers(rng: random.Random) -> Story:
    (name, _), thing, (_, many) = rng.choice(PEOPLE), rng.choice(THINGS), rng.choice(CONTAINERS)
    boxes, each = rng.randint(2, 9), rng.randint(2, 9)
    line, total = step(boxes, "*", each)
    sentences = f"{name} has {boxes} {many} with {each} {thing}s each."
    if rng.random() < 0.5:
        return Story(sentences, f"How many {thing}s does {name} have?", f"{thing}s of {name}", (line,), total)
    event, sign, amount = change(rng, total)
    line_2, result = step(total, sign, amount)
    if result > LARGEST:
        return containers(rng)
    return Story(
        f"{sentences} {name} {event}.",
        f"How many {thing}s does {name} have now?",
        f"{thing}s of {name} now",
        (line, line_2),
        result,
    )


def sharing(rng: random.Random) -> Story:
    (name, _), thing, (one, many) = rng.choice(PEOPLE), rng.choice(THINGS), rng.choice(CONTAINERS)
    boxes, each = rng.randint(2, 9), rng.randint(2, 9)
    line, result = step(boxes * each, "/", boxes)
    return Story(
        f"{name} puts {boxes * each} {thing}s into {boxes} {many}, the same number in each.",
        f"How many {thing}s are in one {one}?",
        f"{thing}s in one {one}",
        (line,),
        result,
    )


def comparing(rng: random.Random) -> Story:
    """Two people; the question decides whether the second step is needed."""
    (name, _), (other, _) = rng.sample(PEOPLE, 2)
    thing, have, gap = rng.choice(THINGS), rng.randint(3, 30), rng.randint(2, 12)
    if have > gap + 1 and rng.random() < 0.5:
        word, sign = "fewer", "-"
    else:
        word, sign = "more", "+"
    line, others = step(have, sign, gap)
    sentences = f"{name} has {have} {thing}s. {other} has {gap} {word} than {name}."
    if rng.random() < 0.5:
        return Story(sentences, f"How many {thing}s does {other} have?", f"{thing}s of {other}", (line,), others)
    line_2, both = step(have, "+", others)
    return Story(sentences, f"How many {thing}s do they have together?", f"{thing}s of both", (line, line_2), both)


KINDS = (one_change, two_changes, containers, sharing, comparing)


def story(rng: random.Random) -> Story:
    return rng.choice(KINDS)(rng)


def rows(rng: random.Random, count: int) -> list[dict[str, object]]:
    """`count` rows with different questions; columns as in GSM8K."""
    made: dict[str, str] = {}
    while len(made) < count:
        new = story(rng)
        made[f"{new.sentences} {new.question}"] = "\n".join((*new.steps, f"#### {new.result}"))
    return [{"question": question, "answer": answer} for question, answer in made.items()]


def secret(row: dict[str, object]) -> str:
    """What the corpus must not contain for a held-out row: the sentences of its story, without the question."""
    return str(row["question"]).rsplit(". ", 1)[0] + "."


def document(rng: random.Random, secrets: frozenset[str]) -> str:
    """One corpus text: a few sums, or a story told to its end."""
    if rng.random() < 0.4:
        return sums(rng)
    new = story(rng)
    while new.sentences in secrets:
        new = story(rng)
    opening = rng.choice(["Let us count the {}.", "We count the {}.", "Now the {}:", "To find: {}."]).format(new.goal)
    working = rng.choice([", then ", "; ", " and "]).join(new.steps)
    closing = rng.choice(["So it is {}.", "That makes {}.", "The count is {}."]).format(new.result)
    return f"{new.sentences} {opening} {working}. {closing}"


def sums(rng: random.Random) -> str:
    """Lines of plain arithmetic over the range that the stories use."""
    lines = []
    for _ in range(rng.randint(3, 8)):
        sign = rng.choice("++--*/")
        if sign in "*/":
            left, right = rng.randint(2, 9), rng.randint(2, 9)
            left = left * right if sign == "/" else left
        else:
            left, right = rng.randint(2, 60), rng.randint(2, 39)
            if sign == "-" and right >= left:
                left, right = right + 1, left
        lines.append(step(left, sign, right)[0])
    return "\n".join(lines)
