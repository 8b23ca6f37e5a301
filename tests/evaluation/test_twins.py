"""Our definitions against lm-eval's own, rendered on the same rows: requests, targets, filters and settings agree."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from loramoe_train.errors import ConfigError
from loramoe_train.evaluation import check, sandbox
from loramoe_train.evaluation.check import check_benchmarks
from loramoe_train.evaluation.harness import FEWSHOT_SEED, build_task
from loramoe_train.evaluation.rows import find_file, read_rows
from loramoe_train.evaluation.tasks import known_benchmarks, load_benchmark
from loramoe_train.schema.evaluation import EvalConfig
from tests.evaluation.rows import LOCAL, hub_row, write_local

ALL = {name: load_benchmark(name) for name in known_benchmarks()}
CODE = [name for name, benchmark in ALL.items() if benchmark.executes_code]
WITH_STOCK = [name for name, benchmark in ALL.items() if benchmark.stock]
TWINS = [*WITH_STOCK, "arc_easy_chat"]  # that one renders lm-eval's file of the challenge part
PLAIN_ROWS = ["scienceqa", *(name for name in ALL if name.startswith("tiny_"))]  # ours alone


def numbers(name: str) -> list[int]:
    """Examples that two or three rows allow; all where the definition brings its own."""
    examples = ALL[name].examples
    return [0] if not ALL[name].takes_examples else [0, 1] if examples is None else [0, 1, len(examples)]


def stock_task(name: str, splits: dict[str, list[dict[str, Any]]], shots: int, monkeypatch: pytest.MonkeyPatch) -> Any:
    """lm-eval's own definition of that name, with these rows in place of the download."""
    return stock_file(str(ALL[name].stock or ALL[name].mirrors), splits, shots, monkeypatch)


def stock_file(file: str, splits: dict[str, list[dict[str, Any]]], shots: int, monkeypatch: pytest.MonkeyPatch) -> Any:
    import lm_eval.tasks
    from datasets import Dataset
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks._yaml_loader import load_yaml

    def in_memory(task: Any, *_: Any, **__: Any) -> None:
        task.dataset = {split: Dataset.from_list(rows) for split, rows in splits.items()}

    with monkeypatch.context() as patch:
        patch.setattr(ConfigurableTask, "download", in_memory)
        path = Path(lm_eval.tasks.__file__).parent / file
        manager = lm_eval.tasks.TaskManager(include_defaults=False, include_path=str(path.parent))
        (task,) = manager.load([load_yaml(path, resolve_func=False)["task"]])["tasks"].values()
    task.set_config("num_fewshot", shots)
    task.set_fewshot_seed(FEWSHOT_SEED)
    return task


def our_task(name: str, root: Path, shots: int | None, **config: Any) -> Any:
    (planned,) = check_benchmarks([name], EvalConfig(num_fewshot=shots, **config), str(root)).planned
    task = build_task(planned)
    task.set_fewshot_seed(FEWSHOT_SEED)
    return task


def inlined_splits(name: str) -> dict[str, list[dict[str, Any]]]:
    """The rows that `write_local` writes, as the hub has them; also for splits that ours does not read."""
    rows = [hub_row(name, row) for row in LOCAL[name]]
    return {"train": rows, "validation": rows[:2], "test": rows[:2]}


def requests(task: Any, limit: int) -> list[Any]:
    task.build_all_requests(limit=limit)
    return [(request.request_type, request.doc_id, request.idx, request.args) for request in task.instances]


def assert_same_requests(ours: Any, stock: Any, limit: int) -> None:
    mine, theirs = requests(ours, limit), requests(stock, limit)
    if ours.OUTPUT_TYPE == "generate_until" and "max_gen_toks" not in stock.get_config("generation_kwargs"):
        # ours writes down the budget that lm-eval's model class otherwise fills in: 256 tokens
        budgets = {entry[3][1].pop("max_gen_toks") for entry in mine}
        assert budgets == {256}
    assert mine == theirs
    for key in ("output_type", "target_delimiter", "fewshot_delimiter", "description", "gen_prefix", "unsafe_code"):
        assert ours.get_config(key) == stock.get_config(key), key


