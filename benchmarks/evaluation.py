"""Base and tuned model on the seven benchmarks of LoRA-Mixer: `loramoe-eval` against lm-eval's command line, run twice.

    python -m benchmarks.evaluation --data-root DATA --model SMOLLM2_FOLDER [--quick] [--limit N] [--json FILE]

Ours is one process that scores an adapter and the base below it. Theirs are two: the base folder, and a folder with the
adapter merged into the weights by PEFT, which is what a user of the command line would make. All three count from the
start of the process to its end, imports, loading and writing included; they take turns. The adapter is a plain LoRA of
one training step, so that both sides generate texts of the base's lengths. All is float32, the first N rows of each
benchmark, the same prompts; lm-eval runs with `--batch_size 16` (its own default is 1).

In favour of lm-eval: HumanEval's completions are executed on our side alone, and its bootstrap of CoLA's MCC, minutes
of its own, is left out (see `lm_eval_cli.py`). Base samples of both are compared item by item in the same run.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.lm_eval_cli import Call, agreement, cpu_of_children, run_cli, shown, write_tasks
from benchmarks.measure import arguments, finish, ratio, table, times
from benchmarks.parity import OPTIONS
from loramoe_train.evaluation.check import check_benchmarks
from loramoe_train.schema.evaluation import EvalConfig

ONE_STEP = (
    "+recipe=lora",
    "model=smollm2_135m",
    "data.tasks=[sst2]",
    "data.max_examples=16",
    "data.validation_examples=0",
    "data.max_length=128",
    "trainer.batch_size=4",
    "trainer.max_steps=1",
    "trainer.log_every=1",
    "eval.enabled=false",
)


def run_ours(program: str, *arguments: str) -> tuple[float, float]:
    """(wall, CPU) seconds of `loramoe-PROGRAM ARGUMENTS`. SystemExit with its last words if it fails."""
    call = f"from loramoe_train.cli import {program}; {program}()"
    began, cpu = time.perf_counter(), cpu_of_children()
    env = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", call, *arguments], env=env, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{program} {' '.join(arguments)} failed with code {done.returncode}:\n{done.stderr[-3000:]}")
    return time.perf_counter() - began, cpu_of_children() - cpu


def make_adapter(folder: Path, model: Path, data_root: str) -> tuple[Path, Path]:
    """(run folder of a plain LoRA, model folder with that LoRA merged)."""
    run, exported, merged = folder / "run", folder / "lora", folder / "merged"
    run_ours("train", *ONE_STEP, f"model.path={model}", f"data.root={data_root}", f"run_dir={run}")
    run_ours("export", str(run), str(exported))

    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    PeftModel.from_pretrained(base, exported).merge_and_unload().save_pretrained(merged)
    AutoTokenizer.from_pretrained(model).save_pretrained(merged)
    return run, merged


def main(given: Sequence[str] | None = None) -> dict[str, Any]:
    options = arguments("evaluation", __doc__, given, **OPTIONS)
    limit, rounds = options.limit or (8 if options.quick else 16), options.rounds or 1
    model, data_root = Path(options.model).expanduser().resolve(), str(Path(options.data_root).expanduser().resolve())
    wanted = {"limit": limit, "num_fewshot": options.num_fewshot, "max_new_tokens": options.new_tokens}
    config = EvalConfig(**wanted, allow_code_execution=True)
    planned = check_benchmarks(options.tasks.split(","), config, data_root).planned
    overrides = [f"eval.{key}={'null' if value is None else value}" for key, value in wanted.items()]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run, merged = make_adapter(folder, model, data_root)
        tasks = folder / "tasks"
        tasks.mkdir()
        write_tasks(tasks, planned)
        walls: dict[str, list[float]] = {"ours": [], "lm_eval_base": [], "lm_eval_merged": []}
        cpus: dict[str, list[float]] = {key: [] for key in walls}
        calls: dict[str, Call] = {}
        out: list[Path] = []

        def ours() -> tuple[float, float]:
            names = f"eval.tasks=[{options.tasks}]"
            out.append(folder / f"ours-{len(out)}")  # an evaluation that finds its own results might not repeat it
            allowed = "eval.allow_code_execution=true"
            return run_ours("evaluate", str(run), names, *overrides, allowed, f"run_dir={out[-1]}")

        def theirs(key: str, scored: Path) -> tuple[float, float]:
            calls[key] = run_cli(
                scored, planned, tasks, limit=limit, batch_size=options.batch_size, device=options.device
            )
            return calls[key].seconds, calls[key].cpu_seconds

        candidates: dict[str, Callable[[], tuple[float, float]]] = {
            "ours": ours,
            "lm_eval_base": lambda: theirs("lm_eval_base", model),
            "lm_eval_merged": lambda: theirs("lm_eval_merged", merged),
        }
        for number in range(rounds):
            for key in list(candidates) if number % 2 == 0 else list(candidates)[::-1]:
                wall, cpu = candidates[key]()
                walls[key].append(wall)
                cpus[key].append(cpu)
                print(f"round {number + 1}: {key}: {wall:.1f} s, of processors {cpu:.1f} s", flush=True)
        found = _agreement_of_bases(out[-1], calls["lm_eval_base"])
    report: dict[str, Any] = {"limit": limit, "new_tokens": options.new_tokens, "rounds": rounds}
    for kind, samples in (("wall", walls), ("processor", cpus)):
        samples["lm_eval_both"] = [sum(pair) for pair in zip(*list(samples.values())[1:], strict=True)]
        report[kind] = times(samples, to=("lm_eval_both",))
        table(f"{kind} seconds, {limit} rows of each benchmark", report[kind])
    report |= {"ours_to_lm_eval": ratio(walls, "ours", "lm_eval_both"), "agreement_of_bases": found}
    table("base samples of ours and theirs", {name: shown(row) for name, row in found.items()})
    print(f"base and tuned: {report['ours_to_lm_eval']:.2f} of the time of lm-eval's command line on both folders")
    finish(report, options.json)
    return report


def _agreement_of_bases(ours: Path, theirs: Call) -> dict[str, dict[str, float]]:
    found = {}
    for name, entries in theirs.samples.items():
        log = ours / "samples" / f"{name}.base.jsonl"
        lines = log.read_text(encoding="utf-8").splitlines()
        found[name] = agreement([json.loads(line) for line in lines], entries).plain()
    return found


if __name__ == "__main__":
    main()
