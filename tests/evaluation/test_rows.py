"""Rows of benchmark files: what is wrong with one is told by file and line."""

import gzip
import hashlib

import pytest

from loramoe_train.errors import DataError
from loramoe_train.evaluation.rows import describe_file, read_rows

ROW = b'{"q": "1"}\n'


@pytest.mark.parametrize(
    ("content", "where"),
    [
        (ROW + b'{"q": ' + b"[" * 100_000, ":2: not JSON that can be read"),
        (ROW + b'{"q": ' + b"1" * 5000 + b"}", ":2: not JSON that can be read"),
        (ROW + b'{"q": "\x00"}', ":2: not valid JSON"),
        (ROW + b"[1]", ":2: expected a JSON object"),
        (ROW + b'{"a": 1}', ":2: no column 'q'"),
        (ROW + b'{"q": "\xff"}', " cannot be read"),
        (b"\xef\xbb\xbf" + ROW, ":1: not valid JSON"),
        (b"\n \n", " holds no rows"),
    ],
)
def test_a_bad_row_is_named(content, where, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        read_rows(path, ["q"])
    assert str(caught.value).startswith(f"{path}{where}") and str(caught.value).isprintable()


@pytest.mark.parametrize("value", ["null", '""', "[]", "-1"])
def test_a_hidden_answer_is_named(value, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(f'{{"q": 0}}\n{{"q": false}}\n\n{{"q": {value}}}\n')
    assert len(read_rows(path, ["q"])) == 3
    with pytest.raises(DataError, match=r"rows.jsonl:4: q is .*, so the answer is hidden"):
        read_rows(path, ["q"], answer="q")


@pytest.mark.parametrize("damage", [lambda b: b[:-12], lambda b: b"plain", lambda b: b[:20] + b"\0" * 20])
def test_a_broken_gzip_file(damage, tmp_path):
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(damage(gzip.compress(ROW * 100)))
    with pytest.raises(DataError, match="rows.jsonl.gz cannot be read"):
        read_rows(path, ["q"])


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz"])
def test_a_file_is_described_as_it_lies_there(name, tmp_path):
    content = ROW * 2 + b"\n" + ROW
    path = tmp_path / name
    path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert describe_file(path) == {"file": str(path), "sha256": digest, "rows": 3}
