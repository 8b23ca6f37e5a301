"""How long a user waits: for help, for a composed config, for a plan, and for the first optimizer step.

    python -m benchmarks.startup --data-root DATA --model SMOLLM2_FOLDER [--quick] [--json FILE]

Whole commands as a user types them, each in a process of its own, taking turns. `imports` is the floor of everything
that needs a model: a Python that imports torch, transformers, accelerate and peft. `first_step` is the time from the
start of `loramoe-train` to its first line in metrics.jsonl (eight experts on q, k, v and o, eight examples of GSM8K,
ARC-Easy and SST-2), `cold` with an empty cache of tokenised examples and `warm` with what the run before left in it.
`trl_first_step` is the same for SFTTrainer with PEFT's LoRA on the same rendered examples (see `end_to_end.py`); it is
given them as text in memory.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.end_to_end import child
from benchmarks.end_to_end_runs import Settings
from benchmarks.measure import arguments, finish, table

POLL_S = 0.02
IMPORTS = "import torch, transformers, accelerate, peft"


def run(command: Sequence[str], env: dict[str, str]) -> float:
    """Seconds until a command ends. Raises SystemExit with its last words if it fails."""
    began = time.perf_counter()
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"startup: {' '.join(command)} failed with code {done.returncode}:\n{done.stderr[-2000:]}")
    return time.perf_counter() - began


def first_step(overrides: Sequence[str], env: dict[str, str]) -> float:
    """Seconds from the start of a training run to the line that its first step writes."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "run" / "metrics.jsonl"
        command = [sys.executable, "-m", "loramoe_train", *overrides, f"run_dir={folder}/run"]
        began = time.perf_counter()
        process = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        seconds = None
        while process.poll() is None:
            if seconds is None and log.is_file() and '"kind": "train"' in log.read_text(encoding="utf-8"):
                seconds = time.perf_counter() - began
            time.sleep(POLL_S)
        if process.returncode or seconds is None:
            assert process.stderr is not None
            raise SystemExit(
                f"startup: the run failed with code {process.returncode}:\n{process.stderr.read()[-2000:]}"
            )
        return seconds


def training(model: str, data_root: str) -> list[str]:
    return [
        "model=smollm2_135m",
        f"model.path={model}",
        "experts.sites=[attn_in,attn_out]",
        "experts.layout=8",
        "router=topk",
        "router.top_k=2",
        "data.tasks=[gsm8k,arc_easy,sst2]",
        f"data.root={data_root}",
        "data.sampling.strategy=equal",
        "data.validation_examples=0",
        "data.max_length=512",
        "trainer.batch_size=8",
        "trainer.max_steps=1",
        "trainer.log_every=1",
        "eval.enabled=false",
    ]


def main(given: Sequence[str] | None = None) -> dict[str, Any]:
    needed = {"data_root": {"required": True}, "model": {"required": True}, "without_peer": {"action": "store_true"}}
    options = arguments("startup", __doc__, given, **needed)
    model, data_root = (str(Path(text).expanduser().resolve()) for text in (options.model, options.data_root))
    overrides, settings = training(model, data_root), Settings(data_root, model, batch_size=8, steps=3, warmup=1)
    rounds, peer = options.rounds or (2 if options.quick else 5), not options.without_peer
    with tempfile.TemporaryDirectory() as cache:
        env = {**os.environ, "HF_HUB_OFFLINE": "1", "XDG_CACHE_HOME": cache}
        program = [sys.executable, "-m", "loramoe_train"]

        def cold() -> float:
            with tempfile.TemporaryDirectory() as empty:
                return first_step(overrides, {**env, "XDG_CACHE_HOME": empty})

        def trl() -> float:
            found = child("trl_padded", settings)
            return found["startup_s"] + found["first_step_s"]

        calls: dict[str, Callable[[], float]] = {
            "imports": lambda: run([sys.executable, "-c", IMPORTS], env),
            "help": lambda: run([*program, "--help"], env),
            "config": lambda: run([*program, "+recipe=lora_mixer", "--cfg", "job"], env),
            "first_step_cold": cold,
            "first_step_warm": lambda: first_step(overrides, env),
            **({"trl_first_step": trl} if peer else {}),
        }
        calls["first_step_warm"]()  # fills the cache
        samples: dict[str, list[float]] = {name: [] for name in calls}
        for number in range(rounds):
            for name in list(calls) if number % 2 == 0 else list(calls)[::-1]:
                samples[name].append(calls[name]())
    rows = {name: {"seconds": statistics.median(values), "best": min(values)} for name, values in samples.items()}
    table("seconds", rows)
    report = {"seconds": rows, "rounds": rounds, "samples": samples}
    finish(report, options.json)
    print(json.dumps({"first_optimizer_step_s": rows["first_step_warm"]["seconds"]}))
    return report


if __name__ == "__main__":
    main()
