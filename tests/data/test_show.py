"""`loramoe-data`: the supervised part is coloured, and the tables hold the right numbers."""

import io

import numpy as np
from rich.console import Console

from loramoe_train.data.build import build_mixture
from loramoe_train.data.show import PROMPT, SUPERVISED, coloured, length_table, sampling_table, show_data
from tests.data.helpers import qa_config, qa_mixture, qa_rows, qa_task, write_lines


def cells(table):
    columns = {str(column.header): list(column.cells) for column in table.columns}
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def test_colour_follows_the_loss(tmp_path, tokenizer):
    mixture = qa_mixture(tmp_path, {"one": 5}, tokenizer)
    row = qa_rows("one", 5)[3]
    text = coloured(mixture.example(0, 3), tokenizer, ids=False)
    parts = [(text.plain[span.start : span.end], str(span.style)) for span in text.spans]
    assert parts == [(f"Question: {row['q']}\nAnswer:", PROMPT), (f" {row['a']}<|end|>", SUPERVISED)]
    numbered = coloured(mixture.example(0, 3), tokenizer, ids=True)
    ids = [int(part.rsplit(":", 1)[1]) for part in numbered.plain.split(" ") if part.rsplit(":", 1)[-1].isdigit()]
    assert ids == mixture.example(0, 3).ids.tolist()


def test_length_table(tmp_path, tokenizer):
    mixture = qa_mixture(tmp_path, {"one": 40, "two": 7}, tokenizer, max_length=24)
    lengths = [len(mixture.example(0, row)) for row in range(40)]
    row = cells(length_table(mixture))[0]
    expected = (np.mean(lengths), np.median(lengths), np.percentile(lengths, 95), max(lengths))
    assert [row[name] for name in ("mean", "median", "p95", "max")] == [f"{number:.0f}" for number in expected]
    assert row["truncated"] == str(mixture.truncated["one"]) and row["truncated"] != "0"
    assert row["loss"].endswith("%") and row["measured"] == "40"


def test_sampling_table(tmp_path, tokenizer):
    mixture = qa_mixture(tmp_path, {"one": 40, "two": 8}, tokenizer)
    config = qa_config(tmp_path, {"one": 40, "two": 8}, sampling={"strategy": "equal"})
    one, two = cells(sampling_table(mixture, config))
    assert (one["share"], one["samples"], one["passes"]) == ("50.0%", "24", "0.60")
    assert (two["samples"], two["passes"]) == ("24", "3.00")


def test_show_data_prints_examples_tables_and_notes(tmp_path, tokenizer):
    out = io.StringIO()
    config = qa_config(tmp_path, {"one": 40, "two": 30}, validation_examples=2)
    show_data(config, tokenizer, 2, False, Console(file=out, width=120, color_system=None))
    text = out.getvalue()
    for expected in ("one:train:1", "two/train.jsonl:2", "Question: two 1 dog", "tokens per example", "held out"):
        assert expected in text
    assert "one:train:2" not in text


def test_brackets_in_the_data_are_not_markup(tmp_path, tokenizer):
    from tests.data.helpers import write_lines

    out = io.StringIO()
    config = qa_config(tmp_path, {"one": 1})
    write_lines(tmp_path / "one" / "train.jsonl", [{"q": "[bold]x[/] [/red]", "a": "[0]"}])
    show_data(config, tokenizer, 1, False, Console(file=out, width=120, color_system=None))
    assert "[bold]x[/] [/red]" in out.getvalue()


def test_a_row_gives_the_terminal_no_orders(tmp_path, tokenizer):
    path = write_lines(tmp_path / "one" / "train.jsonl", [{"q": "\x1b[2Jgone\x07", "a": "\u009b31mred\tb\nc"}])
    config = qa_config(tmp_path, {}, tasks=["one"], definitions={"one": qa_task("one")})
    assert path.is_file()
    shown = coloured(build_mixture(config, tokenizer).example(0, 0), tokenizer, ids=False).plain
    assert "\\x1b[2Jgone\\x07" in shown and "\\x9b31mred\tb\nc" in shown
