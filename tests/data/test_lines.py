"""Line index: any row at once, exactly as written, and errors that name file and line."""

import gzip
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loramoe_train.data.build import build_mixture
from loramoe_train.data.lines import JsonArray, JsonLines, read_json
from loramoe_train.errors import DataError
from loramoe_train.schema.data import SamplingConfig
from tests.data.helpers import qa_config, qa_task

JSON_VALUES = st.one_of(st.none(), st.booleans(), st.integers(), st.text(), st.lists(st.integers(), max_size=3))


@settings(max_examples=30, deadline=None)
@given(rows=st.lists(st.dictionaries(st.text(max_size=3), JSON_VALUES, max_size=3), max_size=6), data=st.data())
def test_rows_come_back_exactly(tmp_path_factory, rows, data):
    path = tmp_path_factory.mktemp("lines") / "rows.jsonl"
    ends = [data.draw(st.sampled_from(["\n", "\r\n", "\n\n", "\n  \r\n"])) for _ in rows]
    bom = data.draw(st.sampled_from(["", "\ufeff"]))
    text = bom + "".join(json.dumps(row, ensure_ascii=False) + end for row, end in zip(rows, ends, strict=True))
    path.write_bytes(text.encode())
    read = JsonLines(path)
    assert [read[i] for i in range(len(read))] == rows
    # where: counting newlines in the bytes before the row, the slow way
    for index, row in enumerate(rows):
        line = int(read.where(index).rsplit(":", 1)[1])
        assert json.loads(path.read_bytes().decode("utf-8-sig").split("\n")[line - 1]) == row


def test_types_are_not_unified(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1, "d": "2020-01-01"}\n{"a": 2.5}')  # no newline at the end
    rows = JsonLines(path)
    assert [rows[0], rows[1]] == [{"a": 1, "d": "2020-01-01"}, {"a": 2.5}]
    assert isinstance(rows[0]["a"], int)


@pytest.mark.parametrize(
    ("content", "line", "what"),
    [
        (b'{"a": 1}\n{"a": 2\n{"a": 3}\n', 2, "not a JSON object"),
        (b'{"a": 1}\n\n[1, 2]\n', 3, "is a list"),
        (b'{"a": 1}\nnull\n', 2, "is null"),
        (b'{"a": 1}\r\n{"a": "\xff"}\r\n', 2, "not UTF-8"),
        ('{"a": 1}\n'.encode("utf-16"), 1, "not UTF-8"),
        (b'{"a": 1} {"a": 2}\n', 1, "Extra data"),
        (b'{"a": ' + b"[" * 200_000 + b"\n", 1, "not a JSON object"),
    ],
)
def test_a_bad_line_is_named(tmp_path, content, line, what):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match=what) as caught:
        JsonLines(path)
    assert str(caught.value).startswith(f"{path}:{line}: ")
    assert "\n" not in str(caught.value)


def test_gzip(tmp_path):
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"a": 1}\n') + gzip.compress(b'{"a": 2}\n'))  # two members, as `cat` makes them
    rows = read_json(path)
    assert [rows[i] for i in range(len(rows))] == [{"a": 1}, {"a": 2}]
    assert rows.where(1) == f"{path}:2"


@pytest.mark.parametrize("damage", [lambda b: b[:-12], lambda b: b"plain text", lambda b: b[:20] + b"\0" * 20])
def test_broken_gzip(tmp_path, damage):
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(damage(gzip.compress(b'{"a": 1}\n' * 100)))
    with pytest.raises(DataError, match="not a complete gzip file"):
        read_json(path)


def test_json_file_holds_a_list_or_lines(tmp_path):
    path = tmp_path / "rows.json"
    path.write_bytes(b'\xef\xbb\xbf [\n {"a": 1},\n {"a": 2}]')
    rows = read_json(path)
    assert isinstance(rows, JsonArray) and [rows[0], rows[1]] == [{"a": 1}, {"a": 2}]
    assert rows.where(1) == f"{path} (item 2)"
    path.write_text('{"a": 1}\n')
    assert isinstance(read_json(path), JsonLines)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"a": 1},\n{"a": }]', ":2: not valid JSON"),
        ('[{"a": 1}, 2]', " (item 2): is a number"),
    ],
)
def test_bad_json_list(tmp_path, content, message):
    path = tmp_path / "rows.json"
    path.write_text(content)
    with pytest.raises(DataError) as caught:
        read_json(path)
    assert str(caught.value).startswith(f"{path}{message}")


def traced_peak(call) -> int:
    import tracemalloc

    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_memory_does_not_grow_with_the_rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes((b'{"text": "' + b"x" * 500 + b'"}\n') * 20_000)
    assert traced_peak(lambda: JsonLines(path)) < 600_000  # 16 bytes a row, and a buffer; the file has 10 MB


def test_a_row_costs_a_few_bytes_until_it_is_drawn(tmp_path, tokenizer):
    """Index, selection, marks, and the order in which rows are drawn: numbers in arrays, no object for each row."""
    peaks = []
    for count in (2_000, 12_000):
        path = tmp_path / "rows.jsonl"
        path.write_bytes(b'{"q": "1", "a": "x"}\n' * count)
        task = qa_task("one") | {"source": {"files": {"train": str(path)}, "keep": "q != '2'"}}
        config = qa_config(tmp_path, {}, tasks=["one"], definitions={"one": task})

        def draw(config=config, count=count):
            mixture = build_mixture(config, tokenizer, check=False)
            mixture.plan(SamplingConfig()).slice(count - 64, count)
            mixture.note_truncated([])

        peaks.append(traced_peak(draw))
    assert (peaks[1] - peaks[0]) / 10_000 < 80
