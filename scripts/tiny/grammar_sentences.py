"""tiny_grammar, the shape of CoLA: one sentence, 1 acceptable, 0 not.

A sentence is built from parts that remember their number and form, so that one rule can be broken at will (FAULTS): two
swapped words, a missing noun, the form after a helping verb. The corpus holds sound prose, and lines with verdicts in
other words than yes and no.
"""

from __future__ import annotations

import random

NOUNS = [
    "dog",
    "cat",
    "girl",
    "boy",
    "teacher",
    "farmer",
    "doctor",
    "bird",
    "horse",
    "student",
    "king",
    "baker",
    "artist",
    "sailor",
    "nurse",
    "guest",
]
OBJECTS = ["house", "song", "letter", "garden", "picture", "poem", "bridge", "window", "boat", "road", "table", "lamp"]
# base form, third person, past, participle
TRANSITIVE = [
    ("see", "sees", "saw", "seen"),
    ("like", "likes", "liked", "liked"),
    ("take", "takes", "took", "taken"),
    ("draw", "draws", "drew", "drawn"),
    ("know", "knows", "knew", "known"),
    ("break", "breaks", "broke", "broken"),
    ("find", "finds", "found", "found"),
    ("choose", "chooses", "chose", "chosen"),
    ("forget", "forgets", "forgot", "forgotten"),
    ("watch", "watches", "watched", "watched"),
    ("paint", "paints", "painted", "painted"),
    ("show", "shows", "showed", "shown"),
]
INTRANSITIVE = [
    ("run", "runs", "ran", "run"),
    ("sleep", "sleeps", "slept", "slept"),
    ("sing", "sings", "sang", "sung"),
    ("wait", "waits", "waited", "waited"),
    ("laugh", "laughs", "laughed", "laughed"),
    ("fall", "falls", "fell", "fallen"),
    ("speak", "speaks", "spoke", "spoken"),
    ("swim", "swims", "swam", "swum"),
]
ADJECTIVES = ["old", "young", "small", "tall", "quiet", "happy", "brave", "tired", "clever", "hungry"]  # of NOUNS
OBJECT_ADJECTIVES = ["old", "new", "small", "big", "long", "red", "green", "broken", "famous", "strange"]
PLACES = [
    "near the river",
    "in the garden",
    "behind the house",
    "at the market",
    "under the tree",
    "on the hill",
    "with the child",
    "beside the boats",
]
ADVERBS = ["every day", "today", "in the morning", "again", "at night", "quickly", "very often", "once more"]
PRONOUNS = [
    ("he", "him", False),
    ("she", "her", False),
    ("they", "them", True),
    ("we", "us", True),
]  # subject, object, plural
SINGULAR_DETERMINERS = ["the", "a", "this", "that", "every"]
PLURAL_DETERMINERS = ["the", "these", "those", "many", "some", "two"]
MODALS = ["can", "will", "must", "should"]
ADJECTIVE_OF = {noun: ADJECTIVES for noun in NOUNS} | {noun: OBJECT_ADJECTIVES for noun in OBJECTS}
# words that belong in front of the next word and nowhere else (an adverb may wander, so it is never swapped)
LEADING = {
    *SINGULAR_DETERMINERS,
    *PLURAL_DETERMINERS,
    *ADJECTIVES,
    *OBJECT_ADJECTIVES,
    *MODALS,
    "an",
    "did",
    "going",
    "to",
}
VERDICTS = [  # form, word for a faulty sentence, word for a sound one; none of them is used by the task
    ("draft : {text} [{verdict}]", "fix", "ok"),
    ("{text} {verdict} !", "wrong", "right"),
    ("{text}\nThe teacher reads this line and says : {verdict}", "broken", "sound"),
    ("{text}\nMark of the teacher : {verdict}", "bad", "good"),
]
FAULTS = ("swap", "swap", "missing", "form")  # local ones: two neighbouring words show them


def noun_phrase(rng: random.Random, nouns: list[str], fault: str | None = None) -> tuple[list[str], bool]:
    """Words and whether they are plural; fault "determiner" breaks the number of the determiner."""
    is_plural = rng.random() < 0.5
    right, wrong = (
        (PLURAL_DETERMINERS, SINGULAR_DETERMINERS) if is_plural else (SINGULAR_DETERMINERS, PLURAL_DETERMINERS)
    )
    determiner = rng.choice(wrong[1:] if fault == "determiner" else right)  # [1:]: "the" suits both numbers
    noun = rng.choice(nouns)
    words = [rng.choice(ADJECTIVE_OF[noun])] if rng.random() < 0.4 else []
    words.append(noun + ("s" if is_plural else ""))
    if determiner == "a" and words[0][0] in "aeiou":
        determiner = "an"
    return [determiner, *words], is_plural


