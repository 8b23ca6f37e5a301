"""Token ids: the boundary that evaluation sees, the end of sequence, the first token, truncation."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loramoe_train.data.templates import Rendered, Renderer, Segment
from loramoe_train.data.tokens import Encoder
from loramoe_train.errors import ConfigError, DataError
from tests.conftest import ASSISTANT, BEGIN, CORPUS, END, make_tokenizer
from tests.data.helpers import task_config

WHERE = "toy.jsonl:7"
PROMPT, ANSWER = "Question: How many apples?\nAnswer:", " 3 + 4 = 7 apples"


def pair(prompt, answer):
    return Rendered((Segment(prompt, False), Segment(answer, True)))


def encode(rendered, tokenizer, max_length=64, **options):
    encoded = Encoder(tokenizer, max_length=max_length, **options)(rendered, WHERE)
    supervised = [token for token, mark in zip(encoded.ids, encoded.supervised, strict=True) if mark]
    return encoded, supervised


@pytest.mark.parametrize("begin", [False, True])
def test_prompt_then_answer_then_end(begin):
    tokenizer = make_tokenizer(begin=begin)
    encoded, supervised = encode(pair(PROMPT, ANSWER), tokenizer)
    # what lm-eval makes of this pair: the context with the tokenizer's own special tokens, and the rest of the whole
    context, whole = tokenizer.encode(PROMPT), tokenizer.encode(PROMPT + ANSWER)
    assert encoded.ids == [*whole, tokenizer.eos_token_id]
    assert supervised == [*whole[len(context) :], tokenizer.eos_token_id]
    assert (encoded.ids[0] == tokenizer.bos_token_id) == begin


def sentencepiece_like():
    """A tokenizer that, as Llama 2's, writes spaces as a letter and puts one before every text."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE(unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    inner.decoder = decoders.Metaspace(prepend_scheme="always")
    trainer = trainers.BpeTrainer(vocab_size=120, special_tokens=["<unk>", END], show_progress=False)
    inner.train_from_iterator(["Answer: yes no Question \n maybe ? return x"] * 5, trainer)
    # Llama 2 does it in the normaliser, whatever the text begins with: " yes" alone becomes two marks and "yes"
    inner.pre_tokenizer = None
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=END, unk_token="<unk>")


def test_no_word_begin_mark_is_doubled_at_the_boundary():
    tokenizer = sentencepiece_like()
    whole = tokenizer.encode("Answer: yes")
    assert tokenizer.encode("Answer:") + tokenizer.encode(" yes") != whole  # what encoding apart would have given
    encoded, supervised = encode(pair("Answer:", " yes"), tokenizer)
    assert encoded.ids == [*whole, tokenizer.eos_token_id]
    assert supervised == [*whole[len(tokenizer.encode("Answer:")) :], tokenizer.eos_token_id]


