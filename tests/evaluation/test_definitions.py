"""What is stored beside a score, rows that are no part of a benchmark, and several shot numbers in one evaluation."""

import hashlib
import json
from typing import Any

import pytest

from loramoe_train.evaluation import check, definitions
from loramoe_train.evaluation.check import check_benchmarks
from loramoe_train.evaluation.comparison import paired_score
from loramoe_train.evaluation.harness import build_task, evaluate
from loramoe_train.evaluation.tasks import load_benchmark
from loramoe_train.schema.evaluation import EvalConfig
from tests.conftest import ROOT
from tests.evaluation.rows import LOCAL, write_local
from tests.evaluation.test_twins import inlined_splits, stock_task


def test_the_source_is_each_file_that_is_read(tmp_path):
    root = write_local(tmp_path, "gsm8k")
    for name, splits in (("gsm8k@0", ["test"]), ("gsm8k@2", ["test", "train"])):
        (planned,) = check_benchmarks([name], EvalConfig(), str(root)).planned
        found = definitions.source(planned)
        assert list(found) == splits
        path = root / "gsm8k" / "test.jsonl"
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        assert found["test"] == {"file": str(path), "sha256": digest, "rows": 2}


def test_the_source_is_the_hubs_data_set(monkeypatch):
    monkeypatch.setattr(check, "is_offline", lambda: False)
    (planned,) = check_benchmarks(["arc_easy"], EvalConfig(), None).planned
    assert definitions.source(planned) == {"hub": "allenai/ai2_arc", "config": "ARC-Easy"}


@pytest.mark.parametrize("place", ["local", "hub"])
def test_rows_with_an_image_are_no_part_of_scienceqa(place, tmp_path, monkeypatch):
    from datasets import Dataset
    from lm_eval.api.task import ConfigurableTask

    def in_memory(task: Any, *_: Any, **__: Any) -> None:
        task.dataset = dict.fromkeys(("train", "validation", "test"), Dataset.from_list(rows))

    rows = [{**LOCAL["scienceqa"][0], "image": {"path": "a.png"}}, *LOCAL["scienceqa"]]
    root = str(write_local(tmp_path, "scienceqa", rows)) if place == "local" else None
    if root is None:
        monkeypatch.setattr(check, "is_offline", lambda: False)
        monkeypatch.setattr(ConfigurableTask, "download", in_memory)
    (planned,) = check_benchmarks(["scienceqa"], EvalConfig(), root).planned
    task = build_task(planned)
    kept = LOCAL["scienceqa"][:1] if place == "local" else LOCAL["scienceqa"]  # two rows were written
    assert [doc["question"] for doc in task.eval_docs] == [row["question"] for row in kept]


def test_scienceqa_asks_as_its_training_data_does(tmp_path):
    import yaml

    data = yaml.safe_load((ROOT / "configs" / "data" / "task" / "scienceqa.yaml").read_text())
    benchmark = load_benchmark("scienceqa")
    assert data["prompt"] == benchmark.task["doc_to_text"] and data["lm_eval"] == "scienceqa"
    (planned,) = check_benchmarks(["scienceqa"], EvalConfig(), str(write_local(tmp_path, "scienceqa"))).planned
    task = build_task(planned)
    task.build_all_requests()
    assert [request.args[1] for request in task.instances] == [" A", " B", " A", " B", " C"]


def test_several_numbers_of_examples_in_one_evaluation(model, tokenizer, tmp_path):
    write_local(tmp_path, "gsm8k")
    names = ["gsm8k@2", "gsm8k@0"]
    config = EvalConfig(max_new_tokens=4, tasks=names, num_fewshot=1)
    found = evaluate(model, tokenizer, names, config=config, data_root=str(tmp_path), seed=0)
    assert list(found) == names
    for name, shots in (("gsm8k@2", 2), ("gsm8k@0", 0)):
        result = found[name]
        assert (result.name, result.num_fewshot, result.n, result.version) == (name, shots, 2, "3.0")
        assert {sample["prompt"].count("Question:") for sample in result.samples} == {shots + 1}
        assert (result.fewshot_seed is None) == (shots == 0)


