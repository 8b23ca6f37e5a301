"""Our definitions against lm-eval's own, rendered on the same rows: requests, targets, filters and settings agree."""

from pathlib import Path
from typing import Any

import pytest

from loramoe_train.evaluation.check import check_benchmarks
from loramoe_train.evaluation.harness import FEWSHOT_SEED, build_task
from loramoe_train.evaluation.rows import find_file, read_rows
from loramoe_train.evaluation.tasks import known_benchmarks, load_benchmark
from loramoe_train.schema.evaluation import EvalConfig
from tests.evaluation.rows import LOCAL, hub_row, write_local

TWINS = [name for name in known_benchmarks() if load_benchmark(name).stock]


def stock_task(name: str, splits: dict[str, list[dict[str, Any]]], shots: int, monkeypatch: pytest.MonkeyPatch) -> Any:
    """lm-eval's own definition of that name, with these rows in place of the download."""
    import lm_eval.tasks
    from datasets import Dataset
    from lm_eval.api.task import ConfigurableTask

    def in_memory(task: Any, *_: Any, **__: Any) -> None:
        task.dataset = {split: Dataset.from_list(rows) for split, rows in splits.items()}

    monkeypatch.setattr(ConfigurableTask, "download", in_memory)
    path = Path(lm_eval.tasks.__file__).parent / str(load_benchmark(name).stock)
    manager = lm_eval.tasks.TaskManager(include_defaults=False, include_path=str(path.parent))
    (task,) = manager.load([name])["tasks"].values()
    monkeypatch.undo()
    task.set_config("num_fewshot", shots)
    task.set_fewshot_seed(FEWSHOT_SEED)
    return task


def our_task(name: str, root: Path, shots: int) -> Any:
    (planned,) = check_benchmarks([name], EvalConfig(num_fewshot=shots), str(root)).planned
    task = build_task(planned)
    task.set_fewshot_seed(FEWSHOT_SEED)
    return task


def requests(task: Any, limit: int) -> list[Any]:
    task.build_all_requests(limit=limit)
    return [(request.request_type, request.doc_id, request.idx, request.args) for request in task.instances]


def assert_twins(ours: Any, stock: Any, limit: int) -> None:
    mine, theirs = requests(ours, limit), requests(stock, limit)
    if ours.OUTPUT_TYPE == "generate_until":
        # ours writes down the budget that lm-eval's model class otherwise fills in: 256 tokens
        budgets = {entry[3][1].pop("max_gen_toks") for entry in mine}
        assert budgets == {256}
    assert mine == theirs
    for my_doc, their_doc in zip(list(ours.eval_docs)[:limit], list(stock.eval_docs)[:limit], strict=True):
        assert ours.doc_to_target(my_doc) == stock.doc_to_target(their_doc)
        if stock.config.doc_to_choice is not None:
            assert ours.doc_to_choice(my_doc) == stock.doc_to_choice(their_doc)
    assert ours.VERSION == stock.VERSION
    for key in ("output_type", "filter_list", "repeats", "target_delimiter", "fewshot_delimiter", "description"):
        assert ours.get_config(key) == stock.get_config(key), key
    for metric, arguments in stock._metric_fn_kwargs.items():
        assert ours._metric_fn_kwargs[metric] == arguments
        assert ours.aggregation()[metric] is stock.aggregation()[metric]
        assert ours.higher_is_better()[metric] == stock.higher_is_better()[metric]
    assert set(ours.aggregation()) - set(stock.aggregation()) <= {"acc"}  # cola's accuracy, the one addition


@pytest.mark.parametrize("shots", [0, 1])
@pytest.mark.parametrize("name", TWINS)
def test_twin_on_inlined_rows(name, shots, tmp_path, monkeypatch):
    root = write_local(tmp_path, name)
    benchmark = load_benchmark(name)
    splits = {
        split: [hub_row(name, row) for row in (LOCAL[name] if split == "train" else LOCAL[name][:2])]
        for split in benchmark.files
    }
    assert_twins(our_task(name, root, shots), stock_task(name, splits, shots, monkeypatch), limit=2)


@pytest.mark.real
@pytest.mark.parametrize("name", TWINS)
def test_twin_on_real_rows(name, shared_dir, monkeypatch):
    """The first 40 documents, with the stock number of few-shot examples (or one, where there is a pool)."""
    root, benchmark = shared_dir / "data", load_benchmark(name)
    found = {split: find_file(root, file) for split, file in benchmark.files.items()}
    if found[benchmark.split] is None:
        pytest.skip(f"{benchmark.files[benchmark.split]} is not there")
    shots = (benchmark.num_fewshot(None) or 1) if found.get(str(benchmark.fewshot_split)) else 0
    splits = {
        split: [hub_row(name, row) for row in read_rows(path, benchmark.columns)]
        if path
        else [hub_row(name, LOCAL[name][0])]
        for split, path in found.items()
    }
    assert_twins(our_task(name, root, shots), stock_task(name, splits, shots, monkeypatch), limit=40)


