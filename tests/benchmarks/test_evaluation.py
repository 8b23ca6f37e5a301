"""What the comparison with lm-eval's command line counts, and that it notices every kind of difference."""

import copy

import pytest

from benchmarks import evaluation
from benchmarks.lm_eval_cli import agreement

LIKELIHOODS = {
    "doc_id": 3,
    "prompt_hash": "a",
    "log_likelihoods": [-1.5, -2.5],
    "greedy": [True, False],
    "metrics": {"acc,none": 1.0, "mcc,none": [0, 0]},
}
ITS_ENTRY = {
    "doc_id": 3,
    "prompt_hash": "a",
    "filter": "none",
    "metrics": ["acc"],
    "acc": 1.0,
    "resps": [[["-1.50001", "True"]], [["-2.5", "False"]]],
}
TEXT = {"doc_id": 0, "prompt_hash": "b", "responses": ["x"], "metrics": {"exact_match,a": 0.0, "exact_match,b": 1.0}}
ITS_ENTRIES = [
    {"doc_id": 0, "prompt_hash": "b", "filter": f, "metrics": ["exact_match"], "exact_match": v, "resps": [["x"]]}
    for f, v in (("a", 0.0), ("b", 1.0))
]


def test_what_is_counted():
    found = agreement([LIKELIHOODS], [ITS_ENTRY])
    assert found.largest == pytest.approx(1e-5)
    assert (found.documents, found.likelihoods, found.texts, found.metrics, found.unequal) == (1, 2, 0, 1, 0)
    found = agreement([TEXT], ITS_ENTRIES)
    assert (found.documents, found.likelihoods, found.texts, found.metrics, found.unequal) == (1, 0, 1, 2, 0)


@pytest.mark.parametrize(
    ("sample", "key", "value"),
    [
        (LIKELIHOODS, "prompt_hash", "other"),
        (LIKELIHOODS, "greedy", [True, True]),
        (LIKELIHOODS, "metrics", {"acc,none": 0.0}),
        (TEXT, "responses", ["y"]),
        (TEXT, "metrics", {"exact_match,a": 0.0, "exact_match,b": 0.0}),
    ],
)
def test_every_kind_of_difference_is_noticed(sample, key, value):
    changed = {**copy.deepcopy(sample), key: value}
    assert agreement([changed], [ITS_ENTRY] if sample is LIKELIHOODS else ITS_ENTRIES).unequal >= 1


def test_other_documents_are_no_comparison():
    with pytest.raises(ValueError, match="one side scored 2 documents, the other 1"):
        agreement([LIKELIHOODS, {**LIKELIHOODS, "doc_id": 4}], [ITS_ENTRY])


@pytest.mark.nightly
def test_the_whole_comparison_on_a_tiny_model(tmp_path, capsys):
    """Trains, exports, merges, and runs both sides; the figures are of this run."""
    from loramoe_train.paths import PACKAGE
    from tests.evaluation.rows import write_local

    for name in ("arc_easy", "sst2"):
        write_local(tmp_path, name)
    (tmp_path / "sst2" / "train.jsonl").write_text((tmp_path / "sst2" / "validation.jsonl").read_text() * 8)
    model = str(PACKAGE / "assets" / "tiny" / "model")
    given = ["--data-root", str(tmp_path), "--model", model, "--tasks", "arc_easy,sst2", "--limit", "2"]
    report = evaluation.main([*given, "--num-fewshot", "0"])
    assert all(found["unequal"] == 0 for found in report["agreement_of_bases"].values())
    assert 0 < report["ours_to_lm_eval"] < 1
    assert "of the time of lm-eval's command line" in capsys.readouterr().out
