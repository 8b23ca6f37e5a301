"""Random bytes, columns and values through the way of a user's file: source, template, tokens, batches.

Whatever comes, it is trained on or refused with an error of ours, in one line that names the file. The short form tries
the same inputs every time; `--nightly` tries new ones, many more.
"""

import gzip
import json
from datetime import timedelta

import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from loramoe_train.data.build import build_mixture
from loramoe_train.data.stage import MixtureStage
from loramoe_train.errors import LoramoeError
from loramoe_train.schema.data import DataConfig, SamplingConfig
from tests.conftest import make_tokenizer

COMMON = {"deadline": timedelta(seconds=60), "suppress_health_check": list(HealthCheck), "database": None}
MARKED = "{% for m in messages %}{% generation %}{{ m['content'] }}{% endgeneration %}<|end|>{% endfor %}"

NAMES = st.sampled_from(["q", "a", "messages", "instruction", "input", "output", "text", "id", "role", "content"])
TEXTS = st.text(st.characters(exclude_categories=()), max_size=12)  # halves of surrogate pairs too
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.builds(lambda digits: -(10**digits), st.sampled_from([30, 400, 4299])),
    st.floats(),
    TEXTS,
    st.sampled_from(["", " ", "\u2028", "\x00", "<|end|>", "<|assistant|>", "{{ q }}", "1"]),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES | TEXTS, inner, max_size=3),
    max_leaves=6,
)
MESSAGES = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "system", "tool"]), "content": TEXTS}),
    max_size=4,
)
ROWS = st.one_of(
    st.dictionaries(NAMES | TEXTS, VALUES, max_size=4),
    st.fixed_dictionaries({"q": VALUES, "a": VALUES}),
    st.fixed_dictionaries({"q": TEXTS, "a": TEXTS}, optional={"id": VALUES}),
    st.fixed_dictionaries({"messages": MESSAGES}),
    st.fixed_dictionaries({"instruction": TEXTS, "output": TEXTS}, optional={"input": VALUES}),
    VALUES,
)
TEMPLATES = st.sampled_from(
    ["{{q}}", "{{ a }}|", "{{q.a}}", "{{q[0]}}", "{{q|length}}", "{{q|tojson}}", "{{q + a}}", "{{q - 1}}", "{{q / a}}"]
    + ["{% for x in q %}{{x}}{% endfor %}", "{{q|join(', ')}}", "{{q|int}}", "{{'%d' % q}}", "{{q.format(a)}}"]
    + ["{{['no', 'yes'][q]}}", "{{q|upper|trim}}", "{% if q %}{{a}}{% endif %}", "{{q|dictsort}}", "{{q|first}}"]
)


@st.composite
def files(draw) -> tuple[str, bytes]:
    """(ending, content): lines of JSON, or a list, as odd as JSON can write them; then perhaps damaged."""
    if draw(st.integers(0, 9)) == 0:
        content = draw(st.binary(max_size=200))
    else:
        plain = draw(st.booleans())
        rows = draw(st.lists(ROWS, min_size=1, max_size=5))
        lines = [json.dumps(row, ensure_ascii=plain).encode("utf-8", "surrogatepass") for row in rows]
        if draw(st.integers(0, 4)) == 0:
            content = b"[" + b",\n".join(lines) + b"]"
        else:
            ends = st.sampled_from([b"\n", b"\n", b"\n", b"\r\n", b"\n\n", b"\r", b"\n \x0c\n", "\u2028".encode(), b""])
            content = b"".join(line + draw(ends) for line in lines)
        if draw(st.integers(0, 9)) == 0:
            content = b"\xef\xbb\xbf" + content
    content = _damaged(draw, content)
    ending = draw(st.sampled_from([".jsonl", ".jsonl", ".json", ".jsonl.gz", ".json.gz"]))
    if ending.endswith(".gz"):
        content = _damaged(draw, gzip.compress(content, 1))
    return ending, content


def _damaged(draw, content: bytes) -> bytes:
    """In one of five cases some bytes are taken out, put in or cut off."""
    if draw(st.integers(0, 4)) or not content:
        return content
    place = draw(st.integers(0, len(content) - 1))
    new = draw(st.binary(max_size=3) | st.sampled_from([b"\x00", b"\xff", b"\n", b'"', b"}", b"[" * 150, b"9" * 5000]))
    return content[:place] + new + (content[place + draw(st.integers(0, 3)) :] if draw(st.booleans()) else b"")


