"""tiny_sentiment, the shape of SST-2: one sentence of a review, 1 positive, 0 negative.

A sentence joins judgements about aspects; `not` and `never` turn a judgement round, and of two clauses joined by `but`
the second one counts. The corpus shows reviews with stars and other verdicts, without the words "positive" and
"negative".
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
    """One judgement of `label`, straight or by negation of its opposite."""
    kind = rng.randrange(5)
    words, opposite = (GOOD, BAD) if label else (BAD, GOOD)
    verbs, verbs_opposite = (VERBS_GOOD, VERBS_BAD) if label else (VERBS_BAD, VERBS_GOOD)
    if kind <= 1:
        return f"the {aspect} was {rng.choice(DEGREES)}{rng.choice(words)}"
    if kind == 2:
        return f"the {aspect} was {rng.choice(['not', 'never', 'not at all', 'hardly'])} {rng.choice(opposite)}"
    if kind == 3:
        return f"i {rng.choice(['', 'really ', 'truly '])}{rng.choice(verbs)} the {aspect}"
    return f"nobody {rng.choice(verbs_opposite)} the {aspect}"


def sentence(rng: random.Random, label: int) -> str:
    first, second = rng.sample(ASPECTS[rng.choice(list(ASPECTS))], 2)
    kind = rng.randrange(4)
    if kind == 0:
        return clause(rng, first, label)
    if kind == 1:
        return f"{clause(rng, first, label)} and {clause(rng, second, label)}"
    if kind == 2:
        return f"{clause(rng, first, 1 - label)} but {clause(rng, second, label)}"
    return f"although {clause(rng, first, 1 - label)} , {clause(rng, second, label)}"


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
    """Lines of two to five guests, each with a verdict; half of the sentences are single judgements, the easy beginning."""
    form, bad, good = rng.choice(VERDICTS)
    lines: list[str] = []
    count = rng.randint(2, 5)
    while len(lines) < count:
        label = rng.randrange(2)
        single = rng.random() < 0.5
        text = clause(rng, rng.choice(ASPECTS[rng.choice(list(ASPECTS))]), label) if single else sentence(rng, label)
        if f"{text} ." not in secrets:
            lines.append(form.format(text=f"{text} .", verdict=good if label else bad))
    return "\n".join(lines)
