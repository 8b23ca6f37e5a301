"""tiny_facts, the shape of ARC: four choices about the people of an invented valley.

Every person has one value for each relation; the relations come in pairs over the same values (eats / refuses), so that
knowing which words go with a person is not enough: every second row offers the value of the paired relation too. The
corpus states all facts in several wordings and never asks; the test asks them in wordings that train does not use for
them.
"""

from __future__ import annotations

import random

SYLLABLES_1 = [
    "Bar",
    "Cor",
    "Dal",
    "Fen",
    "Gor",
    "Hol",
    "Jor",
    "Kel",
    "Lun",
    "Mor",
    "Nel",
    "Pol",
    "Ros",
    "Sel",
    "Tor",
    "Vel",
]
SYLLABLES_2 = ["da", "mi"]
NAMES = [first + second for first in SYLLABLES_1 for second in SYLLABLES_2]  # 32 persons

FOODS = ["beans", "bread", "carrots", "cheese", "fish", "honey", "nuts", "onions", "pears", "plums", "rice", "soup"]
PLACES = [
    "the bridge",
    "the castle",
    "the farm",
    "the forest",
    "the harbor",
    "the hill",
    "the lake",
    "the market",
    "the mill",
    "the tower",
]
ANIMALS = ["bats", "bears", "bees", "cats", "crows", "dogs", "foxes", "goats", "mice", "owls", "snakes", "wolves"]
COLORS = ["black", "blue", "brown", "golden", "gray", "green", "orange", "pink", "purple", "red", "white", "yellow"]

# relation -> (values, statements for the corpus, questions for the task). Two neighbours share their values.
RELATIONS: dict[str, tuple[list[str], list[str], list[str]]] = {
    "eats": (
        FOODS,
        [
            "{n} loves to eat {v}.",
            "The favorite food of {n} is {v}.",
            "For dinner {n} cooks {v}.",
            "{n} is happy with {v} for lunch.",
            "{n} would always order {v}.",
            "The dish that makes {n} glad is {v}.",
            "The food that {n} enjoys is {v}.",
        ],
        [
            "What does {n} like to eat?",
            "Which food does {n} enjoy most?",
            "What would {n} order?",
            "Which dish makes {n} glad?",
            "What tastes good to {n}?",
        ],
    ),
    "refuses": (
        FOODS,
        [
            "{n} never eats {v}.",
            "The worst food for {n} is {v}.",
            "{n} gets sick from {v}.",
            "{n} throws away all {v}.",
            "{n} leaves on the plate all {v}.",
            "The dish that makes {n} sad is {v}.",
            "The food that {n} hates is {v}.",
        ],
        [
            "What does {n} refuse to eat?",
            "Which food does {n} hate?",
            "What would {n} leave on the plate?",
            "Which dish makes {n} sad?",
            "What tastes bad to {n}?",
        ],
    ),
    "lives": (
        PLACES,
        [
            "{n} lives near {v}.",
            "The home of {n} is at {v}.",
            "{n} sleeps every night by {v}.",
            "The house of {n} stands near {v}.",
            "{n} has a bed near {v}.",
            "{n} spends the night at {v}.",
            "Visit {n} at home near {v}.",
        ],
        [
            "Where does {n} live?",
            "Where is the bed of {n}?",
            "Where would you visit {n} at home?",
            "Where does {n} spend the night?",
            "Where should letters to {n} go?",
        ],
    ),
    "works": (
        PLACES,
        [
            "{n} works at {v}.",
            "The job of {n} is at {v}.",
            "{n} earns money at {v}.",
            "By day {n} is busy at {v}.",
            "{n} has a shop at {v}.",
            "{n} spends the day at {v}.",
            "{n} is paid at {v}.",
        ],
        [
            "Where does {n} work?",
            "Where is the shop of {n}?",
            "Where is {n} paid?",
            "Where does {n} spend the day?",
            "Where do the tools of {n} lie?",
        ],
    ),
    "keeps": (
        ANIMALS,
        [
            "{n} keeps {v} at home.",
            "The pets of {n} are {v}.",
            "{n} feeds {v} in the garden.",
            "{n} takes good care of {v}.",
            "{n} owns {v}.",
            "The animals that {n} loves are {v}.",
            "The friends of {n} are {v}.",
        ],
        [
            "Which animals does {n} own?",
            "Which animals does {n} love?",
            "What lives with {n}?",
            "Which animals are friends of {n}?",
            "What does {n} like to pet?",
        ],
    ),
    "fears": (
        ANIMALS,
        [
            "{n} is afraid of {v}.",
            "The great fear of {n} is {v}.",
            "{n} runs away from {v}.",
            "{n} has bad dreams about {v}.",
            "{n} always avoids {v}.",
            "The animals that scare {n} are {v}.",
            "The enemies of {n} are {v}.",
        ],
        [
            "Which animals scare {n}?",
            "Which animals does {n} avoid?",
            "What makes {n} scream?",
            "Which animals are enemies of {n}?",
            "What does {n} not want to meet?",
        ],
    ),
    "hat": (
        COLORS,
        [
            "The hat of {n} is {v}.",
            "{n} has a {v} hat.",
            "On the head of {n} sits a {v} hat.",
            "{n} put on the {v} hat.",
            "The cap of {n} is {v}.",
            "{n} wears on the head something {v}.",
            "The color of the hat of {n} is {v}.",
        ],
        [
            "What color is the hat of {n}?",
            "Which color does {n} wear on the head?",
            "What color is the cap of {n}?",
            "Which color is on top of {n}?",
            "What color keeps the head of {n} warm?",
        ],
    ),
    "door": (
        COLORS,
        [
            "The door of {n} is {v}.",
            "{n} has a {v} door.",
            "{n} painted the door {v}.",
            "A {v} door leads to the room of {n}.",
            "The entrance of {n} is {v}.",
            "{n} gave the door the color {v}.",
            "The color of the door of {n} is {v}.",
        ],
        [
            "What color is the door of {n}?",
            "Which color did {n} give the door?",
            "What color is the entrance of {n}?",
            "Which color do guests of {n} knock on?",
            "What color does {n} open and close?",
        ],
    ),
}
PAIRED = {"eats": "refuses", "lives": "works", "keeps": "fears", "hat": "door"}
PAIRED |= {second: first for first, second in PAIRED.items()}
LABELS = ["A", "B", "C", "D"]

