"""Odd files, each either read exactly or refused by file and line: from the file to the text of the batch.

`test_fuzz.py` tries what nobody thought of.
"""

import gzip
import json
from pathlib import Path

import pytest

from loramoe_train.data.build import build_mixture
from loramoe_train.data.lines import MAX_DEPTH, JsonLines
from loramoe_train.data.stage import MixtureStage
from loramoe_train.errors import DataError
from loramoe_train.schema.data import DataConfig, SamplingConfig
from tests.conftest import END
from tests.data.helpers import write_lines

ROW = b'{"q": "1", "a": "x"}\n'
PLAIN = [("1", "x")]


def mixture_of(path: Path, tokenizer, **task):
    """A mixture of one task that reads `path`."""
    task = {"prompt": "{{q}}|", "answer": "{{a}}"} | task if task.get("format") is None else task
    definition = {"source": {"files": {"train": path.name}}} | task
    plain = {"root": str(path.parent), "tasks": ["odd"], "definitions": {"odd": definition}, "cache_dir": None}
    config = DataConfig.model_validate(plain | {"validation_examples": 0, "max_length": 4096})
    return build_mixture(config, tokenizer)


def texts(mixture, tokenizer) -> list[str]:
    """What the model is shown of every row, in the order of the file, out of batches of two."""
    plan = mixture.plan(SamplingConfig(block=len(mixture.tasks[0])))
    stage = MixtureStage(mixture, plan, batch_size=2, micro_batch_size=2)
    found = {}
    for step in stage.steps(start=0, stop=-(-len(mixture.tasks[0]) // 2)):
        for batch in step:
            for name, ids, valid in zip(batch.example_ids, batch.input_ids, batch.valid, strict=True):
                found[int(name.rpartition(":")[2])] = tokenizer.decode(
                    ids[valid].tolist(), clean_up_tokenization_spaces=False
                )
    return [found[row] for row in sorted(found)]


def rows(*pairs: tuple[str, str], **changes) -> bytes:
    return "".join(json.dumps({"q": q, "a": a} | changes, ensure_ascii=False) + "\n" for q, a in pairs).encode()


ODD_TEXTS = {
    "combining": ("e\u0301 \u00e9 \u1100\u1161", "\u0041\u030a"),  # neither composed nor decomposed on the way
    "right to left": ("\u0645\u0631\u062d\u0628\u0627 \u05e9\u05dc\u05d5\u05dd \u202eabc\u202c", "\u05d0"),
    "emoji": ("\U0001f469\u200d\U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea \u2764\ufe0f", "\U0001f600"),
    "line separators": ("a\u2028b\u2029c\u0085d\u000be\u000cf", "\u2028x"),  # no ends of lines to anybody here
    "odd spaces": ("\u00a0a\u3000b\u200b\ufeff", "x"),
    "noncharacters": ("\ufffe\uffff\U0010ffff", "x"),
    "controls": ("\u0000\u0001\u001b[2J\u007f", "x\u0000"),
    "ends of lines": ("a\r\nb\rc\nd", "x\r\ny"),
    "template marks": ("{{ q }} {% raw %} ${oc.env:HOME}", "{{ a }}"),
    "special tokens": ("\ufffd <|unknown|> </s>", "[PAD]"),
}
READ = {
    "empty lines": (b"\n  \n" + ROW + b"\t\n\r\n\n" + ROW + b"\n", PLAIN * 2),
    "BOM": (b"\xef\xbb\xbf" + ROW * 2, PLAIN * 2),
    "BOM on an empty line": (b"\xef\xbb\xbf\n" + ROW * 2, PLAIN * 2),
    "CRLF": (ROW.replace(b"\n", b"\r\n") * 2, PLAIN * 2),
    "no last newline": (ROW + ROW[:-1], PLAIN * 2),
    "no last newline, CR": (ROW + ROW[:-1] + b"\r", PLAIN * 2),
    "duplicate ids and rows": (
        rows(("1", "x"), ("2", "y"), ("1", "x"), id="same"),
        [("1", "x"), ("2", "y"), ("1", "x")],
    ),
    "null elsewhere": (rows(("1", "x"), ("1", "x"), b=None, c=[None, {"d": float("nan")}]), PLAIN * 2),
    "another type in each row": (b'{"q": 1, "a": "x"}\n{"q": 1.5, "a": true}\n', [("1", "x"), ("1.5", "True")]),
    "huge integer": (
        b'{"q": 123456789012345678901234567890, "a": "x"}\n' * 2,
        [("123456789012345678901234567890", "x")] * 2,
    ),
    "date stays text": (b'{"q": "2020-01-01", "a": "x"}\n' * 2, [("2020-01-01", "x")] * 2),
    "nested, printed": (b'{"q": {"b": [1, "c"]}, "a": "x"}\n' * 2, [("{'b': [1, 'c']}", "x")] * 2),
    "nested as deep as can be": (
        b'{"q": "1", "a": "x", "b": ' + b"[" * (MAX_DEPTH - 1) + b"]" * (MAX_DEPTH - 1) + b"}\n" + ROW,
        PLAIN * 2,
    ),
    "many brackets in a text": (rows(("[{" * 300, "x")) * 2, [("[{" * 300, "x")] * 2),
    "escaped pair": (b'{"q": "\\ud83d\\ude00", "a": "x"}\n' * 2, [("\U0001f600", "x")] * 2),
    "10 MB in another column": (rows(("1", "x"), b="y" * 10_000_000) + ROW, PLAIN * 2),
    **{name: (rows(pair) * 2, [pair] * 2) for name, pair in ODD_TEXTS.items()},
}
REFUSED = {
    "lone CR": (ROW.replace(b"\n", b"\r") * 2, 1, "Extra data"),
    "U+2028 between objects": (ROW + ROW[:-1] + "\u2028".encode() + ROW, 2, "Extra data"),
    "invalid UTF-8": (ROW + b'{"q": "\xc3\x28", "a": "x"}\n', 2, "byte 8 of the line is not UTF-8"),
    "surrogate in UTF-8": (ROW + b'{"q": "\xed\xa0\x80", "a": "x"}\n', 2, "not UTF-8"),
    "Latin-1": (ROW + '{"q": "é", "a": "x"}\n'.encode("latin-1"), 2, "not UTF-8"),
    "UTF-16": ((ROW * 2).decode().encode("utf-16"), 1, "not UTF-8"),
    "NUL in a text": (ROW + b'{"q": "\x00", "a": "x"}\n', 2, "control character"),
    "NUL bytes at the end": (ROW + b"\x00" * 4096, 2, "not a JSON object"),
    "tab in a text": (ROW + b'{"q": "\t", "a": "x"}\n', 2, "control character"),
    "null row": (ROW + b"\nnull\n", 3, "is null"),
    "list": (ROW + b"[1]\n", 2, "is a list"),
    "text": (ROW + b'"x"\n', 2, "is a string"),
    "number": (ROW + b"12\n", 2, "is a number"),
    "all in one list": (b'[{"q": "1", "a": "x"}]\n', 1, "is a list"),
    "cut short": (ROW + ROW[:-4], 2, "not a JSON object"),
    "single quotes": (ROW + b"{'q': 1}\n", 2, "not a JSON object"),
    "trailing comma": (ROW + b'{"q": "1", "a": "x",}\n', 2, "not a JSON object"),
    "null printed": (ROW + b'{"q": null, "a": "x"}\n', 2, "column 'q' is null"),
    "null inside what is printed": (ROW + b'{"q": ["b", {"c": null}], "a": "x"}\n', 2, "a value is null"),
    "NaN printed": (ROW + b'{"q": NaN, "a": "x"}\n', 2, "a value is null"),
    "Infinity printed": (ROW + b'{"q": [-Infinity], "a": "x"}\n', 2, "a value is infinite"),
    "a number that is too large": (ROW + b'{"q": 1e999, "a": "x"}\n', 2, "a value is infinite"),
    "5,000 digits": (ROW + b'{"q": ' + b"1" * 5000 + b', "a": "x"}\n', 2, "a number of too many digits"),
    "duplicate keys": (ROW + b'{"q": "1", "a": "x", "q": "2"}\n', 2, "the key 'q' stands twice"),
    "duplicate keys inside": (ROW + b'{"q": "1", "a": "x", "b": [{"c": 1, "c": 1}]}\n', 2, "the key 'c' stands twice"),
    "nested too deeply": (ROW + b'{"q": ' + b"[" * MAX_DEPTH + b"]" * MAX_DEPTH + b"}\n", 2, "nested too deeply"),
    "nested beyond parsing": (ROW + b'{"q": ' + b"[" * 100_000 + b"\n", 2, "nested too deeply"),
    "half a surrogate pair": (ROW + b'{"q": "\\ud83d", "a": "x"}\n', 2, "half of a surrogate pair (\\ud83d)"),
    "halves in the wrong order": (
        ROW + b'{"q": "1", "a": "\\ude00\\ud83d"}\n',
        2,
        "half of a surrogate pair (\\ude00)",
    ),
    "no such column": (ROW + b'{"q\\ud83d": "1\\n", "a": "x"}\n', 2, "has no column 'q'"),
    "a column that clears the screen": (ROW + b'{"\\u001b[2J\\n\\u202e": "1", "a": "x"}\n', 2, "has no column 'q'"),
    "nothing to learn": (ROW + rows(("1", "\u2003\n")), 2, "nothing to learn"),
}


def written(folder: Path, name: str, content: bytes) -> Path:
    path = folder / name
    path.write_bytes(gzip.compress(content, 1) if name.endswith(".gz") else content)
    return path


@pytest.mark.parametrize("name", ["odd.jsonl", "odd.jsonl.gz"])
@pytest.mark.parametrize("case", READ)
def test_read_exactly(case, name, tmp_path, tokenizer):
    content, expected = READ[case]
    path = written(tmp_path, name, content)
    assert texts(mixture_of(path, tokenizer), tokenizer) == [f"{q}|{a}{END}" for q, a in expected]


def refusal(path: Path, tokenizer, **task) -> str:
    """What the file is refused with: one line that a terminal may be shown."""
    with pytest.raises(DataError) as caught:
        mixture_of(path, tokenizer, **task)
    message = str(caught.value)
    assert message.isprintable() and len(message) < 600, message
    return message


@pytest.mark.parametrize("name", ["odd.jsonl", "odd.jsonl.gz"])
@pytest.mark.parametrize("case", REFUSED)
def test_refused_by_file_and_line(case, name, tmp_path, tokenizer):
    content, line, words = REFUSED[case]
    path = written(tmp_path, name, content)
    message = refusal(path, tokenizer)
    assert message.startswith(f"{path}:{line}: ") and words in message


ITEM_REFUSED = {
    "nested too deeply": (
        b'[{"q": "1", "a": "x"}, {"q": ' + b"[" * MAX_DEPTH + b"]" * MAX_DEPTH + b"}]",
        "(item 2): is nested",
    ),
    "nested beyond parsing": (b"[" * 100_000, "nested too deeply"),
    "duplicate keys": (b'[{"q": 1, "q": 2}]', "the key 'q' stands twice"),
    "5,000 digits": (b"[" + b"1" * 5000 + b"]", "too many digits"),
    "half a surrogate pair": (b'[{"q": "\\ud83d", "a": "x"}]', "(item 1): holds half of a surrogate pair"),
    "invalid UTF-8": (b'[{"q": "\xff"}]', "not UTF-8"),
}


@pytest.mark.parametrize("case", ITEM_REFUSED)
def test_a_list_is_refused_by_its_item(case, tmp_path, tokenizer):
    content, words = ITEM_REFUSED[case]
    path = written(tmp_path, "odd.json", content)
    message = refusal(path, tokenizer)
    assert message.startswith(str(path)) and words in message


def test_columns_with_odd_names(tmp_path, tokenizer):
    path = write_lines(tmp_path / "odd.jsonl", [{"größe": "1", "مرحبا": "x"}, {"größe": "2", "مرحبا": "y"}])
    made = mixture_of(path, tokenizer, prompt="{{größe}}|", answer="{{مرحبا}}")
    assert texts(made, tokenizer) == [f"1|x{END}", f"2|y{END}"]
    columns = {"text": "a b\u2028\U0001f600"}
    path = write_lines(tmp_path / "odd.jsonl", [{columns["text"]: "abc"}] * 2)
    assert texts(mixture_of(path, tokenizer, format="text", columns=columns), tokenizer) == [f"abc{END}"] * 2


@pytest.mark.parametrize("role", ["user", "assistant"])
def test_half_a_surrogate_pair_in_a_conversation(role, tmp_path, tokenizer):
    said = {"user": "a", "assistant": "b"} | {role: "c\ud800"}
    row = {"messages": [{"role": name, "content": text} for name, text in said.items()]}
    path = write_lines(tmp_path / "odd.jsonl", [row])
    assert refusal(path, tokenizer, format="messages").startswith(f"{path}:1: holds half of a surrogate pair (\\ud800)")


def test_a_template_that_calls_itself(tmp_path, tokenizer):
    path = write_lines(tmp_path / "odd.jsonl", [{"q": "1", "a": "x"}])
    endless = "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(q) }}"
    assert "RecursionError" in refusal(path, tokenizer, prompt=endless)


def test_parquet_with_nulls_and_nested_values(tmp_path, tokenizer):
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path / "odd.parquet"
    columns = {"q": ["1\u2028", None, "3"], "a": ["x", "y", "z"], "b": [[{"c": None}], None, []]}
    pq.write_table(pa.table(columns), path)
    message = refusal(path, tokenizer)
    assert message.startswith(f"{path} (row 2): column 'q' is null")
    assert "(row 1): a value is null" in refusal(path, tokenizer, prompt="{{b}}")
    definition = {"source": {"files": {"train": path.name}, "keep": "q is not none"}}
    assert texts(mixture_of(path, tokenizer, **definition), tokenizer) == [f"1\u2028|x{END}", f"3|z{END}"]


def test_what_a_parquet_file_names_is_not_opened(tmp_path, tokenizer):
    """An image column may hold a path or an address, also inside a list; decoding a row would open it."""
    from datasets import Dataset, Features, Image, List, Value

    outside = tmp_path / "private.png"
    outside.write_bytes(b"no image at all")
    features = Features({"q": Value("string"), "a": Value("string"), "b": List(Image()), "c": Image()})
    picture = {"bytes": None, "path": str(outside)}
    rows = [{"q": "1", "a": "x", "b": [picture], "c": picture}] * 2
    path = tmp_path / "odd.parquet"
    Dataset.from_list(rows, features=features).to_parquet(str(path))
    assert texts(mixture_of(path, tokenizer), tokenizer) == [f"1|x{END}"] * 2
    assert mixture_of(path, tokenizer).tasks[0].rows[0]["b"] == [picture]


def test_a_file_that_changes_meanwhile(tmp_path, tokenizer):
    path = tmp_path / "odd.jsonl"
    path.write_bytes(ROW * 1000)
    mixture = mixture_of(path, tokenizer)
    path.write_bytes(ROW * 3)  # in place, as an editor or a download may
    with pytest.raises(DataError, match=f"{path}:901: the file was changed while it was in use"):
        mixture.example(0, 900)


def test_a_line_without_end(tmp_path, monkeypatch):
    monkeypatch.setattr("loramoe_train.data.lines.MAX_LINE", 1 << 20)
    path = tmp_path / "odd.jsonl"
    path.write_bytes(ROW + b'{"q": "' + b"x" * (1 << 21) + b'"}\n')
    with pytest.raises(DataError, match=f"{path}:2: the line is longer than 1 MiB"):
        JsonLines(path)


@pytest.mark.nightly
def test_a_prompt_of_10_mb(tmp_path, tokenizer):
    path = written(tmp_path, "odd.jsonl", rows(("the dog " * 1_250_000, "x")) + ROW)
    mixture = mixture_of(path, tokenizer)
    example = mixture.example(0, 0)
    assert len(example) == 4096 and tokenizer.decode(example.ids[-5:].tolist()).endswith(f"dog |x{END}")
    assert mixture.truncated == {"odd": 1}