def predicate(rng: random.Random, is_plural: bool, *, intransitive: bool, fault: str | None) -> list[str]:
    """The verb group in one of four tenses; faults "agreement" and "form" each choose a tense in which they show."""
    base, third, past, participle = rng.choice(INTRANSITIVE if intransitive else TRANSITIVE)
    tense = rng.choice(
        {"agreement": ["present", "perfect", "progressive"], "form": ["modal", "perfect", "negated"]}.get(
            fault or "", ["present", "past", "modal", "perfect", "negated", "progressive"]
        )
    )
    shown_plural = is_plural != (fault == "agreement")
    wrong_form = fault == "form"
    if tense == "present":
        return [base if shown_plural else third]
    if tense == "past":
        return [past]
    if tense == "modal":
        return [rng.choice(MODALS), third if wrong_form else base]
    if tense == "perfect":
        # a participle equal to the base (run) would hide the fault, the third person never does
        return ["have" if shown_plural else "has", third if wrong_form else participle]
    if tense == "progressive":
        return ["are" if shown_plural else "is", "going", "to", base]
    return ["did", "not", third if wrong_form else base]


def sentence(rng: random.Random, fault: str | None) -> str:
    """A sentence without or with exactly one fault, its words separated by blanks, a full stop at the end."""
    intransitive = rng.random() < 0.35 and fault != "case"
    if fault == "case" or (fault != "determiner" and rng.random() < 0.2):
        subject, accusative, is_plural = rng.choice(PRONOUNS)
        wrong_subject = fault == "case" and rng.random() < 0.5
        words, wrong_object = [accusative if wrong_subject else subject], fault == "case" and not wrong_subject
    else:
        words, is_plural = noun_phrase(rng, NOUNS, fault)
        wrong_object = False
        if rng.random() < 0.3:
            words.append(rng.choice(PLACES))  # stands between subject and verb: agreement at a distance
    words += predicate(rng, is_plural, intransitive=intransitive, fault=fault)
    if wrong_object:
        words.append(rng.choice(PRONOUNS)[0])
    elif not intransitive:
        words += [rng.choice(PRONOUNS)[1]] if rng.random() < 0.2 else noun_phrase(rng, OBJECTS)[0]
    if rng.random() < 0.6:
        words.append(rng.choice(ADVERBS))
    words = " ".join(words).split()
    if fault in ("missing", "swap"):
        places = (
            missable(words) if fault == "missing" else [at for at, word in enumerate(words[:-1]) if word in LEADING]
        )
        if not places:
            return sentence(rng, fault)
        at = rng.choice(places)
        words[at : at + 2] = [words[at + 1]] if fault == "missing" else [words[at + 1], words[at]]
    return " ".join(words) + " ."


def missable(words: list[str]) -> list[int]:
    """Positions whose word must not be left out: a noun after the, a or every ("many" stands alone, "the" cannot)."""
    nouns = {noun + ending for noun in NOUNS + OBJECTS for ending in ("", "s")}
    return [
        at for at in range(1, len(words) - 1) if words[at] in nouns and words[at - 1] in ("the", "a", "an", "every")
    ]


def labelled(rng: random.Random, label: int) -> str:
    return sentence(rng, None if label else rng.choice(FAULTS))


def rows(rng: random.Random, count: int) -> list[dict[str, object]]:
    """`count` different sentences, labels alternating so that every split is balanced."""
    made: dict[str, int] = {}
    while len(made) < count:
        label = len(made) % 2
        made.setdefault(labelled(rng, label), label)
    return [{"sentence": text, "label": label, "idx": index} for index, (text, label) in enumerate(made.items())]


def secret(row: dict[str, object]) -> str:
    return str(row["sentence"])


def document(rng: random.Random, secrets: frozenset[str]) -> str:
    """Sound prose, or lines with a verdict; several forms of verdict, so that it is known apart from its wording."""
    if rng.random() < 0.15:
        return " ".join(open_sentence(rng, 1, secrets) for _ in range(rng.randint(2, 5)))
    form, broken, sound = rng.choice(VERDICTS)
    lines = []
    for _ in range(rng.randint(1, 3)):
        label = rng.randrange(2)
        lines.append(form.format(text=open_sentence(rng, label, secrets), verdict=sound if label else broken))
    return "\n".join(lines)


def open_sentence(rng: random.Random, label: int, secrets: frozenset[str]) -> str:
    text = labelled(rng, label)
    while text in secrets:
        text = labelled(rng, label)
    return text