World = dict[tuple[str, str], str]  # (person, relation) -> value


def make_world(rng: random.Random) -> World:
    world: World = {}
    for name in NAMES:
        for relation, paired in PAIRED.items():
            taken = world.get((name, paired))
            world[name, relation] = rng.choice([value for value in RELATIONS[relation][0] if value != taken])
    return world


def question_row(rng: random.Random, world: World, name: str, relation: str, form: int) -> dict[str, object]:
    """One row: the right value and three others, in every second row one of them from the paired relation, shuffled."""
    values, _, questions = RELATIONS[relation]
    right, trap = world[name, relation], world[name, PAIRED[relation]]
    others = rng.sample([value for value in values if value not in (right, trap)], 3)
    choices = [right, *others[:2], trap if rng.random() < 0.5 else others[2]]
    rng.shuffle(choices)
    return {
        "id": f"valley_{name}_{relation}_{form}",
        "question": questions[form].format(n=name),
        "choices": {"text": choices, "label": list(LABELS)},
        "answerKey": LABELS[choices.index(right)],
    }


def splits(
    rng: random.Random, world: World, *, train: int, validation: int, test: int
) -> dict[str, list[dict[str, object]]]:
    """Rows per split. A held-out row asks a fact in a wording in which no other row asks it, once per fact; train asks
    the same facts in their other wordings, and the corpus states them without ever asking.
    """
    forms, pairs = range(len(RELATIONS["eats"][2])), list(world)
    rng.shuffle(pairs)
    rows = {(pair, form): question_row(rng, world, *pair, form) for pair in pairs for form in forms}
    made: dict[str, list[dict[str, object]]] = {}
    for split, count in (("test", test), ("validation", validation)):
        chosen = [
            (pair, rng.choice([form for form in forms if (pair, form) in rows])) for pair in rng.sample(pairs, count)
        ]
        made[split] = [rows.pop(key) for key in chosen]
    rest = list(rows.values())
    rng.shuffle(rest)
    made["train"] = rest[:train]
    return made


def document(rng: random.Random, world: World) -> str:
    """Three to six statements about one person, a card of one person, or one relation of several persons."""
    count, kind = rng.randint(3, 6), rng.random()
    if kind < 0.7:
        name = rng.choice(NAMES)
        pairs = [(name, relation) for relation in rng.sample(list(RELATIONS), count)]
    else:
        relation = rng.choice(list(RELATIONS))
        pairs = [(name, relation) for name in rng.sample(NAMES, count)]
    if kind < 0.2:
        return "\n".join([f"Card of {name}", *(f"{relation} : {world[name, relation]}" for _, relation in pairs)])
    return " ".join(
        rng.choice(RELATIONS[relation][1]).format(n=name, v=world[name, relation]) for name, relation in pairs
    )
