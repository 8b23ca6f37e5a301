"""Rows -> text: each format, and a line naming file and row for each way in which a row does not fit."""

import pytest

from loramoe_train.data.templates import Renderer
from loramoe_train.errors import ConfigError, DataError
from tests.conftest import make_tokenizer
from tests.data.helpers import task_config

WHERE = "toy.jsonl:7"


def render(row, tokenizer=None, **task):
    rendered = Renderer("toy", task_config(**task), tokenizer)(row, WHERE)
    return [(segment.text, segment.supervised) for segment in rendered.segments]


def test_prompt_answer_keeps_every_character():
    task = {"prompt": "{{q}}\n[BEGIN]\n", "answer": " {{ ['no', 'yes'][label] }}"}
    row = {"q": "a\r\nb <&> ", "label": 1}
    assert render(row, **task) == [("a\r\nb <&> \n[BEGIN]\n", False), (" yes", True)]


def test_alpaca_with_and_without_input():
    row = {"instruction": "Add.", "input": "1 2", "output": "3"}
    prompt = "### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n"
    assert render(row, format="alpaca") == [(prompt, False), ("3", True)]
    for nothing in ({}, {"input": ""}, {"input": None}):
        without = {"instruction": "Add.", "output": "3"} | nothing
        assert render(without, format="alpaca")[0][0] == "### Instruction:\nAdd.\n\n### Response:\n"


def test_columns_can_be_renamed():
    row = {"task": "Add.", "result": "3"}
    columns = {"instruction": "task", "output": "result"}
    assert render(row, format="alpaca", columns=columns)[1] == ("3", True)
    assert render({"body": "hello"}, format="text", columns={"text": "body"}) == [("", False), ("hello", True)]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"qestion": "x", "a": "y"}, "has no column 'question', which data.definitions.toy.prompt uses; did you mean"),
        ({"question": None, "a": "y"}, "column 'question' is null, but data.definitions.toy.prompt prints it"),
        ({"question": "x", "a": float("nan")}, "a value is null, but data.definitions.toy.answer prints it"),
        ({"question": "x", "a": ""}, "nothing to learn: the answer of task toy is empty"),
        ({"question": "x", "a": "\ud83d"}, "holds half of a surrogate pair (\\ud83d), which is not text"),
        ({"question": "x", "a": " \n"}, "nothing to learn: the answer of task toy is empty"),
    ],
)
def test_rows_that_do_not_fit(row, message):
    with pytest.raises(DataError) as caught:
        render(row, prompt="{{question}}", answer=" {{a}}")
    assert str(caught.value).startswith(f"{WHERE}: {message}") and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("answer", "kind", "message"),
    [
        (
            "{{ choices.text[0] }}",
            DataError,
            "'dict object' has no attribute 'text', which data.definitions.toy.answer uses",
        ),
        ("{{ ['a', 'b'][n] }}", DataError, "list object has no element 5"),
        ("{{ choices.x.index('q') }}", DataError, "fails on this row (ValueError: "),
        ("{{ 1 // (n - 5) }}", DataError, "fails on this row (ZeroDivisionError: "),
        ("{{ n.__class__.__mro__ }}", ConfigError, "not allowed in a template"),
        ("{{ choices.update({'x': 1}) }}", ConfigError, "not allowed in a template"),
        ("{{ n }}{{ none }}", DataError, "a value is null, but data.definitions.toy.answer prints it"),
        ("{{ n ", ConfigError, "data.definitions.toy.answer: not a jinja template"),
        ("{n}", ConfigError, "data.definitions.toy.answer='{n}' uses no column; write columns as {{ column }}"),
    ],
)
def test_templates_that_fail(answer, kind, message):
    with pytest.raises(kind) as caught:
        render({"choices": {"x": ["y"]}, "n": 5}, prompt="{{n}}", answer=answer)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ({"prompt": "{{q}}"}, "data.definitions.toy.answer is missing"),
        ({"answer": "{{q}}"}, "data.definitions.toy.prompt is missing"),
        ({"format": "text", "prompt": "{{q}}"}, "data.definitions.toy.prompt is set, but format text reads columns"),
        ({"format": "alpaca", "columns": {"inputs": "x"}}, "has no such column; did you mean 'input'?"),
        ({"prompt": "{{q}}", "answer": "{{a}}", "columns": {"q": "x"}}, "columns.q: format prompt_answer has no such"),
    ],
)
def test_keys_that_do_not_fit_the_format(task, message):
    with pytest.raises(ConfigError, match=message):
        Renderer("toy", task_config(**task), None)


@pytest.mark.parametrize(
    ("format", "row", "message"),
    [
        ("text", {"txt": "x"}, "has no column 'text' .role text of data.definitions.toy.; did you mean 'txt'?"),
        ("text", {"text": None}, "column 'text' is null"),
        ("text", {"text": 3}, "column 'text' is int, expected text"),
        ("text", {"text": ""}, "nothing to learn"),
        ("alpaca", {"instruction": "x", "output": None}, "column 'output' is null"),
    ],
)
def test_columns_that_do_not_fit(format, row, message):
    with pytest.raises(DataError, match=f"{WHERE}: {message}"):
        render(row, format=format)


CHAT = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "1 + 1?"},
    {"role": "assistant", "content": "2"},
    {"role": "user", "content": "And + 1?"},
    {"role": "assistant", "content": "3"},
]


def test_messages_supervise_assistant_turns_only(tokenizer):
    segments = render({"messages": [*CHAT, {"role": "user", "content": "unanswered"}]}, tokenizer, format="messages")
    assert segments == [
        ("<|system|>Be short.<|end|>\n<|user|>1 + 1?<|end|>\n<|assistant|>", False),
        ("2<|end|>\n", True),
        ("<|user|>And + 1?<|end|>\n<|assistant|>", False),
        ("3<|end|>\n", True),
    ]


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "must be a non-empty list of messages"),
        ("hello", "must be a non-empty list of messages"),
        ([{"role": "user"}], "message 1 of 'messages' must be an object with role and content"),
        ([{"role": "asistant", "content": "x"}], "has role 'asistant'; did you mean 'assistant'?"),
        ([{"role": "user", "content": None}], "message 1 of 'messages' has content that is not text"),
        ([{"role": "user", "content": "x"}], "has no assistant message"),
        ([CHAT[1], {"role": "assistant", "content": " "}], "the assistant says nothing"),
    ],
)
def test_bad_conversations(tokenizer, messages, message):
    with pytest.raises(DataError) as caught:
        render({"messages": messages}, tokenizer, format="messages")
    assert str(caught.value).startswith(WHERE) and message in str(caught.value)


def test_tokenizer_without_chat_template():
    with pytest.raises(ConfigError, match="the model's tokenizer has no chat template"):
        Renderer("toy", task_config(format="messages"), make_tokenizer(chat_template=None))


def test_template_that_refuses_a_conversation():
    refuses = make_tokenizer(chat_template="{{ raise_exception('roles must alternate') }}")
    with pytest.raises(DataError, match=f"{WHERE}: the tokenizer's chat template refuses .*roles must alternate"):
        render({"messages": CHAT}, refuses, format="messages")


def test_template_that_rewrites_earlier_turns():
    # as reasoning models do: the last turn is written differently from the ones before
    rewriting = make_tokenizer(
        chat_template="{% for m in messages %}{{ m['role'] + ':' + ('think ' if loop.last else '') + m['content'] }}\n"
        "{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
    )
    with pytest.raises(ConfigError, match="chat template rewrites earlier turns"):
        render({"messages": CHAT}, rewriting, format="messages")
