"""Finished parts of an evaluation on disk: one side (base or tuned) of one benchmark each.

`samples/NAME.SIDE.json` is the record of a unit: its scores, what each document scored, and the facts that decided all
that. It is written as soon as the unit is there, after the samples (`NAME.SIDE.jsonl`) that it names by their checksum.
An interrupted evaluation that is started again takes the units whose facts are still the same, and `loramoe-compare`
pairs the documents of two of them.
"""

import gzip
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from loramoe_train.errors import DataError, LoramoeError
from loramoe_train.evaluation.check import Planned
from loramoe_train.evaluation.results import commit, finite, versions, write_samples
from loramoe_train.evaluation.types import BenchmarkResult, Side
from loramoe_train.files import read_json, sha256, write_json
from loramoe_train.schema.evaluation import EvalConfig

FORMAT, VERSION = "loramoe_train.unit", 1
SAMPLES = "samples"  # folder below that of results.json
SCORED = tuple(field.name for field in fields(BenchmarkResult) if field.name != "samples")
Facts = dict[str, Any]
# keys of `eval` that decide no score, or whose settled value stands among the facts
NOT_DECIDING = frozenset(
    "enabled tasks serve_as base num_fewshot batch_size generation_batch_size max_new_tokens save_samples again"
    " allow_code_execution".split()
)
OF_CODE = frozenset(("sandbox", "code"))  # decide where what the model wrote is run


@dataclass(frozen=True)
class Unit:
    """A unit as its record has it."""

    result: BenchmarkResult  # its samples hold `doc_id`, `hash` and `metrics` alone
    facts: Facts
    commit: str | None
    samples_sha256: str | None  # None: they were not kept


def write_unit(folder: Path, side: Side, result: BenchmarkResult, facts: Facts, *, save_samples: bool) -> None:
    """Samples, where they are wished for, and then the record that vouches for them. Raises OSError (a full disk)."""
    samples = _samples(folder, result.name, side)
    if save_samples:
        write_samples(folder, result.name, side, result.samples)
    else:
        folder.mkdir(parents=True, exist_ok=True)
        samples.unlink(missing_ok=True)  # those of another evaluation
    documents = [
        {"doc_id": sample["doc_id"], "hash": document_hash(sample), "metrics": sample["metrics"]}
        for sample in result.samples
    ]
    record = {
        "format": FORMAT,
        "version": VERSION,
        "side": side,
        "result": {key: getattr(result, key) for key in SCORED},
        "facts": facts,
        "commit": commit(),
        "samples_sha256": sha256(samples) if save_samples else None,
        "documents": documents,
    }
    write_json(_record(folder, result.name, side), finite(record))


def read_unit(folder: Path, name: str, side: Side) -> Unit:
    """The unit that a record describes.

    Raises:
        MissingFileError: there is no record.
        DataError: it is damaged, naming the file, and the line where that is no JSON.
    """
    path = _record(folder, name, side)
    record = read_json(path)
    if record.get("format") != FORMAT or record.get("version") != VERSION:
        raise DataError(f"{path} is no record of an evaluation in version {VERSION}; evaluate again")
    try:
        stored = dict(record["result"])
        documents = [_document(entry, stored["metric"]) for entry in record["documents"]]
        result = BenchmarkResult(**{key: stored[key] for key in SCORED}, samples=documents)
        if result.name != name or len(documents) != result.n or not isinstance(result.score, int | float):
            raise ValueError(f"it holds {len(documents)} documents of {result.name}, and says {result.n} of {name}")
        numbers = (result.seconds, result.truncated, *result.metrics.values(), *result.stderrs.values())
        are_numbers = all(isinstance(number, int | float | None) for number in numbers)
        if result.metrics.keys() != result.stderrs.keys() or not are_numbers:
            raise ValueError("something that must be a number is none")
        facts = {**record["facts"], **{key: dict(record["facts"][key]) for key in ("task", "versions")}}
        return Unit(result, facts, record["commit"], record["samples_sha256"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"{path} is damaged ({error}); evaluate again") from error


def reusable(folder: Path, name: str, side: Side, facts: Facts, *, save_samples: bool) -> Unit | None:
    """The unit if it was made under the same facts and, where they are wished for, its samples are whole."""
    try:
        unit = read_unit(folder, name, side)
        samples = _samples(folder, name, side)
        if save_samples and (unit.samples_sha256 is None or sha256(samples) != unit.samples_sha256):
            return None
    except (LoramoeError, OSError):  # absent or damaged: it is made again
        return None
    return unit if unit.facts == json.loads(json.dumps(facts)) else None


def task_facts(planned: Planned, config: EvalConfig) -> Facts:
    """What decides the prompts of a benchmark and how answers are scored: a key of `eval` does unless it is known not
    to, so that a new one repeats too much rather than too little."""
    benchmark = planned.benchmark
    idle = NOT_DECIDING if benchmark.executes_code else NOT_DECIDING | OF_CODE
    deciding = {key: value for key, value in config.model_dump(mode="json").items() if key not in idle}
    data: Facts = {split: _rows_sha256(path) for split, path in (planned.files or {}).items()}
    if planned.files is None and benchmark.hub is not None:
        data = {"hub": benchmark.hub.name, "config": benchmark.hub.config}
    return {
        "definition_sha256": facts_sha256(benchmark.model_dump(mode="json")),
        "data": data,
        "num_fewshot": planned.num_fewshot,
        "new_tokens": planned.new_tokens,
        **deciding,
    }


def facts_of(task: Facts, model: Facts, seed: int) -> Facts:
    """Everything that decides a score. `model`: what identifies the weights and what is made of them."""
    return {"task": task, "model": model, "seed": seed, "versions": versions()}


def facts_sha256(facts: Any) -> str:
    """Of plain values as canonical JSON."""
    text = json.dumps(facts, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def document_hash(sample: Mapping[str, Any]) -> str:
    """Of what was asked and what is right, the same for every model."""
    asked = {key: sample.get(key) for key in ("doc", "prompt", "target", "continuations")}
    return facts_sha256(finite(asked))[:16]


def _document(entry: Any, metric: str) -> dict[str, Any]:
    document = {key: entry[key] for key in ("doc_id", "hash", "metrics")}
    values = [document["metrics"][metric], *document["metrics"].values()]
    if not all(isinstance(value, int | float | list | None) for value in values):
        raise ValueError(f"document {entry['doc_id']} has a metric that is no number")
    return document


def _rows_sha256(path: Path) -> str:
    """Of a file's rows, packed or not."""
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        return hashlib.sha256(file.read()).hexdigest()


def _record(folder: Path, name: str, side: Side) -> Path:
    return folder / f"{name}.{side}.json"


def _samples(folder: Path, name: str, side: Side) -> Path:
    return folder / f"{name}.{side}.jsonl"
