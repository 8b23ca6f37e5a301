"""Two rows per benchmark with the local columns, a third for the few-shot pool, and the same as the hub has them."""

import json
from pathlib import Path
from typing import Any

ARC = [
    {
        "id": f"q{n}",
        "question": question,
        "choices": {"text": texts, "label": labels},
        "answerKey": key,
    }
    for n, (question, texts, labels, key) in enumerate(
        [
            ("Which animal lays eggs?", ["a cow", "a hen", "a dog", "a cat"], ["A", "B", "C", "D"], "B"),
            ('What melts "ice"?', ["heat", "it's cold", "wind"], ["1", "2", "3"], "1"),
            ("Where do fish live?", ["water", "trees", "air", "sand"], ["A", "B", "C", "D"], "A"),
        ]
    )
]
PAIRS = [
    {"sentence1": "He left .", "sentence2": "He went away .", "label": 1, "idx": 0},
    {"sentence1": "It's raining", "sentence2": "The sun shines", "label": 0, "idx": 1},
    {"sentence1": "A dog barks.", "sentence2": "An animal makes noise.", "label": 1, "idx": 2},
]
SENTENCES = [
    {"sentence": "The cat sat . ", "label": 1, "idx": 0},
    {"sentence": "sat cat the", "label": 0, "idx": 1},
    {"sentence": "Dogs bark.", "label": 1, "idx": 2},
]
SUMS = [
    {"question": "Tom has 3 apples, buys 4. How many?", "answer": "3 + 4 = <<3+4=7>>7\n#### 7"},
    {"question": "A pen costs $2. Ten?", "answer": "10 * 2 = $20\n#### 20"},
    {"question": "Half of 1,000?", "answer": "1,000 / 2 = 500\n#### 500"},
]
FUNCTIONS = [
    {
        "task_id": f"HumanEval/{n}",
        "prompt": f'def {name}(a, b):\n    """Return a {sign} b."""\n',
        "canonical_solution": f"    return a {sign} b\n",
        "test": f"def check(candidate):\n    assert candidate(5, 3) == {5 - 3 if sign == '-' else 8}\n",
        "entry_point": name,
    }
    for n, (name, sign) in enumerate([("add", "+"), ("subtract", "-")])
]
PROGRAMS = [
    {
        "task_id": 11 + n,
        "text": f"Write a function to add {n} to 'x'.",
        "code": f"def plus(x):\r\n    return x + {n}",
        "test_list": [f"assert plus({x}) == {x + n}" for x in (1, 2, 3)],
        "test_setup_code": "",
        "challenge_test_list": [],
    }
    for n in (4, 5)
]
LOCAL: dict[str, list[dict[str, Any]]] = {
    "gsm8k": SUMS,
    "gsm8k_cot": SUMS,
    "gsm8k_cot_zeroshot": SUMS,
    "medqa_4options": [
        {"question": "Which drug?", "options": dict(A="x", B="y mg", C="z", D="w"), "answer_idx": "C", "answer": "z"},
        {"question": "A 20-year-old?", "options": dict(A="1", B="2", C="3", D="4"), "answer_idx": "A", "answer": "1"},
        {"question": "Where?", "options": dict(A="p", B="q", C="r", D="s"), "answer_idx": "D", "answer": "s"},
    ],
    "cola": SENTENCES,
    "sst2": SENTENCES,
    "mrpc": PAIRS,
    "rte": PAIRS,
    "arc_easy": ARC,
    "arc_challenge": ARC,
    "arc_easy_chat": ARC,
    "arc_challenge_chat": ARC,
    "boolq": [
        {"question": "is water wet", "passage": "Water is a liquid. It wets things.", "answer": True},
        {"question": "do cats fly", "passage": "Cats walk.", "answer": False},
        {"question": "is ice cold", "passage": "Ice is frozen.", "answer": True},
    ],
    "piqa": [
        {"goal": "Open a jar", "sol1": "turn the lid", "sol2": "eat the lid", "label": 0},
        {"goal": "Boil water?", "sol1": 'use "ice"', "sol2": "use a pot, don't spill", "label": 1},
        {"goal": "Dry a shirt", "sol1": "hang it", "sol2": "wet it", "label": 0},
    ],
    "winogrande": [
        {"sentence": "Ann thanked Bea because _ had helped.", "option1": "Ann", "option2": "Bea", "answer": "2"},
        {"sentence": "The cup fell off the box, so _ was broken.", "option1": "cup", "option2": "box", "answer": "1"},
        {"sentence": "Al beat Bo since _ was fast.", "option1": "Al", "option2": "Bo", "answer": "1"},
    ],
    "openbookqa": [
        {"id": row["id"], "question_stem": row["question"], "choices": row["choices"], "answerKey": row["answerKey"]}
        for row in ARC
    ],
    "commonsense_qa": [
        {
            "id": f"c{n}",
            "question": f" Where would you find {thing}? ",
            "question_concept": thing,
            "choices": {"label": list("ABCDE"), "text": ["home", "a bank", "sea", "it's gone", "school"]},
            "answerKey": "ECB"[n],
        }
        for n, thing in enumerate(["a pupil", "fish", "money"])
    ],
    "humaneval": FUNCTIONS,
    "humaneval_instruct": FUNCTIONS,
    "mbpp": PROGRAMS,
    "mbpp_instruct": PROGRAMS,
    "qqp": [
        {"question1": "How do I cook rice?", "question2": "How is rice cooked?", "label": 1, "idx": 0},
        {"question1": "What's a fox?", "question2": 'Where is "Fox"?', "label": 0, "idx": 1},
        {"question1": "Is it far?", "question2": "How far is it?", "label": 0, "idx": 2},
    ],
    "social_iqa": [
        {
            "context": f"{who} helped a friend.",
            "question": f"How would {who} feel?",
            "answerA": "proud",
            "answerB": "it's sad",
            "answerC": 'like "nobody"',
            "label": label,
        }
        for who, label in (("Ann", "1"), ("Bo", "3"), ("Cem", "2"))
    ],
    "hellaswag": [
        {
            "activity_label": "Making tea",
            "ctx_a": "A woman [laughing] boils water.  She waits.",
            "ctx_b": "the Woman",
            "endings": ["pours it. ", "sips [title] Enjoy it's taste", 'says "no"  twice', "\nleaves [step] the\nroom"],
            "label": "2",
        },
        {
            "activity_label": "Health",
            "ctx_a": "[header] How to sleep [title] Go to bed. [step] Lie",
            "ctx_b": "",
            "endings": ["down [substeps] and rest. ", "up", "[unclosed", "  about"],
            "label": "0",
        },
        {"activity_label": "X", "ctx_a": "He", "ctx_b": "runs", "endings": ["a", "b", "c", "d"], "label": "3"},
    ],
    "agieval_aqua_rat": [
        {
            "query": f"Q: Half of {n}? Answer Choices: (A)1 (B)2 (C)3 (D)4 (E)it's 5\nA: The answer is",
            "choices": ["(A)1", "(B)2", "(C)3", "(D)4 or more", "(E)it's 5"],
            "gold": [n // 2 - 1],
        }
        for n in (4, 8)
    ],
    "mmlu": [
        {"question": " Which is a bone? ", "subject": "anatomy", "choices": ["it", "a rib", "x", "y"], "answer": 1},
        {"question": "Who?", "subject": "high_school_us_history", "choices": ["A", "B", "C", "D"], "answer": 3},
    ],
    "scienceqa": [
        {"image": None, "hint": "Look up.", "question": "What shines?", "choices": ["sun", "mud"], "answer": 0},
        {"image": None, "hint": "", "question": "Which is alive?", "choices": ["a", "b", "c"], "answer": 2},
        {"image": None, "hint": "", "question": "Which is far?", "choices": ["x", "y"], "answer": 1},
    ],
    "tiny_math": [{"question": f"Tom has {n}. How many?", "answer": f"{n} + 0 = {n}\n#### {n}"} for n in (3, 4, 5)],
    "tiny_code": [
        {"prompt": f'def f{n}(x):\n    """Return x + {n}."""\n', "canonical_solution": f"    return x + {n}\n"}
        for n in range(3)
    ],
    "tiny_facts": ARC,
    "tiny_grammar": SENTENCES,
    "tiny_sentiment": SENTENCES,
}


def hub_row(name: str, row: dict[str, Any]) -> dict[str, Any]:
    """The row as the hub's data set has it."""
    if name == "medqa_4options":
        endings = {f"ending{n}": row["options"][letter] for n, letter in enumerate("ABCD")}
        return {"sent1": row["question"], "sent2": "", **endings, "label": "ABCD".index(row["answer_idx"])}
    if name == "boolq":
        return {"question": row["question"], "passage": row["passage"], "label": int(row["answer"])}
    return row


def write_local(folder: Path, name: str, rows: list[dict[str, Any]] | None = None) -> Path:
    """Files for every split of a benchmark: two rows (all, in the few-shot pool). Returns the data root."""
    from loramoe_train.evaluation.tasks import load_benchmark

    benchmark = load_benchmark(name)
    rows = LOCAL[name] if rows is None else rows
    for split, file in benchmark.files.items():
        path = folder / file.removesuffix(".gz")
        path.parent.mkdir(parents=True, exist_ok=True)
        chosen = rows if split == "train" else rows[:2]
        path.write_text("".join(json.dumps(row) + "\n" for row in chosen), encoding="utf-8")
    return folder
