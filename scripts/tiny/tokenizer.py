"""Byte-level BPE over the corpus, with digits alone and a newline alone.

The newline rule matters for code: a prompt ends with a newline and its answer begins with blanks. A usual byte-level
split would join the two, and prompt + answer would be tokenized differently from the prompt followed by the answer.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from . import corpus, facts_valley

PAD = "<|pad|>"
SPECIAL = [PAD, corpus.END, corpus.USER, corpus.ASSISTANT, "<|system|>"]
VOCABULARY = 1280
TRAINING_DOCUMENTS = 30_000
PIECES = r"\n|\d| ?\p{L}+| ?[^\s\p{L}\d]+| +(?!\S)|\s"

# Every message ends with the end-of-text token, so a tuned model stops after its answer in both kinds of prompt.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ message['content'] + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def train_tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = itertools.islice(corpus.documents(seed=1), TRAINING_DOCUMENTS)
    # the fixed words of the task prompts and labels, so that they do not fall apart into single letters
    frames = [
        "Question: Does this sentence make sense?\nAnswer: yes no",
        "Question: Is this sentence positive or negative?\nAnswer:",
    ]
    tokenizer.train_from_iterator(itertools.chain(texts, frames * 500, train_texts()), trainer)
    return tokenizer


def train_texts() -> list[str]:
    """The texts of the train rows, and the wordings of all questions about the valley."""
    texts = [
        " ".join(str(value) for value in row.values())
        for family, splits in corpus.task_rows().items()
        for row in splits["train"]
        if family != "tiny_facts"
    ]
    forms = [form for _, _, questions in facts_valley.RELATIONS.values() for form in questions]
    return texts + [form.format(n=name) for form in forms for name in facts_valley.NAMES]


def save(tokenizer: Tokenizer, folder: Path) -> None:
    """tokenizer.json and tokenizer_config.json, written by hand to be the same under every transformers version."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": 512,
        "padding_side": "right",
        "eos_token": corpus.END,
        "pad_token": PAD,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