def test_humaneval_twin(tmp_path):
    """The stock file cannot be imported without the hub, so its YAML is compared with its functions unresolved."""
    import lm_eval.tasks
    from lm_eval.tasks._yaml_loader import load_yaml

    stock = load_yaml(Path(lm_eval.tasks.__file__).parent / "humaneval" / "humaneval.yaml", resolve_func=False)
    benchmark = load_benchmark("humaneval")
    for key in ("doc_to_text", "doc_to_target", "generation_kwargs", "num_fewshot", "test_split", "output_type"):
        assert benchmark.task[key] == stock[key], key
    assert benchmark.hub.name == stock["dataset_path"]
    assert benchmark.task["metadata"]["version"] == stock["metadata"]["version"]
    assert [entry["name"] for entry in stock["filter_list"]] == ["create_test"]
    assert stock["metric_list"][0]["k"] == [1] and benchmark.headline == "pass@1,create_test"


@pytest.mark.parametrize("name", TWINS)
def test_without_local_files_the_stock_definition_is_loaded(name, monkeypatch):
    """`data.root=null`: same task object as lm-eval's, but for the numbers of the config and cola's added metric."""
    from datasets import Dataset
    from lm_eval.api.task import ConfigurableTask

    from loramoe_train.evaluation.check import Planned

    benchmark, asked = load_benchmark(name), []

    def in_memory(task: Any, *_: Any, **__: Any) -> None:
        asked.append((task.DATASET_PATH, task.DATASET_NAME))
        rows = [hub_row(name, row) for row in LOCAL[name]]
        task.dataset = dict.fromkeys(("train", "validation", "test"), Dataset.from_list(rows))

    monkeypatch.setattr(ConfigurableTask, "download", in_memory)
    task = build_task(Planned(benchmark, None, num_fewshot=0, new_tokens=benchmark.new_tokens(None)))
    assert asked == [(benchmark.hub.name, benchmark.hub.config)]
    assert task.task_name == name and task.get_config("num_fewshot") == 0
    assert benchmark.headline.split(",")[0] in task.aggregation()
    task.build_all_requests()
    assert len(task.instances) >= len(LOCAL[name])


PROMPTS = {
    "tiny_math": ("Question: Tom has 3. How many?\nAnswer:", None),
    "tiny_code": ('def f0(x):\n    """Return x + 0."""\n', None),
    "tiny_facts": ("Question: Which animal lays eggs?\nAnswer:", [" a cow", " a hen", " a dog", " a cat"]),
    "tiny_grammar": ("The cat sat . \nQuestion: Does this sentence make sense?\nAnswer:", [" no", " yes"]),
    "tiny_sentiment": (
        "The cat sat . \nQuestion: Is this sentence positive or negative?\nAnswer:",
        [" negative", " positive"],
    ),
}


@pytest.mark.parametrize("name", PROMPTS)
def test_prompts_of_the_embedded_families(name, tmp_path):
    task = our_task(name, write_local(tmp_path, name), shots=0)
    task.build_all_requests(limit=1)
    prompt, answers = PROMPTS[name]
    assert {request.args[0] for request in task.instances} == {prompt}
    if answers is not None:
        assert [request.args[1] for request in task.instances] == answers


def scores(task: Any, doc: dict[str, Any], response: str) -> dict[str, float]:
    """What a generated response earns, through the definition's own filters and metrics."""
    from lm_eval.api.instance import Instance

    request = Instance("generate_until", doc, ("", {}), 0, metadata=(task.task_name, 0, 1), resps=[response])
    task._instances = [request]
    task.apply_filters()
    found = {}
    for name, value in request.filtered_resps.items():
        found |= {f"{metric},{name}": float(score) for metric, score in task.process_results(doc, [value]).items()}
    return found


@pytest.mark.parametrize(
    ("response", "right"),
    [(" 3 + 0 = 3\n#### 3", 1), (" #### 3.", 1), (" 3", 0), (" #### 4", 0), ("", 0), (" #### 33", 0)],
)
def test_tiny_math_wants_the_number_after_the_marks(tmp_path, response, right):
    task = our_task("tiny_math", write_local(tmp_path, "tiny_math"), shots=0)
    assert scores(task, LOCAL["tiny_math"][0], response) == {"exact_match,strict-match": right}


@pytest.mark.parametrize(
    ("response", "right"),
    [("    return x + 0\n", 1), ("return x + 0", 1), ("    return x +  0", 0), ("    return x + 1\n", 0), ("", 0)],
)
def test_tiny_code_compares_the_body_without_outer_white_space(tmp_path, response, right):
    task = our_task("tiny_code", write_local(tmp_path, "tiny_code"), shots=0)
    assert scores(task, LOCAL["tiny_code"][0], response) == {"exact_match,none": right}


def test_gsm8k_reports_both_filters(tmp_path):
    task = our_task("gsm8k", write_local(tmp_path, "gsm8k"), shots=0)
    doc = LOCAL["gsm8k"][1]
    assert scores(task, doc, " it is $20") == {"exact_match,strict-match": 0, "exact_match,flexible-extract": 1}
    assert scores(task, doc, " #### 20") == {"exact_match,strict-match": 1, "exact_match,flexible-extract": 1}