def assert_twins(ours: Any, stock: Any, limit: int) -> None:
    assert_same_requests(ours, stock, limit)
    for my_doc, their_doc in zip(list(ours.eval_docs)[:limit], list(stock.eval_docs)[:limit], strict=True):
        assert ours.doc_to_target(my_doc) == stock.doc_to_target(their_doc)
        if stock.config.doc_to_choice is not None:
            assert ours.doc_to_choice(my_doc) == stock.doc_to_choice(their_doc)
    assert ours.VERSION == stock.VERSION
    for key in ("filter_list", "repeats"):
        assert ours.get_config(key) == stock.get_config(key), key
    for metric, arguments in stock._metric_fn_kwargs.items():
        assert ours._metric_fn_kwargs[metric] == arguments
        assert ours.aggregation()[metric] is stock.aggregation()[metric]
        assert ours.higher_is_better()[metric] == stock.higher_is_better()[metric]
    assert set(ours.aggregation()) - set(stock.aggregation()) <= {"acc"}  # cola's accuracy, the one addition


def test_every_benchmark_is_held_against_something():
    assert {*TWINS, *CODE, *PLAIN_ROWS, "mmlu"} == set(ALL)


@pytest.mark.parametrize(("name", "shots"), [(n, s) for n in TWINS for s in numbers(n)])
def test_twin_on_inlined_rows(name, shots, tmp_path, monkeypatch):
    root = write_local(tmp_path, name)
    assert_twins(our_task(name, root, shots), stock_task(name, inlined_splits(name), shots, monkeypatch), limit=2)


@pytest.mark.real
@pytest.mark.parametrize("name", TWINS)
def test_twin_on_real_rows(name, shared_dir, monkeypatch):
    """The first 40 documents, with the stock number of few-shot examples (or one, where there is a pool)."""
    root, benchmark = shared_dir / "data", load_benchmark(name)
    found = {split: find_file(root, file) for split, file in benchmark.files.items()}
    assert (found[benchmark.split] is not None) == (benchmark.checked_on == "real rows")
    if found[benchmark.split] is None:
        pytest.skip(f"{benchmark.files[benchmark.split]} is not there")
    shots = benchmark.num_fewshot(None)
    if found.get(str(benchmark.fewshot_split)):
        shots = shots or 1
    splits = {
        split: [hub_row(name, row) for row in read_rows(path, benchmark.columns)]
        for split, path in found.items()
        if path
    }
    splits = {**inlined_splits(name), **splits}
    assert_twins(our_task(name, root, shots), stock_task(name, splits, shots, monkeypatch), limit=40)


def test_lm_evals_own_scoring_of_aqua_is_the_usual_one(tmp_path, monkeypatch):
    """Its file names a Python function, which ours does without."""
    name, docs = "agieval_aqua_rat", LOCAL["agieval_aqua_rat"]
    ours, stock = our_task(name, write_local(tmp_path, name), 0), stock_task(name, inlined_splits(name), 0, monkeypatch)
    earned = set()
    for doc in docs:
        for best in range(5):
            # a long answer that is likely as a whole, or only for its length
            answers = [(-1.0 if index == best else -9.0 if index != 3 else -2.0, False) for index in range(5)]
            found = ours.process_results(doc, answers)
            assert found == stock.process_results(doc, answers)
            earned.add((found["acc"], found["acc_norm"]))
    assert len(earned) == 4  # every pair of the two was met


# -- mmlu: one list here, a task for each subject there ----------------------------------------------------------------


@pytest.mark.parametrize("index", [0, 1])
def test_mmlu_renders_as_the_task_of_its_subject(index, tmp_path, monkeypatch):
    row = LOCAL["mmlu"][index]
    ours = our_task("mmlu", write_local(tmp_path, "mmlu", [row]), 0)
    stock = stock_file(f"mmlu/default/mmlu_{row['subject']}.yaml", {"test": [row], "dev": [row]}, 0, monkeypatch)
    ours.set_config("description", stock.get_config("description"))  # what it renders to is in the requests
    assert requests(our_task("mmlu", tmp_path, 0), 1) == requests(stock, 1)
    assert_twins(ours, stock, limit=1)


