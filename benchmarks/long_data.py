"""A long file: how large, how quickly and in how much memory it is opened and drawn from.

    python -m benchmarks.long_data [--quick] [--json FILE]

A JSON-lines file is written into a temporary folder and opened on the way of a training run, in a process of its own:
every line checked, every row rendered once (`check`), and then batches drawn from random places. `peak_mib` is the
largest resident set of that process (VmHWM), and `growth_mib` how far that lies above what it held before it opened the
file, libraries and tokenizer loaded. The same for a tenth of the rows, so that the difference shows what a row costs
(`bytes_per_row`), and for `datasets.load_dataset("json")` with an empty cache, which is asked for as many rows.
"""

import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.measure import MIB, arguments, finish, table
from loramoe_train.training.memory import peak_resident

WORDS = "the quick brown fox jumps over a lazy dog while seven wizards quietly box and mix jugs of liquid".split()
STEPS, BATCH = 200, 16  # drawn from random places


def write(path: Path, rows: int) -> int:
    """A file of question-answer rows of 100 to 900 characters; its size in bytes."""
    draws = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        for number in range(rows):
            words = " ".join(draws.choices(WORDS, k=draws.randint(15, 160)))
            row = {
                "id": number,
                "question": f"{number}: {words}?",
                "answer": words[:40],
                "source": {"page": number % 97},
            }
            file.write(json.dumps(row) + "\n")
    return path.stat().st_size


def ours(path: Path) -> dict[str, float]:
    """Opened and drawn from as `loramoe-train` does it, with the tokenizer that ships with the package."""
    import torch  # noqa: F401  # as a run has it

    from loramoe_train.data.build import build_mixture
    from loramoe_train.data.stage import MixtureStage
    from loramoe_train.models import load_tokenizer
    from loramoe_train.schema.data import DataConfig, SamplingConfig
    from loramoe_train.schema.model import ModelConfig

    tokenizer = load_tokenizer(ModelConfig(name="tiny"))
    task = {"source": {"files": {"train": str(path)}}, "prompt": "{{question}}\n", "answer": "{{answer}}"}
    plain = {"tasks": ["long"], "definitions": {"long": task}, "max_length": 256, "validation_examples": 0}
    config = DataConfig.model_validate({**plain, "cache_dir": None})
    before, began = peak_resident(), time.perf_counter()
    mixture = build_mixture(config, tokenizer, check=False)
    opened = time.perf_counter()
    after_open = peak_resident()
    mixture.tasks[0].check()
    checked = time.perf_counter()
    stage = MixtureStage(mixture, mixture.plan(SamplingConfig()), batch_size=BATCH, micro_batch_size=BATCH)
    places = random.Random(1).sample(range(len(mixture.tasks[0]) // BATCH), STEPS)
    for step in places:
        list(stage.steps(start=step, stop=step + 1))
    return {
        "rows": len(mixture.tasks[0]),
        "open_s": opened - began,
        "check_s": checked - opened,
        "draw_s": time.perf_counter() - checked,
        "open_growth_mib": (after_open - before) / MIB,
        "growth_mib": (peak_resident() - before) / MIB,
        "peak_mib": peak_resident() / MIB,
    }


def datasets_json(path: Path) -> dict[str, float]:
    import torch  # noqa: F401
    from datasets import load_dataset
    from datasets.utils import logging

    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as cache:
        before, began = peak_resident(), time.perf_counter()
        rows = load_dataset("json", data_files=str(path), split="train", cache_dir=cache)
        opened = time.perf_counter()
        after_open = peak_resident()
        for index in random.Random(1).sample(range(len(rows)), STEPS * BATCH):
            rows[index]
        return {
            "rows": len(rows),
            "open_s": opened - began,
            "draw_s": time.perf_counter() - opened,
            "open_growth_mib": (after_open - before) / MIB,
            "growth_mib": (peak_resident() - before) / MIB,
            "peak_mib": peak_resident() / MIB,
        }


READERS = {"ours": ours, "datasets_json": datasets_json}


def child(reader: str, path: Path) -> dict[str, float]:
    """Measured in a fresh process."""
    command = [sys.executable, "-m", "benchmarks.long_data", "--child", reader, "--file", str(path)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"long_data: {reader} failed with code {done.returncode}:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main(given: Sequence[str] | None = None) -> dict[str, Any]:
    options = arguments(
        "long_data",
        __doc__,
        given,
        rows={"type": int, "help": "of the longer file"},
        child={"choices": list(READERS), "help": "for its own use"},
        file={"type": Path, "help": "for its own use"},
    )
    if options.child:
        print(json.dumps(READERS[options.child](options.file)))
        return {}
    many = options.rows or (40_000 if options.quick else 1_000_000)
    report: dict[str, Any] = {"file_mib": {}, "readers": {}}
    with tempfile.TemporaryDirectory() as folder:
        for rows in (many // 10, many):
            path = Path(folder) / f"{rows}.jsonl"
            report["file_mib"][str(rows)] = write(path, rows) / MIB
            for reader in READERS:
                report["readers"].setdefault(reader, {})[str(rows)] = child(reader, path)
            path.unlink()
    for reader, found in report["readers"].items():
        few, all_of_them = found.values()
        difference = (all_of_them["growth_mib"] - few["growth_mib"]) * MIB
        all_of_them["bytes_per_row"] = difference / (all_of_them["rows"] - few["rows"])
        table(f"{reader}, file of {report['file_mib'][str(many)]:,.0f} MiB", found)
    finish(report, options.json)
    return report


if __name__ == "__main__":
    main()