@st.composite
def tasks(draw) -> dict:
    kind = draw(st.sampled_from(["prompt_answer", "prompt_answer", "messages", "alpaca", "text"]))
    task = {"format": kind}
    if kind == "prompt_answer":
        task |= {"prompt": draw(TEMPLATES), "answer": draw(TEMPLATES)}
    if kind == "text":
        task |= {"columns": {"text": draw(NAMES | TEXTS)}}
    return task


TOKENIZERS = {
    "plain": make_tokenizer(),
    "begin": make_tokenizer(begin=True),
    "marked": make_tokenizer(chat_template=MARKED),
}


def refusal(folder, made: tuple[str, bytes], task: dict, keep: str | None, tokenizer: str, packing: bool) -> str | None:
    """Everything that training does with the file: None if it can be trained on, else what this program says."""
    ending, content = made
    path = folder / f"odd{ending}"
    path.write_bytes(content)
    source = {"files": {"train": path.name}, "keep": keep}
    plain = {"root": str(folder), "tasks": ["odd"], "definitions": {"odd": task | {"source": source}}}
    config = DataConfig.model_validate(plain | {"validation_examples": 0, "max_length": 24, "cache_dir": None})
    try:
        mixture = build_mixture(config, TOKENIZERS[tokenizer])
        plan = mixture.plan(SamplingConfig(block=4))
        stage = MixtureStage(mixture, plan, batch_size=2, micro_batch_size=1, packing=packing, max_length=24)
        for step in stage.steps(start=0, stop=2):
            for batch in step:
                assert batch.num_supervised() > 0 and batch.input_ids.shape == batch.labels.shape
        event(f"{task['format']}: trained on")
        return None
    except LoramoeError as error:
        event(f"{task['format']}: refused")
        return str(error)
    finally:
        path.unlink()


def is_one_line_about_it(message: str | None) -> bool:
    """Of a refusal, if it is one."""
    return message is None or ("odd." in message and message.isprintable() and len(message) < 2000)


INPUTS = dict(
    made=files(),
    task=tasks(),
    keep=st.sampled_from([None, None, None, "q", "q != 1", "a is string", "q > 0", "q in a"]),
    tokenizer=st.sampled_from(sorted(TOKENIZERS)),
    packing=st.booleans(),
)


@settings(max_examples=400, derandomize=True, **COMMON)
@given(**INPUTS)
def test_any_file_is_read_or_refused(tmp_path_factory, **given):
    message = refusal(tmp_path_factory.getbasetemp(), **given)
    assert is_one_line_about_it(message), message


@pytest.mark.nightly
@pytest.mark.parametrize("part", range(10))  # a test may take ten minutes
@settings(max_examples=3_000, **COMMON)
@given(**INPUTS)
def test_very_many_files(tmp_path_factory, part, **given):
    message = refusal(tmp_path_factory.getbasetemp(), **given)
    assert is_one_line_about_it(message), message


def refusal_of_parquet(folder, place: int, new: bytes) -> str | None:
    """The same for a parquet file in which some bytes are others."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = folder / "odd.parquet"
    pq.write_table(pa.table({"q": ["1", None, "abc" * 50], "a": ["x", "y", "z"], "b": [[1], None, [2.5]]}), path)
    content = path.read_bytes()
    place %= len(content)
    path.write_bytes(content[:place] + new + content[place + len(new) :])
    definition = {
        "source": {"files": {"train": path.name}, "keep": "q is not none"},
        "prompt": "{{q}}",
        "answer": "{{a}}",
    }
    plain = {"root": str(folder), "tasks": ["odd"], "definitions": {"odd": definition}, "cache_dir": None}
    config = DataConfig.model_validate(plain | {"validation_examples": 0, "max_length": 24})
    try:
        mixture = build_mixture(config, TOKENIZERS["plain"])
        assert [mixture.example(0, row).name for row in range(len(mixture.tasks[0]))]
        return None
    except LoramoeError as error:
        return str(error)


PARQUET = dict(place=st.integers(0, 4000), new=st.binary(min_size=1, max_size=8))


@settings(max_examples=8, derandomize=True, **COMMON)
@given(**PARQUET)
def test_a_damaged_parquet_file(tmp_path_factory, **given):
    message = refusal_of_parquet(tmp_path_factory.mktemp("parquet"), **given)
    assert is_one_line_about_it(message), message


@pytest.mark.nightly
@settings(max_examples=600, **COMMON)
@given(**PARQUET)
def test_very_many_damaged_parquet_files(tmp_path_factory, **given):
    message = refusal_of_parquet(tmp_path_factory.mktemp("parquet"), **given)
    assert is_one_line_about_it(message), message
