"""lm-eval's own command line on local rows: its stock definitions, read from YAML files that only replace the data set.

For `parity.py`, which compares its samples with ours item by item, and `evaluation.py`, which compares the times.
"""

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lm_eval.tasks
import yaml

from loramoe_train.evaluation.check import Planned
from loramoe_train.evaluation.rows import read_rows

SUFFIX = "_local"  # a name of their own, so that nothing stock is meant
Row = dict[str, Any]


def _medqa_of_the_hub(row: Row) -> Row:
    endings = {f"ending{n}": row["options"][letter] for n, letter in enumerate("ABCD")}
    return {"sent1": row["question"], "sent2": "", **endings, "label": "ABCD".index(row["answer_idx"])}


HUB_ROWS: dict[str, Callable[[Row], Row]] = {"medqa_4options": _medqa_of_the_hub}  # where the stock columns are others


@dataclass(frozen=True)
class Call:
    """One run of lm-eval's command line."""

    samples: dict[str, list[Row]]  # benchmark -> its log, one entry per document and filter
    results: dict[str, Row]  # benchmark -> metrics
    seconds: float
    cpu_seconds: float


def write_tasks(folder: Path, planned: Sequence[Planned]) -> Path:
    """Task files and their rows in `folder`, for `--include_path`. HumanEval's stock file cannot be read offline, so
    its settings are written out, with a metric that runs nothing."""
    for each in planned:
        benchmark = each.benchmark
        assert each.files is not None
        files = {}
        for split, source in each.files.items():
            files[split] = str(folder / f"{benchmark.name}-{split}.jsonl")
            convert = HUB_ROWS.get(benchmark.name, lambda row: row)
            lines = [json.dumps(convert(row)) + "\n" for row in read_rows(source, benchmark.columns)]
            Path(files[split]).write_text("".join(lines), encoding="utf-8")
        task: Row = {"task": benchmark.name + SUFFIX, "tag": None}
        if benchmark.stock is not None:
            task["include"] = str(Path(lm_eval.tasks.__file__).parent / benchmark.stock)
            absent = [key for key in benchmark.task if key.endswith("_split") and benchmark.task[key] not in files]
            task |= dict.fromkeys(absent)
        else:
            shown = {key: value for key, value in benchmark.task.items() if key != "unsafe_code"}
            task |= {**shown, "metric_list": [{"metric": "exact_match"}]}
        if any(metric["metric"] == "mcc" for metric in benchmark.task["metric_list"]):
            # for the error of MCC the command line draws 100,000 samples, minutes for whatever few documents
            task["metric_list"] = [metric for metric in benchmark.task["metric_list"] if metric["metric"] != "mcc"]
        if benchmark.generates:
            task["generation_kwargs"] = {**benchmark.task["generation_kwargs"], "max_gen_toks": each.new_tokens}
        task |= {"num_fewshot": each.num_fewshot, "dataset_path": "json", "dataset_name": None}
        task["dataset_kwargs"] = {"data_files": files}
        (folder / f"{benchmark.name}{SUFFIX}.yaml").write_text(yaml.safe_dump(task), encoding="utf-8")
    return folder


def run_cli(
    model: Path, planned: Sequence[Planned], tasks: Path, *, limit: int | None, batch_size: int, device: str
) -> Call:
    """Score a model folder in float32 in a process of its own. SystemExit with its last words if that fails.

    `tasks`: what `write_tasks` returned; the output is put into a folder there.
    """
    out = tasks / f"out-{time.monotonic_ns()}"
    command = [sys.executable, "-m", "lm_eval", "run", "--model", "hf"]
    command += ["--model_args", f"pretrained={model},dtype=float32", "--device", device]
    command += ["--tasks", ",".join(each.benchmark.name + SUFFIX for each in planned), "--include_path", str(tasks)]
    command += ["--batch_size", str(batch_size), "--output_path", str(out), "--log_samples"]
    command += ["--limit", str(limit)] if limit else []
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tasks / "hf")}
    began, cpu = time.perf_counter(), cpu_of_children()
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    seconds, cpu_seconds = time.perf_counter() - began, cpu_of_children() - cpu
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed with code {done.returncode}:\n{done.stderr[-3000:]}")
    (report,) = out.rglob("results_*.json")
    results = json.loads(report.read_text(encoding="utf-8"))["results"]
    samples = {}
    for each in planned:
        name = each.benchmark.name + SUFFIX
        (log,) = out.rglob(f"samples_{name}_*.jsonl")
        samples[each.benchmark.name] = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    return Call(samples, {n.removesuffix(SUFFIX): values for n, values in results.items()}, seconds, cpu_seconds)


def cpu_of_children() -> float:
    """Processor seconds, user and system, of all children that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@dataclass
class Agreement:
    """Our samples of one benchmark beside those of the command line."""

    documents: int = 0
    likelihoods: int = 0
    texts: int = 0
    metrics: int = 0  # values compared, one per document, metric and filter
    largest: float = 0.0  # difference of two log-likelihoods
    unequal: int = 0  # prompts, greedy flags, texts and metrics that differ

    def plain(self) -> dict[str, float]:
        return dict(vars(self))


def shown(row: Mapping[str, float]) -> Row:
    """`Agreement.plain()` for a table: differences in the seventh digit are to be seen."""
    return {**row, "largest": f"{row['largest']:.1e}"}


def agreement(ours: Sequence[Mapping[str, Any]], theirs: Sequence[Mapping[str, Any]]) -> Agreement:
    """Compare tidy samples of ours with entries of the command line's log, item by item.

    ValueError where they are not of the same documents.
    """
    found, by_doc = Agreement(), {sample["doc_id"]: sample for sample in ours}
    seen = set()
    for entry in theirs:
        sample = by_doc[entry["doc_id"]]
        found.unequal += sample["prompt_hash"] != entry["prompt_hash"]
        for metric in entry["metrics"]:
            key = f"{metric},{entry['filter']}"
            if key in sample["metrics"]:  # HumanEval is not scored there
                found.metrics += 1
                found.unequal += sample["metrics"][key] != entry[metric]
        if entry["doc_id"] in seen:
            continue
        seen.add(entry["doc_id"])
        found.documents += 1
        if "log_likelihoods" in sample:
            answers = [response[0] for response in entry["resps"]]
            for mine, greedy, (value, same) in zip(sample["log_likelihoods"], sample["greedy"], answers, strict=True):
                found.likelihoods += 1
                found.largest = max(found.largest, abs(mine - float(value)))
                found.unequal += greedy != (str(same) == "True")
        else:
            found.texts += 1
            found.unequal += sample["responses"] != entry["resps"][0]
    if seen != by_doc.keys():
        raise ValueError(f"one side scored {len(by_doc)} documents, the other {len(seen)}")
    return found
