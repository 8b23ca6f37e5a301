"""results.json comes back as it was written, tells a broken file, and reads well on the screen."""

import io
import json
import math
import os

import pytest
from rich.console import Console

from loramoe_train.errors import DataError, MissingFileError
from loramoe_train.evaluation import results
from loramoe_train.evaluation.results import config_hash, read_results, render_table, write_results, write_samples

SCORES = {
    "gsm8k": {
        "base": 0.1,
        "tuned": 0.25,
        "difference": 0.15,
        "base_stderr": 0.03,
        "tuned_stderr": 0.04,
        "difference_stderr": 0.02,
        "p_value": 0.00042,
        "metric": "exact_match,strict-match",
        "n": 100,
        "num_fewshot": 5,
    },
    "cola": {
        "base": 0.7,
        "tuned": 0.65,
        "difference": -0.05,
        "base_stderr": math.nan,
        "tuned_stderr": None,
        "difference_stderr": None,
        "metric": "acc,none",
        "n": 50,
        "num_fewshot": 0,
    },
}


def write(path, **changes):
    arguments = dict(scores=SCORES, skipped={"humaneval": "runs code"}, config={"b": 1, "a": [2]}, seed=3, model="tiny")
    return write_results(path, **{**arguments, "wall_seconds": 12.3456, **changes})


def test_round_trip(tmp_path):
    written = write(tmp_path / "run" / "results.json", extra={"stage": "router"})
    assert read_results(tmp_path / "run") == read_results(tmp_path / "run" / "results.json") == written
    assert written["scores"]["gsm8k"] == SCORES["gsm8k"]
    assert written["scores"]["cola"]["base_stderr"] is None  # not a number is no JSON
    assert (written["seed"], written["model"], written["wall_seconds"], written["stage"]) == (
        3,
        "tiny",
        12.346,
        "router",
    )
    assert written["config_hash"] == config_hash({"a": [2], "b": 1}) != config_hash({"a": [2], "b": 2})
    needed = {"torch", "transformers", "peft", "lm_eval", "datasets", "accelerate", "python", "loramoe_train"}
    assert needed <= written["versions"].keys() and all(written["versions"][name] for name in needed)
    assert os.listdir(tmp_path / "run") == ["results.json"]


def test_an_extra_entry_must_not_replace_one(tmp_path):
    with pytest.raises(ValueError, match="'seed' already"):
        write(tmp_path / "results.json", extra={"seed": 4})


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "results.json"
    write(path)
    before = path.read_text()
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write(path, seed=99)
    assert path.read_text() == before and os.listdir(tmp_path) == ["results.json"]


def test_samples_are_one_document_a_line(tmp_path):
    samples = [{"doc_id": 0, "doc": {"text": "é\n"}, "log_likelihoods": [-1.5, -math.inf]}, {"doc_id": 1}]
    path = write_samples(tmp_path / "samples", "gsm8k", "base", samples)
    assert path.name == "gsm8k.base.jsonl"
    read = [json.loads(line) for line in path.read_text().splitlines()]
    assert read == [{**samples[0], "log_likelihoods": [-1.5, None]}, samples[1]]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ('{"scores": {"gsm8k"', "is not a readable results file"),
        ("[]", "has no 'scores'"),
        ('{"scores": 3}', "has no 'scores'"),
        ('{"scores": {"cola": {"base": null}}}', "scores.cola has no number 'tuned' or 'base'"),
        ('{"scores": {"cola": {"base": 0.5, "tuned": "much"}}}', "scores.cola.tuned is no number"),
        pytest.param("[" * 100_000, "is not a readable results file", id="deep"),
        ('{"scores": {}, "training": 3}', "its 'training' is not what a run writes"),
        ('{"scores": {}, "training": {"stages": [3]}}', "its 'training' is not what a run writes"),
        ('{"scores": {}, "training": {"stages": [{"eval_loss": "low"}]}}', "its 'training' is not what a run writes"),
        ('{"scores": {}, "versions": [1]}', "its 'versions' is not what a run writes"),
    ],
)
def test_broken_file_is_one_line(tmp_path, text, complaint):
    path = tmp_path / "results.json"
    path.write_text(text)
    with pytest.raises(DataError, match=complaint) as caught:
        read_results(path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


def test_missing_file(tmp_path):
    with pytest.raises(MissingFileError, match="results.json is not there"):
        read_results(tmp_path)


def screen(content) -> str:
    console = Console(file=io.StringIO(), width=120)
    render_table(content, console)
    return console.file.getvalue()


def test_table(tmp_path):
    text = screen(write(tmp_path / "results.json"))
    (gsm8k,) = (line for line in text.splitlines() if "gsm8k" in line)
    assert "10.0 ± 3.0" in gsm8k and "25.0 ± 4.0" in gsm8k and "+15.0 ± 2.0" in gsm8k and "100" in gsm8k
    assert "<0.001" in gsm8k
    (cola,) = (line for line in text.splitlines() if "cola" in line)
    assert "70.0" in cola and "65.0" in cola and "-5.0" in cola and "±" not in cola
    (mean,) = (line for line in text.splitlines() if "mean" in line)
    assert "40.0" in mean and "45.0" in mean and "+5.0" in mean
    assert "humaneval skipped: runs code" in text


def test_table_without_a_base():
    score = {"base": None, "tuned": 0.5, "difference": None, "tuned_stderr": 0.1, "metric": "acc,none", "n": 4}
    lines = screen({"scores": {"cola": score, "sst2": score}}).splitlines()
    assert any("cola" in line and "50.0 ± 10.0" in line for line in lines)
    (mean,) = (line for line in lines if "mean" in line)
    assert "50.0" in mean and "-" in mean


def test_table_of_a_base_alone_has_one_column():
    score = {"base": 0.5, "tuned": None, "difference": None, "base_stderr": 0.1, "metric": "acc,none", "n": 4}
    text = screen({"scores": {"cola": score, "sst2": score}})
    assert "tuned" not in text and "difference" not in text and text.count("50.0 ± 10.0") == 2
    (mean,) = (line for line in text.splitlines() if "mean" in line)
    assert "50.0" in mean


def test_commit_only_inside_a_checkout(tmp_path, monkeypatch):
    monkeypatch.setattr(results.paths, "PACKAGE", tmp_path / "site-packages" / "loramoe_train")
    assert results.commit() is None
