"""Mixtures: indices, validation without a validation split, limits, memo, and errors before training starts."""

import numpy as np
import pytest

from loramoe_train.data import mixture as mixture_module
from loramoe_train.data.build import build_mixture, task_rows
from loramoe_train.errors import ConfigError, DataError, MissingFileError
from tests.data.helpers import qa_config, qa_mixture, qa_rows, qa_task, write_lines


def questions(mixture, task=0):
    rows = mixture.tasks[task].rows
    return [rows[i]["q"].split()[1] for i in range(len(rows))]


def test_examples_carry_names_tasks_and_domains(tmp_path, tokenizer):
    definitions = {
        "one": qa_task("one"),
        "easy": qa_task("easy", domain="arc"),
        "hard": qa_task("hard", domain="arc"),
    }
    mixture = qa_mixture(tmp_path, {"one": 3, "easy": 4, "hard": 5}, tokenizer, definitions=definitions)
    assert mixture.task_names == ("one", "easy", "hard") and mixture.domain_names == ("one", "arc")
    assert mixture.domain_of == (0, 1, 1) and mixture.sizes == {"one": 3, "easy": 4, "hard": 5}
    example = mixture.example(2, 4)
    assert (example.name, example.task, example.domain) == ("hard:train:4", 2, 1)
    text = tokenizer.decode(example.ids.tolist(), clean_up_tokenization_spaces=False)
    assert text.startswith("Question: hard 4 ") and text.endswith("<|end|>")
    learned = tokenizer.decode(example.ids[example.supervised].tolist(), clean_up_tokenization_spaces=False)
    assert learned == " " + qa_rows("hard", 5)[4]["a"] + "<|end|>"


def test_row_numbers_are_those_of_the_file(tmp_path, tokenizer):
    task = qa_task("one")
    task["source"]["keep"] = "q.split()[1] | int is odd"
    mixture = qa_mixture(tmp_path, {"one": 6}, tokenizer, definitions={"one": task})
    assert [mixture.example(0, i).name for i in range(3)] == ["one:train:1", "one:train:3", "one:train:5"]


def test_validation_split(tmp_path, tokenizer):
    config = qa_config(
        tmp_path, {"one": 20}, definitions={"one": qa_task("one", validation=True)}, validation_examples=4
    )
    write_lines(tmp_path / "one" / "validation.jsonl", qa_rows("held", 10))
    assert len(build_mixture(config, tokenizer).tasks[0]) == 20
    validation = build_mixture(config, tokenizer, split="validation")
    assert questions(validation) == ["0", "2", "5", "7"]  # at equal distances
    assert validation.example(0, 1).name == "one:validation:2" and validation.notes == ()


def test_without_validation_split_the_last_train_rows_are_held_out(tmp_path, tokenizer):
    config = qa_config(tmp_path, {"one": 40, "small": 5}, validation_examples=3)
    train = build_mixture(config, tokenizer)
    validation = build_mixture(config, tokenizer, split="validation")
    assert questions(train) + questions(validation) == [str(i) for i in range(40)]
    assert questions(validation) == ["37", "38", "39"] and validation.example(0, 0).name == "one:train:37"
    assert "the last 3 of its train rows are held out" in train.notes[0]
    assert "measured on the last 3 of its train rows" in validation.notes[0]
    # a tenth of five rows is none, but the task keeps its index
    assert train.task_names == validation.task_names and validation.sizes == {"one": 3, "small": 0}


def test_no_validation_wanted(tmp_path, tokenizer):
    config = qa_config(tmp_path, {"one": 40}, validation_examples=0)
    assert build_mixture(config, tokenizer).sizes == {"one": 40}
    assert build_mixture(config, tokenizer, split="validation").sizes == {"one": 0}


def test_max_examples(tmp_path, tokenizer):
    config = qa_config(tmp_path, {"one": 40}, max_examples=7, validation_examples=2)
    assert questions(build_mixture(config, tokenizer)) == [str(i * 38 // 7) for i in range(7)]
    assert questions(build_mixture(config, tokenizer, split="validation")) == ["38", "39"]
    config = qa_config(tmp_path, {"one": 40, "two": 40}, max_examples={"two": 7}, validation_examples=0)
    assert build_mixture(config, tokenizer).sizes == {"one": 40, "two": 7}


def test_planning_needs_no_tokenizer(tmp_path):
    rows, split, notes = task_rows(qa_config(tmp_path, {"one": 40}, validation_examples=3), "one", "train")
    assert (len(rows), split, len(notes)) == (37, "train", 1)


def test_truncated_examples_are_counted_per_task(tmp_path, tokenizer):
    mixture = qa_mixture(tmp_path, {"one": 12, "two": 12}, tokenizer, max_length=20)
    lengths = qa_mixture(tmp_path, {"one": 12, "two": 12}, tokenizer, max_length=500)
    for row in range(12):
        mixture.example(0, row)
    expected = sum(len(lengths.example(0, row)) > 20 for row in range(12))
    assert 0 < expected < 12 and mixture.truncated == {"one": expected, "two": 0}


def test_memo_gives_the_same_object_until_it_is_full(tmp_path, tokenizer, monkeypatch):
    mixture = qa_mixture(tmp_path, {"one": 3}, tokenizer)
    assert mixture.example(0, 1) is mixture.example(0, 1)
    monkeypatch.setattr(mixture_module, "MEMO_BYTES", 0)
    assert mixture.example(0, 2) is not mixture.example(0, 2)
    assert np.array_equal(mixture.example(0, 2).ids, mixture.example(0, 2).ids)


def test_max_length_above_the_positions(tmp_path, tokenizer):
    config = qa_config(tmp_path, {"one": 3}, max_length=64)
    with pytest.raises(ConfigError, match="data.max_length=64 exceeds the model's 32 positions; use at most 32"):
        build_mixture(config, tokenizer, max_positions=32)
    build_mixture(config, tokenizer, max_positions=64)


def test_unknown_task(tmp_path, tokenizer):
    config = qa_config(tmp_path, {"one": 3}).model_copy(update={"tasks": ["onne"]})
    with pytest.raises(ConfigError, match="no task is called 'onne'; did you mean 'one'?"):
        build_mixture(config, tokenizer)


def test_missing_validation_file_is_not_silently_replaced(tmp_path, tokenizer):
    config = qa_config(
        tmp_path, {"one": 20}, definitions={"one": qa_task("one", validation=True)}, validation_examples=4
    )
    with pytest.raises(MissingFileError, match="validation.jsonl is missing"):
        build_mixture(config, tokenizer, split="validation")


@pytest.mark.parametrize(("bad", "message"), [({"q": "x", "a": ""}, "nothing to learn"), ({"q": "x"}, "no column 'a'")])
def test_a_bad_row_anywhere_is_found_at_once(tmp_path, tokenizer, bad, message):
    config = qa_config(tmp_path, {"one": 3})
    path = write_lines(tmp_path / "one" / "train.jsonl", [*qa_rows("one", 30), bad])
    with pytest.raises(DataError, match=message) as caught:
        build_mixture(config, tokenizer)
    assert str(caught.value).startswith(f"{path}:31: ")
