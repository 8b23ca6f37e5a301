"""The embedded default as it ships: small, well-formed, reproducible from scripts/, and loadable without a network."""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ASSETS = ROOT / "loramoe_train" / "assets" / "tiny"
sys.path.insert(0, str(ROOT / "scripts"))

from tiny import corpus  # noqa: E402  (a script folder, not an installed package)

COLUMNS = {
    "tiny_math": ["question", "answer"],
    "tiny_code": ["task_id", "prompt", "canonical_solution", "entry_point"],
    "tiny_facts": ["id", "question", "choices", "answerKey"],
    "tiny_grammar": ["sentence", "label", "idx"],
    "tiny_sentiment": ["sentence", "label", "idx"],
}
PROMPT_COLUMN = {
    "tiny_math": "question",
    "tiny_code": "prompt",
    "tiny_facts": "question",
    "tiny_grammar": "sentence",
    "tiny_sentiment": "sentence",
}
ROWS = {"train": 2400, "validation": 100, "test": 200}


def read(family: str, split: str) -> list[dict]:
    return [
        json.loads(line)
        for line in (ASSETS / "data" / family / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
    ]


def test_everything_together_stays_under_nine_megabytes():
    assert sum(path.stat().st_size for path in ASSETS.rglob("*") if path.is_file()) < 9_000_000


@pytest.mark.parametrize("family", COLUMNS)
@pytest.mark.parametrize("split", ROWS)
def test_rows_and_columns(family, split):
    rows = read(family, split)
    assert len(rows) == (980 if (family, split) == ("tiny_facts", "train") else ROWS[split])
    assert all(list(row) == COLUMNS[family] for row in rows)


@pytest.mark.parametrize("family", COLUMNS)
def test_no_prompt_occurs_in_two_splits_or_twice(family):
    prompts = [row[PROMPT_COLUMN[family]] for split in ROWS for row in read(family, split)]
    assert len(prompts) == len(set(prompts))


@pytest.mark.parametrize("family", ["tiny_grammar", "tiny_sentiment"])
@pytest.mark.parametrize("split", ROWS)
def test_labels_are_balanced(family, split):
    labels = [row["label"] for row in read(family, split)]
    assert labels.count(1) == labels.count(0) == ROWS[split] // 2


@pytest.mark.parametrize("split", ROWS)
def test_facts_are_consistent_and_their_letters_balanced(split):
    rows = read("tiny_facts", split)
    letters = Counter(row["answerKey"] for row in rows)
    assert set(letters) == set("ABCD") and min(letters.values()) > 0.15 * len(rows)
    world = corpus.world()
    for row in rows:
        assert len(set(row["choices"]["text"])) == 4 and row["choices"]["label"] == list("ABCD")
        _, person, relation, _ = row["id"].split("_")
        assert row["choices"]["text"]["ABCD".index(row["answerKey"])] == world[person, relation]


def test_held_out_facts_are_asked_in_train_in_other_wordings():
    asked = {split: [tuple(row["id"].split("_")[1:]) for row in read("tiny_facts", split)] for split in ROWS}
    known = {fact[:2] for fact in asked["train"]}
    for split in ("validation", "test"):
        assert not set(asked[split]) & set(asked["train"])
        assert all(fact[:2] in known for fact in asked[split])


def test_math_answers_are_right_and_small():
    for split in ROWS:
        for row in read("tiny_math", split):
            *steps, last = row["answer"].split("\n")
            for line in steps:
                left, right = line.split(" = ")
                assert re.fullmatch(r"\d+ [-+*/] \d+", left) and eval(left) == int(right)  # noqa: S307  (digits and one sign)
            assert last == f"#### {steps[-1].split(' = ')[1]}" and 0 <= int(last[5:]) < 100


def test_code_solutions_compile():
    for row in read("tiny_code", "test"):
        compile(row["prompt"] + row["canonical_solution"], "<row>", "exec")
        assert row["prompt"].startswith(f"def {row['entry_point']}(") and row["prompt"].endswith('"""\n')


def test_the_scripts_give_the_shipped_rows_byte_for_byte(tmp_path):
    corpus.write_rows(tmp_path)
    made = {path.relative_to(tmp_path): path.read_bytes() for path in tmp_path.rglob("*.jsonl")}
    shipped = {
        path.relative_to(ASSETS / "data"): path.read_bytes() for path in (ASSETS / "data").rglob("*") if path.is_file()
    }
    assert made == shipped


def test_the_corpus_is_deterministic_and_holds_no_held_out_row():
    stream, again = corpus.documents(seed=3), corpus.documents(seed=3)
    texts = [next(stream) for _ in range(3000)]
    assert texts[:200] == [next(again) for _ in range(200)]
    whole = "\n" + "\n".join(texts) + "\n"
    for family, module in corpus.FAMILIES.items():
        # as a text of its own: a short text may well be the beginning or the end of a longer one
        ends = ("\n", " :") if family == "tiny_code" else ("\n", " ")
        for row in read(family, "test") + read(family, "validation"):
            held_out = module.secret(row)
            found = [start + held_out + end for start in ("\n", ": ", "# ", "gives ") for end in ends]
            assert not any(text in whole for text in found), row
    assert not any(row["question"] in whole for row in read("tiny_facts", "test"))


@pytest.fixture(scope="module")
def tokenizer():
    transformers = pytest.importorskip("transformers")
    return transformers.AutoTokenizer.from_pretrained(ASSETS / "model", local_files_only=True)


def test_tokenizer_round_trip_and_special_tokens(tokenizer):
    assert tokenizer.eos_token_id is not None and tokenizer.pad_token_id not in (None, tokenizer.eos_token_id)
    for text in ["Question: How many?\nAnswer: 3 + 4 = 7\n#### 7", "def f(x):\n    return x * 12\n", "naïve – 日本"]:
        assert tokenizer.decode(tokenizer(text).input_ids, clean_up_tokenization_spaces=False) == text
    assert len(tokenizer(" 12").input_ids) == 3


@pytest.mark.parametrize(
    "prompt, answer",
    [
        ("Question: Why?\nAnswer:", " yes"),
        ('def f(x):\n    """Return x."""\n', "    return x\n"),
        ("Answer:", " 3 + 4 = 7\n#### 7"),
    ],
)
def test_prompt_and_answer_meet_at_a_token_border(tokenizer, prompt, answer):
    assert tokenizer(prompt).input_ids + tokenizer(answer).input_ids == tokenizer(prompt + answer).input_ids


@pytest.mark.parametrize("word", [" yes", " no", " positive", " negative"])
def test_label_words_are_single_tokens(tokenizer, word):
    assert len(tokenizer(word).input_ids) == 1


def test_chat_template_marks_the_answer(tokenizer):
    messages = [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": "Good day."}]
    head = tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    assert whole == f"{head}Good day.{tokenizer.eos_token}"


def test_model_loads_in_float32_and_is_finite(tokenizer):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        ASSETS / "model", dtype=torch.float32, local_files_only=True
    )
    assert 2_000_000 < sum(weight.numel() for weight in model.parameters()) < 4_000_000
    assert all(weight.isfinite().all() and weight.dtype == torch.float32 for weight in model.parameters())
    assert model.config.num_hidden_layers % 4 == 0 and model.config.max_position_embeddings == 512
    assert (model.config.eos_token_id, model.config.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)
    ids = torch.tensor([tokenizer("the old teacher will sing in the garden every day .").input_ids])
    with torch.no_grad():
        assert model(ids, labels=ids).loss < 4  # nats; untrained it would be ln(vocabulary), about 7