def test_every_metric_has_its_standard_error_and_every_score_its_source(model, tokenizer, tmp_path):
    names = ["cola", "mrpc", "hellaswag", "social_iqa", "mmlu", "arc_easy_chat", "gsm8k_cot@1", "scienceqa", "mbpp@0"]
    for name in names:
        write_local(tmp_path, name.partition("@")[0])
    config = EvalConfig(max_new_tokens=4, tasks=names, allow_code_execution=True)
    found = evaluate(model, tokenizer, names, config=config, data_root=str(tmp_path), seed=0)
    assert list(found) == names
    for name, result in found.items():
        assert result.stderrs.keys() == result.metrics.keys() and None not in result.stderrs.values(), name
        entry = json.loads(json.dumps(paired_score(result, None)))
        split = load_benchmark(name).split
        assert entry["data"][split]["rows"] == 2 and len(entry["data"][split]["sha256"]) == 64
        assert entry["metric"] == load_benchmark(name).headline and entry["version"] == result.version
    assert set(found["cola"].metrics) == {"mcc,none", "acc,none"}
    assert set(found["mrpc"].metrics) == {"acc,none", "f1,none"}
    assert found["mbpp@0"].metrics == {"pass_at_1,none": 0.0}


@pytest.mark.real
@pytest.mark.parametrize("count", [16, pytest.param(500, marks=pytest.mark.nightly)])
@pytest.mark.parametrize(("name", "end"), [("mbpp", ""), ("mbpp_instruct", "\n```\nDone.")])
def test_canonical_solutions_of_mbpp_pass(name, end, count, shared_dir):
    """Two of the 500 cannot: one takes longer than a program may, one needs a setup that lm-eval does not run."""
    from lm_eval.api.instance import Instance

    config = EvalConfig(allow_code_execution=True)
    (planned,) = check_benchmarks([name], config, str(shared_dir / "data")).planned
    task = build_task(planned)
    task._instances = [
        Instance("generate_until", doc, ("", {}), 0, metadata=(name, index, 1), resps=[doc["code"] + end])
        for index, doc in enumerate(list(task.eval_docs)[:count])
    ]
    task.apply_filters()
    failed = set()
    for request in task._instances:
        (answer,) = request.filtered_resps.values()
        (score,) = task.process_results(request.doc, [answer]).values()
        if score != 1.0:
            failed.add(request.doc["task_id"])
    assert len(task._instances) == count and failed <= {123, 367}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["arc_challenge_chat", "gsm8k_cot", "hellaswag"])
def test_scores_equal_those_of_the_stock_task(name, tiny_model_dir, tmp_path, monkeypatch):
    """Filters and metrics on what a model really answers: lm-eval's own model, evaluator and file, item by item."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager
    from transformers import AutoModelForCausalLM, AutoTokenizer

    benchmark, root = load_benchmark(name), write_local(tmp_path, name)
    shots = int(benchmark.takes_examples)
    stock = stock_task(name, inlined_splits(name), shots, monkeypatch)
    if benchmark.generates:
        stock.set_config("generation_kwargs", {"max_gen_toks": 16}, update=True)
    theirs = simple_evaluate(
        model="hf",
        model_args={"pretrained": str(tiny_model_dir), "dtype": "float32"},
        tasks=[stock],
        num_fewshot=shots,
        batch_size=1,
        device="cpu",
        bootstrap_iters=0,
        task_manager=TaskManager(include_defaults=False),
    )
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    config = EvalConfig(num_fewshot=shots, max_new_tokens=16)
    ours = evaluate(model, tokenizer, [name], config=config, data_root=str(root), seed=0)[name]
    assert ours.metrics == {key: theirs["results"][name][key] for key in ours.metrics}
    raw = {entry["doc_id"]: entry for entry in theirs["samples"][name]}
    assert raw.keys() == {sample["doc_id"] for sample in ours.samples}
    for sample in ours.samples:
        entry = raw[sample["doc_id"]]
        assert sample["prompt_hash"] == entry["prompt_hash"]
        if benchmark.generates:
            assert sample["responses"] == entry["resps"][0]
        else:
            expected = [answer[0][0] for answer in entry["resps"]]
            assert sample["log_likelihoods"] == pytest.approx(expected, abs=1e-4)