@settings(max_examples=60, deadline=None)
@given(prompt=st.text(max_size=12), answer=st.text(min_size=1, max_size=12).filter(lambda text: text.strip()))
def test_the_boundary_is_a_token_boundary(tokenizer, prompt, answer):
    rendered = pair("Q " + prompt, answer)
    encoded, supervised = encode(rendered, tokenizer, max_length=500)
    prompt_ids = encoded.ids[: len(encoded.ids) - len(supervised)]
    assert prompt_ids == tokenizer.encode("Q " + prompt)  # exactly what a model is asked with
    assert supervised[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(encoded.ids[:-1], clean_up_tokenization_spaces=False) == "Q " + prompt + answer


def test_merge_across_the_boundary_is_undone(tokenizer):
    text, cut = next((w, c) for w in CORPUS[3].split() for c in range(1, len(w)) if _merges(tokenizer, w, c))
    context, answer = tokenizer.encode(text[:cut]), tokenizer.encode(text[cut:])
    encoded, supervised = encode(pair(text[:cut], text[cut:]), tokenizer)
    assert encoded.ids[: len(context)] == context and supervised == [*answer, tokenizer.eos_token_id]


def _merges(tokenizer, word, cut):
    context = tokenizer.encode(word[:cut])
    return tokenizer.encode(word)[: len(context)] != context


def test_written_bos_is_not_doubled(bos_tokenizer):
    encoded, _ = encode(pair(BEGIN + PROMPT, ANSWER), bos_tokenizer)
    assert encoded.ids.count(bos_tokenizer.bos_token_id) == 1


def test_first_token_carries_no_loss(tokenizer, bos_tokenizer):
    text = Rendered((Segment("", False), Segment("the lazy dog", True)))
    for each in (tokenizer, bos_tokenizer):
        encoded, supervised = encode(text, each)
        assert not encoded.supervised[0] and all(encoded.supervised[1:])
    encoded, supervised = encode(pair(PROMPT, ANSWER), tokenizer, supervise="all")
    assert not encoded.supervised[0] and all(encoded.supervised[1:])


def chat(tokenizer, *turns):
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": text} for i, text in enumerate(turns)]
    return Renderer("toy", task_config(format="messages"), tokenizer)({"messages": messages}, WHERE)


def test_chat_ends_once_and_both_ends_are_learned(tokenizer):
    encoded, supervised = encode(chat(tokenizer, "1 + 1?", "2", "And?", "3"), tokenizer)
    eos = tokenizer.eos_token_id
    assert encoded.ids[-1] == eos and encoded.ids[-2] != eos
    newline = tokenizer.encode("\n")
    assert supervised == [*tokenizer.encode("2"), eos, *newline, *tokenizer.encode("3"), eos]


def test_chat_without_a_final_end_gets_one():
    tokenizer = make_tokenizer(
        chat_template="{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    encoded, supervised = encode(chat(tokenizer, "1 + 1?", "2"), tokenizer)
    assert supervised == [*tokenizer.encode("2"), tokenizer.eos_token_id]
    assert encoded.ids.count(tokenizer.eos_token_id) == 1


def test_template_that_marks_the_assistant_agrees_with_prefixes(tokenizer):
    marking = make_tokenizer(
        chat_template="{% for m in messages %}{{ '<|' + m['role'] + '|>' }}{% if m['role'] == 'assistant' %}"
        "{% generation %}{{ m['content'] }}{% endgeneration %}{{ '<|end|>' }}\n{% else %}{{ m['content'] }}<|end|>\n"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    turns = ("1 + 1?", "2 apples", "And?", "3")
    marked, supervised = encode(chat(marking, *turns), marking)
    plain, _ = encode(chat(tokenizer, *turns), tokenizer)
    assert marked.ids == plain.ids
    eos = marking.eos_token_id
    assert supervised == [*marking.encode("2 apples"), eos, *marking.encode("3"), eos]  # the ends are learned too
    assert marking.convert_tokens_to_ids(ASSISTANT) in marked.ids


@pytest.mark.parametrize("begin", [False, True])
def test_truncation_cuts_the_prompt_from_the_left(begin):
    tokenizer = make_tokenizer(begin=begin)
    full, learned = encode(pair(PROMPT, ANSWER), tokenizer)
    short, kept = encode(pair(PROMPT, ANSWER), tokenizer, max_length=len(full.ids) - 3)
    assert short.truncated and not full.truncated and kept == learned
    assert short.ids == (full.ids[:1] + full.ids[4:] if begin else full.ids[3:])


@pytest.mark.parametrize("begin", [False, True])
@pytest.mark.parametrize("prompt", [PROMPT, ""])
def test_truncation_at_every_length(begin, prompt):
    tokenizer = make_tokenizer(begin=begin)
    full, learned = encode(pair(prompt, ANSWER), tokenizer)
    for max_length in range(2, len(full.ids) + 1):
        short, kept = encode(pair(prompt, ANSWER), tokenizer, max_length=max_length)
        context = 1 if begin or prompt else 0
        # the answer's first tokens, as many as fit behind one token of context
        assert len(short.ids) == max_length and kept == learned[: max_length - (context or 1)]
        assert not short.supervised[0]
        assert not begin or short.ids[0] == tokenizer.bos_token_id


def test_a_cut_answer_does_not_end(tokenizer):
    short, supervised = encode(pair(PROMPT, ANSWER), tokenizer, max_length=4)
    assert tokenizer.eos_token_id not in short.ids and len(supervised) == 3


def test_truncation_with_all_supervised_keeps_the_answer(tokenizer):
    full, _ = encode(pair(PROMPT, ANSWER), tokenizer, supervise="all")
    short, _ = encode(pair(PROMPT, ANSWER), tokenizer, supervise="all", max_length=len(full.ids) - 2)
    assert short.ids == full.ids[2:]


def test_no_supervised_token_is_an_error_that_names_the_line(tokenizer):
    for text in (f"1 + 1{END}", "1 + 1"):  # with the end that the template wrote, and with ours
        ids = tokenizer.encode(text)
        nothing = Rendered((), special=False, encoded=(ids, [False] * len(ids)))
        with pytest.raises(DataError, match=f"{WHERE}: no token of this example carries loss"):
            encode(nothing, tokenizer)


def test_tokenizer_without_an_end():
    from copy import deepcopy

    tokenizer = deepcopy(make_tokenizer())
    tokenizer.eos_token = None
    with pytest.raises(ConfigError, match="no end-of-sequence token"):
        Encoder(tokenizer, max_length=8)
