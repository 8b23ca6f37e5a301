"""From a planned benchmark to the dict that lm-eval builds a task from; plain data and callables, no lm-eval here."""

from collections.abc import Callable, Mapping
from copy import deepcopy
from typing import Any

from loramoe_train.evaluation.check import Planned
from loramoe_train.evaluation.pass_at_k import OnProgram, assembler, code_scoring
from loramoe_train.evaluation.rows import read_rows


def settings(planned: Planned, on_program: OnProgram | None) -> dict[str, Any]:
    """What this run decides about a task, whether its definition is ours or the stock one.

    `on_program` hears of each program of the model's that has been run.
    """
    benchmark = planned.benchmark
    metrics = deepcopy(benchmark.task["metric_list"])  # lm-eval changes what it is given
    decided: dict[str, Any] = {"num_fewshot": planned.num_fewshot, "metric_list": metrics}
    if benchmark.generates:
        decided["generation_kwargs"] = {**benchmark.task["generation_kwargs"], "max_gen_toks": planned.new_tokens}
    if benchmark.executes_code:
        assert benchmark.code is not None and planned.sandbox is not None
        metric, filter_name = benchmark.headline.split(",")
        assemble = assembler(benchmark.code, benchmark.task["doc_to_target"])
        run = planned.sandbox.run_all
        decided |= code_scoring(run, assemble=assemble, metric=metric, filter_name=filter_name, on_program=on_program)
    return decided


def local_definition(planned: Planned, on_program: OnProgram | None = None) -> dict[str, Any]:
    """Our definition, on the rows of the local files. Raises DataError, naming file and line, for a malformed row."""
    assert planned.files is not None
    benchmark = planned.benchmark
    # lm-eval reads every split that a definition names, and some local sets lack those that this run does not need
    unused = {key for key in benchmark.task if key.endswith("_split") and benchmark.task[key] not in planned.files}
    task = {key: deepcopy(value) for key, value in benchmark.task.items() if key not in unused}
    rows = {split: read_rows(path, benchmark.columns) for split, path in planned.files.items()}
    return {**task, **settings(planned, on_program), "task": benchmark.name, "custom_dataset": _in_memory(rows)}


def hub_definition(planned: Planned, on_program: OnProgram | None = None) -> dict[str, Any]:
    """Our definition on the hub's data set, for the one task whose stock file cannot be used."""
    benchmark = planned.benchmark
    assert benchmark.hub is not None
    data = {"dataset_path": benchmark.hub.name, "dataset_name": benchmark.hub.config}
    return {**deepcopy(benchmark.task), **settings(planned, on_program), **data, "task": benchmark.name}


def stock_definition(planned: Planned, on_program: OnProgram | None = None) -> dict[str, Any]:
    """What we change in the stock definition of the same name. The metrics are ours: cola's accuracy is not stock."""
    return {"task": planned.benchmark.name, **settings(planned, on_program)}


def _in_memory(rows: Mapping[str, list[dict[str, Any]]]) -> Callable[..., Any]:
    """lm-eval's hook for data that is there already; it passes the task's metadata along."""

    def load(**_metadata: Any) -> dict[str, Any]:
        from datasets import Dataset

        return {split: Dataset.from_list(found) for split, found in rows.items()}

    return load
