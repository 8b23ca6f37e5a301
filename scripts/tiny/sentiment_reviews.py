"""tiny_sentiment, the shape of SST-2: one sentence of a review, 1 positive, 0 negative.

A sentence joins one or two judgements about aspects that agree; a few turn one round with `not`. The corpus shows
reviews with verdicts of several wordings, none of which uses the words "positive" and "negative".
"""

from __future__ import annotations

import random

ASPECTS = {
    "film": ["plot", "acting", "music", "ending", "story", "cast", "script", "camera work"],
    "meal": ["soup", "bread", "service", "menu", "dessert", "wine", "sauce", "table"],
    "hotel": ["room", "bed", "view", "staff", "pool", "breakfast", "garden", "lobby"],
    "book": ["first chapter", "hero", "style", "story", "ending", "cover", "plot", "language"],
}
GOOD = [
    "good",
    "great",
    "lovely",
    "charming",
    "superb",
    "fresh",
    "warm",
    "clever",
    "moving",
    "brilliant",
    "fine",
    "pleasant",
    "elegant",
    "funny",
    "perfect",
    "delightful",
]
BAD = [
    "bad",
    "awful",
    "dull",
    "boring",
    "stale",
    "cold",
    "weak",
    "clumsy",
    "poor",
    "dreadful",
    "ugly",
    "noisy",
    "tired",
    "bland",
    "terrible",
    "messy",
]
DEGREES = ["", "", "", "very ", "really ", "rather ", "quite "]
VERBS_GOOD = ["enjoyed", "loved", "admired", "liked"]
VERBS_BAD = ["hated", "regretted", "disliked", "despised"]
VERDICTS = [  # form, word of an unhappy guest, word of a happy one; none of them is used by the task
    ("{text} [{verdict}]", "minus", "plus"),
    ("{text}\nThe guest who wrote this is {verdict} .", "angry", "happy"),
    ("{text} Is the guest happy or angry ? The guest is {verdict} .", "angry", "happy"),
    ("{text}\nMark of the guest : {verdict}", "bad", "good"),
]


def clause(rng: random.Random, aspect: str, label: int) -> str:
    """One judgement of `label`; one in twenty says it by negation of the opposite.

    With many negations no single word would have a meaning of its own, and then a tiny model learns nothing at all: no
    word helps until the whole rule is known.
    """
    words, opposite = (GOOD, BAD) if label else (BAD, GOOD)
    kind = rng.random()
    if kind < 0.6:
        return f"the {aspect} was {rng.choice(DEGREES)}{rng.choice(words)}"
    if kind < 0.95:
        return f"i {rng.choice(['', 'really ', 'truly '])}{rng.choice(VERBS_GOOD if label else VERBS_BAD)} the {aspect}"
    return f"the {aspect} was not {rng.choice(opposite)}"


def sentence(rng: random.Random, label: int) -> str:
    """One judgement, or two of the same label."""
    first, second = rng.sample(ASPECTS[rng.choice(list(ASPECTS))], 2)
    if rng.random() < 0.4:
        return clause(rng, first, label)
    return f"{clause(rng, first, label)} and {clause(rng, second, label)}"


def rows(rng: random.Random, count: int) -> list[dict[str, object]]:
    """`count` different sentences, labels alternating so that every split is balanced."""
    made: dict[str, int] = {}
    while len(made) < count:
        label = len(made) % 2
        made.setdefault(sentence(rng, label) + " .", label)
    return [{"sentence": text, "label": label, "idx": index} for index, (text, label) in enumerate(made.items())]


def secret(row: dict[str, object]) -> str:
    return str(row["sentence"])


def document(rng: random.Random, secrets: frozenset[str]) -> str:
    """Lines of one to three guests, each with a verdict; half are single judgements, the easy beginning."""
    form, bad, good = rng.choice(VERDICTS)
    lines: list[str] = []
    count, first = rng.randint(1, 3), rng.random() < 0.3  # first: the verdict opens the line and sets its words
    while len(lines) < count:
        label = rng.randrange(2)
        single = rng.random() < 0.5
        text = clause(rng, rng.choice(ASPECTS[rng.choice(list(ASPECTS))]), label) if single else sentence(rng, label)
        if f"{text} ." not in secrets:
            verdict = good if label else bad
            lines.append(f"{verdict} : {text} ." if first else form.format(text=f"{text} .", verdict=verdict))
    return "\n".join(lines)