def test_mmlu_knows_how_every_subject_is_introduced():
    import lm_eval.tasks
    from lm_eval.tasks._yaml_loader import load_yaml
    from lm_eval.utils import apply_template

    files = sorted((Path(lm_eval.tasks.__file__).parent / "mmlu" / "default").glob("mmlu_*.yaml"))
    assert len(files) == 57
    for file in files:
        stock = load_yaml(file)
        row = {"subject": stock["dataset_name"]}
        assert apply_template(ALL["mmlu"].task["description"], row) == stock["description"]


# -- code: lm-eval's files load a metric of the hub while they are imported --------------------------------------------

RAN: list[str] = []  # the programs that lm-eval's metric would execute


class _Metric:
    """Stands for the hub's `code_eval`, which executes prediction, line break, reference."""

    def compute(self, *, references: list[str], predictions: list[list[str]], k: list[int]) -> Any:
        RAN.extend(f"{code}\n{tests}" for codes, tests in zip(predictions, references, strict=True) for code in codes)
        return {"pass@1": 1.0}, {}


@pytest.fixture
def executed(monkeypatch) -> list[Any]:
    """The programs that our sandbox would execute, none of which is; lm-eval's go to `RAN`."""
    import evaluate

    programs: list[Any] = []

    def run_all(batch: Any, *_: Any, **__: Any) -> list[sandbox.Outcome]:
        programs.extend(batch)
        return [sandbox.Outcome("passed", "", 0.0) for _ in batch]

    box = SimpleNamespace(run_all=run_all)
    for place in (sandbox, check):
        monkeypatch.setattr(place, "detect", lambda *_, **__: box, raising=False)
    monkeypatch.setattr(evaluate, "load", lambda name: _Metric())
    return programs


