"""Finished units on disk: what they give back, what makes them useless, and what decides a score."""

import gzip
import json

import pytest

from loramoe_train.errors import DataError, MissingFileError
from loramoe_train.evaluation.check import check_benchmarks
from loramoe_train.evaluation.types import BenchmarkResult
from loramoe_train.evaluation.units import (
    NOT_DECIDING,
    OF_CODE,
    document_hash,
    facts_of,
    read_unit,
    reusable,
    task_facts,
    write_unit,
)
from loramoe_train.schema.evaluation import EvalConfig
from tests.evaluation.rows import write_local

FACTS = facts_of({"limit": 2}, {"base": "a", "place": ("tuple", 1)}, 0)


def make_result(**changes) -> BenchmarkResult:
    samples = [
        {"doc_id": index, "doc": {"q": index}, "prompt": f"p{index}", "target": 1, "metrics": {"acc,none": value}}
        for index, value in enumerate((1.0, 0.0))
    ]
    plain = dict(metrics={"acc,none": 0.5, "mcc,none": 0.1}, stderrs={"acc,none": 0.5, "mcc,none": None})
    plain |= dict(n=2, num_fewshot=0, fewshot_seed=None, version="1.0", seconds=2.5, truncated=1, samples=samples)
    return BenchmarkResult(**{**plain, "name": "cola", "metric": "acc,none", "score": 0.5, "stderr": 0.5, **changes})


@pytest.fixture
def folder(tmp_path):
    write_unit(tmp_path / "samples", "tuned", make_result(), FACTS, save_samples=True)
    return tmp_path / "samples"


def test_a_unit_comes_back(folder):
    unit, made = read_unit(folder, "cola", "tuned"), make_result()
    assert {**vars(unit.result), "samples": 0} == {**vars(made), "samples": 0}
    assert [s["metrics"] for s in unit.result.samples] == [s["metrics"] for s in made.samples]
    assert [s["hash"] for s in unit.result.samples] == [document_hash(s) for s in made.samples]
    assert {path.name for path in folder.iterdir()} == {"cola.tuned.json", "cola.tuned.jsonl"}
    assert reusable(folder, "cola", "tuned", FACTS, save_samples=True) == unit


@pytest.mark.parametrize("change", ["facts", "side", "samples gone", "samples changed", "record cut", "no record"])
def test_a_unit_that_does_not_fit_is_made_again(folder, change):
    record, samples, facts, side = folder / "cola.tuned.json", folder / "cola.tuned.jsonl", FACTS, "tuned"
    if change == "facts":
        facts = facts_of({"limit": 3}, FACTS["model"], 0)
    elif change == "side":
        side = "base"
    elif change == "samples gone":
        samples.unlink()
    elif change == "samples changed":
        samples.write_text(samples.read_text().replace("p1", "p2"))
    elif change == "record cut":
        record.write_bytes(record.read_bytes()[:-40])
    else:
        record.unlink()
    assert reusable(folder, "cola", side, facts, save_samples=True) is None


def test_without_samples_the_record_is_enough(folder):
    assert (folder / "cola.tuned.jsonl").is_file()
    write_unit(folder, "tuned", make_result(), FACTS, save_samples=False)
    assert not (folder / "cola.tuned.jsonl").exists(), "samples of another evaluation beside this record"
    assert reusable(folder, "cola", "tuned", FACTS, save_samples=False).result.score == 0.5
    assert reusable(folder, "cola", "tuned", FACTS, save_samples=True) is None  # now they are wished for


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda r: r.update(format="x"), "is no record of an evaluation"),
        (lambda r: r["result"].pop("stderr"), "is damaged .*stderr"),
        (lambda r: r["result"].update(n=3), "it holds 2 documents of cola, and says 3 of cola"),
        (lambda r: r["documents"][1]["metrics"].pop("acc,none"), "is damaged .*acc,none"),
        (lambda r: r["documents"][1]["metrics"].update({"mcc,none": "x"}), "document 1 has a metric that is no number"),
        (lambda r: r["facts"].update(task=3), "is damaged"),
        (lambda r: r["result"].update(seconds="x"), "is damaged .something that must be a number"),
        (lambda r: r["result"].update(metrics=[1]), "is damaged"),
        (lambda r: r["result"]["stderrs"].pop("mcc,none"), "is damaged"),
        (lambda r: r.update(documents=7), "is damaged"),
        (lambda r: r["result"].update(score=None), "is damaged"),
    ],
)
def test_a_damaged_record_is_one_line(folder, change, complaint):
    path = folder / "cola.tuned.json"
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))
    with pytest.raises(DataError, match=complaint) as caught:
        read_unit(folder, "cola", "tuned")
    assert str(path) in str(caught.value)
    path.write_text(path.read_text()[:-9].replace(",", ",\n"))
    with pytest.raises(DataError, match=rf"{path}:\d+ is not JSON"):
        read_unit(folder, "cola", "tuned")
    with pytest.raises(MissingFileError, match="sst2.base.json"):
        read_unit(folder, "sst2", "base")


def test_the_document_decides_its_hash():
    sample = {"doc": {"q": 1}, "prompt": "p", "target": 1, "continuations": [" a"], "metrics": {}, "responses": ["x"]}
    assert document_hash(sample) == document_hash({**sample, "metrics": {"acc": 1}, "responses": ["y"]})
    others = [{"doc": {"q": 2}}, {"prompt": "few\n\np"}, {"target": 0}, {"continuations": [" b"]}]
    assert len({document_hash({**sample, **change}) for change in [{}, *others]}) == 5


def test_what_decides_a_score(tmp_path):
    write_local(tmp_path, "gsm8k")

    def facts(**changes) -> dict:
        (planned,) = check_benchmarks(["gsm8k"], config := EvalConfig(**changes), str(tmp_path)).planned
        return task_facts(planned, config)

    plain = facts(num_fewshot=0)
    assert plain == facts(num_fewshot=0, batch_size=1, generation_batch_size=2, save_samples=False, again=True)
    assert set(EvalConfig.model_fields) - NOT_DECIDING - OF_CODE <= plain.keys() - OF_CODE
    changed = [{"limit": 1}, {"num_fewshot": 1}, {"max_new_tokens": 9}, {"max_length": 999}, {"chat_template": True}]
    for change in changed:
        assert facts(**{"num_fewshot": 0, **change}) != plain, change
    (path,) = (tmp_path / "gsm8k").glob("test*")
    text = gzip.open(path, "rt").read() if path.suffix == ".gz" else path.read_text()
    path.unlink()
    (tmp_path / "gsm8k" / "test.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    assert facts(num_fewshot=0) == plain, "packed or not, the rows are the same"
    (tmp_path / "gsm8k" / "test.jsonl.gz").write_bytes(gzip.compress(text.replace("Tom", "Tim").encode()))
    assert facts(num_fewshot=0)["data"] != plain["data"]
