"""The pretraining corpus and the task rows, both from one seed, with the held-out rows kept out of the corpus.

The corpus covers the vocabulary and the skills of the five families in other forms (see each family's module). A small
share of chat documents trains the special tokens of the chat template, and a few plain questions about others keep
the words of the task prompts from being untrained.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path

from . import code_functions, facts_valley, grammar_sentences, math_stories, sentiment_reviews, words

SEED = 20260
SPLITS = {"train": 2400, "validation": 100, "test": 200}
Row = dict[str, object]

# tokenizer.py declares these as special tokens, the chat template writes them
END, USER, ASSISTANT = "<|end|>", "<|user|>", "<|assistant|>"

# shares of documents, not of tokens
SHARES = {"math": 0.34, "code": 0.10, "facts": 0.20, "grammar": 0.18, "sentiment": 0.14, "small_talk": 0.04}

# One such word stands for the meaning of a whole sentence, so pretraining weighs it more than a word of the sentence.
VERDICT_WORDS = sorted(
    {word for module in (grammar_sentences, sentiment_reviews) for _, *pair in module.VERDICTS for word in pair}
)


def world() -> facts_valley.World:
    return facts_valley.make_world(random.Random(f"{SEED} valley"))


def task_rows() -> dict[str, dict[str, list[Row]]]:
    """`{family: {split: rows}}`, the same on every machine."""
    made = {}
    total = sum(SPLITS.values())
    for family, module in FAMILIES.items():
        rows = module.rows(random.Random(f"{SEED} {family}"), total)
        made[family] = {}
        # test first, so that another number of train rows leaves the test rows as they are
        for split in ("test", "validation", "train"):
            chosen, rows = rows[: SPLITS[split]], rows[SPLITS[split] :]
            made[family][split] = [row | {"idx": index} if "idx" in row else row for index, row in enumerate(chosen)]
    made["tiny_facts"] = facts_valley.splits(random.Random(f"{SEED} tiny_facts"), world(), **SPLITS)
    return made


FAMILIES = {
    "tiny_math": math_stories,
    "tiny_code": code_functions,
    "tiny_grammar": grammar_sentences,
    "tiny_sentiment": sentiment_reviews,
}


def write_rows(folder: Path) -> None:
    """`<folder>/<family>/<split>.jsonl`, one JSON object per line."""
    for family, splits in task_rows().items():
        for split, rows in splits.items():
            path = folder / family / f"{split}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8", newline="\n")


def documents(seed: int) -> Iterator[str]:
    """An endless stream of documents; the same seed gives the same stream. Never contains a test or validation row."""
    rows, people = task_rows(), world()
    rng = random.Random(f"{SEED} corpus {seed}")

    def secrets(family: str) -> frozenset[str]:
        held_out = rows[family]["test"] + rows[family]["validation"]
        return frozenset(FAMILIES[family].secret(row) for row in held_out)

    def writer(family: str) -> Callable[[], str]:
        kept, module = secrets(family), FAMILIES[family]
        return lambda: module.document(rng, kept)

    writers = {
        "math": writer("tiny_math"),
        "code": writer("tiny_code"),
        "facts": lambda: facts_valley.document(rng, people),
        "grammar": writer("tiny_grammar"),
        "sentiment": writer("tiny_sentiment"),
        "small_talk": lambda: small_talk(rng),
    }
    kinds, weights = list(SHARES), list(SHARES.values())
    while True:
        yield writers[rng.choices(kinds, weights)[0]]()


def small_talk(rng: random.Random) -> str:
    """A short exchange, or questions about signs and opposites; unrelated to every task."""
    name = rng.choice(words.PEOPLE)[0]
    pairs = [
        ("big", "small"),
        ("hot", "cold"),
        ("up", "down"),
        ("day", "night"),
        ("yes", "no"),
        ("positive", "negative"),
        ("left", "right"),
    ]
    first, second = rng.choice(pairs)
    if rng.random() < 0.5:
        first, second = second, first
    number = rng.randint(1, 50)
    sign = rng.choice(["positive", "negative"])
    question, answer = rng.choice(
        [
            (f"What is the opposite of {first}?", f"The opposite of {first} is {second}."),
            (f"Hello, I am {name}.", f"Hello {name}, nice to meet you."),
            (f"Is the number {'-' if sign == 'negative' else '+'}{number} positive or negative?", f"It is {sign}."),
            (f"Is {number} more than {number + rng.choice([-1, 1])}?", ""),
        ]
    )
    if not answer:
        other = int(question.rsplit(" ", 1)[1].rstrip("?"))
        answer = "yes" if number > other else "no"
    if rng.random() < 0.6:
        return f"{USER}{question}{END}{ASSISTANT}{answer}"
    return f"Question: {question}\nAnswer: {answer}"