def code_pair(name: str, root: Path, shots: int, rows: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> Any:
    ours = our_task(name, root, shots, allow_code_execution=True)
    stock = stock_task(name, {"test": rows}, shots, monkeypatch)
    RAN.clear()  # lm-eval tries its metric when its file is imported, be it by this test or by one before
    return ours, stock


def assert_same_code_twins(ours: Any, stock: Any, limit: int) -> None:
    assert_same_requests(ours, stock, limit)
    assert ours.VERSION == {"mbpp_instruct": "1.0+block"}.get(ours.task_name, stock.VERSION)
    names = [
        [entry["name"] for entry in task.get_config("filter_list") or [{"name": "none"}]] for task in (ours, stock)
    ]
    assert names[0] == names[1]


@pytest.mark.parametrize(("name", "shots"), [(n, s) for n in CODE for s in numbers(n)])
def test_code_twin_on_inlined_rows(name, shots, tmp_path, monkeypatch, executed):
    root = write_local(tmp_path, name)
    assert_same_code_twins(*code_pair(name, root, shots, LOCAL[name][:2], monkeypatch), limit=2)


@pytest.mark.real
@pytest.mark.parametrize("name", CODE)
def test_code_twin_on_real_rows(name, shared_dir, monkeypatch, executed):
    benchmark = load_benchmark(name)
    rows = read_rows(shared_dir / "data" / benchmark.files["test"], benchmark.columns)
    shots = benchmark.num_fewshot(None)
    assert_same_code_twins(*code_pair(name, shared_dir / "data", shots, rows, monkeypatch), limit=40)


RESPONSES = {
    "humaneval": ["    return a + b\n", "    return '```'", ""],
    "humaneval_instruct": ["    return a + b\n```\nThat is all.\n```\n", "    return a", "```", ""],
    "mbpp": ["def plus(x):\r\n    return x + 4\n", "```python\ndef plus(x): ...\n```", ""],
    # where lm-eval's pattern is not led astray: see the next test
    "mbpp_instruct": ["\ndef plus(x):\n    return x + 4\n```\nThat is all.\n```\nno more", "\nx = 1\n```"],
}


@pytest.mark.parametrize("name", CODE)
def test_code_twin_executes_the_same_programs(name, tmp_path, monkeypatch, executed):
    ours, stock = code_pair(name, write_local(tmp_path, name), 0, LOCAL[name][:2], monkeypatch)
    metric, doc = ALL[name].headline, LOCAL[name][0]
    for response in RESPONSES[name]:
        assert scores(ours, doc, response) == scores(stock, doc, response) == {metric: 1.0}
    mine = [f"{program.code}\n{program.tests}" for program in executed]
    if name == "mbpp_instruct":  # only line breaks around the code differ
        mine = [text.lstrip("\n").replace("\n\nassert", "\nassert") for text in mine]
    assert mine == RAN and len(RAN) == len(RESPONSES[name])


@pytest.mark.parametrize(
    "response",
    ["def f(x):\n    return x\n```\nDone.", "def f(x):\n    return x\n", "```python\ndef f(x):\n    return x\n```"],
)
def test_mbpp_instruct_cuts_out_what_lm_eval_spoils(response, tmp_path, monkeypatch, executed):
    ours, stock = code_pair(
        "mbpp_instruct", write_local(tmp_path, "mbpp_instruct"), 0, LOCAL["mbpp_instruct"], monkeypatch
    )
    for task in (ours, stock):
        scores(task, LOCAL["mbpp_instruct"][0], response)
    assert executed[0].code.strip() == "def f(x):\n    return x"
    assert "def f(x)" not in RAN[0]  # should lm-eval mend its pattern, ours can be its again


@pytest.mark.parametrize(("name", "row"), [("mbpp", 0), ("mbpp_instruct", 1), ("humaneval_instruct", 1)])
def test_code_is_executed_and_judged(name, row, tmp_path):
    """In the sandbox, through the definition: the right program passes, that of another row does not."""
    root = write_local(tmp_path, name)
    task = our_task(name, root, 0, allow_code_execution=True)
    solution = "canonical_solution" if "humaneval" in name else "code"
    for other, earned in ((row, 1.0), (1 - row, 0.0)):
        assert scores(task, LOCAL[name][row], LOCAL[name][other][solution]) == {ALL[name].headline: earned}


# -- without local files -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name, benchmark in ALL.items() if benchmark.hub])
def test_without_local_files_the_hubs_rows_are_asked_for(name, monkeypatch, executed):
    """`data.root=null`: lm-eval's own task where it can be loaded, but for the numbers of the config and cola's added
    metric; else ours on the data set of the same place."""
    from datasets import Dataset
    from lm_eval.api.task import ConfigurableTask

    benchmark, asked = load_benchmark(name), []

    def in_memory(task: Any, *_: Any, **__: Any) -> None:
        asked.append((task.DATASET_PATH, task.DATASET_NAME))
        rows = [hub_row(name, row) for row in LOCAL[name]]
        task.dataset = dict.fromkeys(("train", "validation", "test"), Dataset.from_list(rows))

    monkeypatch.setattr(ConfigurableTask, "download", in_memory)
    monkeypatch.setattr(check, "is_offline", lambda: False)
    (planned,) = check_benchmarks([name], EvalConfig(num_fewshot=0, allow_code_execution=True), None).planned
    task = build_task(planned)
    assert asked == [(benchmark.hub.name, benchmark.hub.config)]
    assert task.task_name == name and task.get_config("num_fewshot") == 0
    assert benchmark.headline.split(",")[0] in task.aggregation()
    task.build_all_requests()
    assert len(task.instances) >= len(LOCAL[name])


def test_without_local_files_a_name_with_a_number_is_the_stock_task(monkeypatch):
    from datasets import Dataset
    from lm_eval.api.task import ConfigurableTask

    def in_memory(task: Any, *_: Any, **__: Any) -> None:
        task.dataset = dict.fromkeys(("train", "test"), Dataset.from_list(LOCAL["gsm8k"]))

    monkeypatch.setattr(ConfigurableTask, "download", in_memory)
    monkeypatch.setattr(check, "is_offline", lambda: False)
    (planned,) = check_benchmarks(["gsm8k@2"], EvalConfig(), None).planned
    task = build_task(planned)
    task.set_fewshot_seed(FEWSHOT_SEED)
    task.build_all_requests(limit=1)
    assert task.task_name == "gsm8k" and task.instances[0].args[0].count("Question:") == 3
    (planned,) = check_benchmarks(["gsm8k@4"], EvalConfig(), None).planned
    with pytest.raises(ConfigError, match="4 examples are more than gsm8k can draw: its pool has 3 rows"):
        build_task(planned)


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
