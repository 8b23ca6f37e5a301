"""A whole training run: our trainer with eight routed experts against TRL's SFTTrainer with PEFT's plain LoRA.

    python -m benchmarks.end_to_end --data-root DATA --model SMOLLM2_FOLDER [--quick] [--json FILE]

Both sides get the same rendered prompts and answers of GSM8K, ARC-Easy, ARC-Challenge and SST-2 (equally often, in the
order of our sampling plan), the same base in the same dtype, AdamW (fused) at the same constant learning rate, the same
clipping, the same examples per optimizer step and the same maximal length; the loss is on the answers alone. Ours has
eight experts of rank 8, the best two for each token, on q, k, v and o; LoRA has rank 16 there, so a token passes
through as many adapter parameters.

Each run is a process of its own, and the candidates take turns (A B C A B C ...). Before anything is timed, every
candidate computes the loss of one common batch: a fresh adapter adds nothing, so all must give the base model's loss,
on equally many supervised tokens. Time is counted from the start of step `warmup` to the end of the last step, with
everything between two steps in it, and examples by their tokens, for a full row need not hold the same examples as a
padded batch; start-up (process start to the first step) is reported apart. The peer's figure is
that of its fastest setting in the run:

| setting | what it is |
|---|---|
| trl_padded | eight examples a forward pass in the given order, padded to the longest |
| trl_single | one example a forward pass: no padding and no mask |
| trl_grouped | examples of similar length together (`group_by_length`), which also changes which ones share a step |
| trl_flat | `padding_free`: a micro-batch as one row, without flash attention isolated by a dense mask |
| trl_packed | `packing` with the strategy `bfd`: full rows of `max_length`, isolated in the same way |

Left out: `wrapped` packing, which lets examples attend to each other and cuts them in two (its loss on the common batch
differs), and gradient checkpointing (TRL's default), which is slower; nothing here runs out of memory.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from benchmarks.end_to_end_runs import OURS, PEERS, Settings, run_ours, run_trl

TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2}  # of the common loss: rounding, in another order


def child(name: str, settings: Settings, *, profile: bool = False) -> dict[str, Any]:
    """Run one candidate in a fresh process. Raises SystemExit with its last words when it fails."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "result.json"
        asked = json.dumps(asdict(replace(settings, started=time.time())))
        command = [sys.executable, "-m", "benchmarks.end_to_end", "--child", name, "--settings", asked]
        env = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        done = subprocess.run(
            [*command, "--json", str(out), *(["--profile"] if profile else [])], env=env, capture_output=True, text=True
        )
        if done.returncode or not out.is_file():
            raise SystemExit(f"end_to_end: {name} failed with code {done.returncode}:\n{done.stderr[-3000:]}")
        return json.loads(out.read_text(encoding="utf-8"))


def check(names: list[str], settings: Settings) -> dict[str, dict[str, Any]]:
    """Every candidate's loss on the common batch. Raises SystemExit where they do not see the same."""
    found = {name: child(name, replace(settings, check=True)) for name in names}
    first = found[names[0]]
    for name, result in found.items():
        off = abs(result["loss"] - first["loss"]) / first["loss"]
        if result["supervised"] != first["supervised"] or off > TOLERANCE[settings.dtype]:
            raise SystemExit(f"end_to_end: {name} does not train on the same: {result}, {names[0]}: {first}")
    return found


def compare(names: list[str], settings: Settings, rounds: int) -> dict[str, dict[str, Any]]:
    """name -> medians over the rounds of what `Meter.result` says."""
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for number in range(rounds):
        for name in names if number % 2 == 0 else names[::-1]:
            runs[name].append(child(name, settings))
            print(f"round {number + 1}: {name}: {runs[name][-1]['examples_per_s']:.2f} examples/s", flush=True)
    return {name: {key: statistics.median(run[key] for run in all_) for key in all_[0]} for name, all_ in runs.items()}


def ratios(medians: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Our best against the peer's best, each by examples per second."""
    best = {
        side: max((n for n in medians if n in known), key=lambda n: medians[n]["examples_per_s"])
        for side, known in (("ours", OURS), ("peer", PEERS))
    }
    ours, peer = medians[best["ours"]], medians[best["peer"]]
    keys = ("examples_per_s", "supervised_tokens_per_s", "peak_rss_mib", "startup_s")
    return {**best, **{key: ours[key] / peer[key] for key in keys}}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.end_to_end", description=__doc__.splitlines()[0])
    parser.add_argument("--data-root", help="folder of the tasks' files, as data.root")
    parser.add_argument("--model", help="folder of SmolLM2-135M-Instruct")
    parser.add_argument("--dtype", choices=sorted(TOLERANCE), default="float32", help="of the frozen base")
    parser.add_argument("--autocast", action="store_true", help="bf16 autocast on both sides")
    parser.add_argument("--candidates", nargs="+", choices=[*OURS, *PEERS], help="default: the fastest of both sides")
    parser.add_argument("--steps", type=int, help="optimizer steps of a run")
    parser.add_argument("--rounds", type=int, help="runs of each candidate")
    parser.add_argument("--quick", action="store_true", help="under eight minutes on two cores")
    parser.add_argument("--profile", action="store_true", help="also say where our time goes")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--settings", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.child:
        settings = Settings(**json.loads(given.settings))
        side = run_ours(settings, given.child, profile=given.profile) if given.child in OURS else None
        given.json.write_text(json.dumps(side or run_trl(settings, given.child)), encoding="utf-8")
        return
    if not (given.data_root and given.model):
        parser.error("give --data-root and --model")
    settings = Settings(
        str(Path(given.data_root).expanduser().resolve()),
        str(Path(given.model).expanduser().resolve()),
        dtype=given.dtype,
        autocast=given.autocast,
        steps=given.steps or (5 if given.quick else 16),
    )
    names = given.candidates or ["ours_packed", "trl_packed", "trl_flat"]
    report = {"machine": machine(), "settings": asdict(settings), "common_batch": check(names, settings)}
    print(f"common batch: {report['common_batch']}", flush=True)
    report["medians"] = compare(names, settings, given.rounds or (1 if given.quick else 3))
    if any(n in OURS for n in names) and any(n in PEERS for n in names):
        report["ratio"] = ratios(report["medians"])
    if given.profile:
        ours = report["ratio"]["ours"] if "ratio" in report else next(n for n in names if n in OURS)
        report["profile"] = child(ours, settings, profile=True)["profile"]
    show(report)
    if given.json:
        given.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def machine() -> dict[str, Any]:
    from importlib.metadata import version

    packages = ("torch", "transformers", "peft", "trl", "accelerate")
    threads = os.environ.get("OMP_NUM_THREADS", "not set")
    return {
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "OMP_NUM_THREADS": threads,
        **{package: version(package) for package in packages},
    }


def show(report: dict[str, Any]) -> None:
    keys = list(next(iter(report["medians"].values())))
    print("".join(f"{text:>24}" for text in ("", *report["medians"])))
    for key in keys:
        print(f"{key:>24}" + "".join(f"{medians[key]:24.3f}" for medians in report["medians"].values()))
    for key, value in report.get("ratio", {}).items():
        print(f"{'ratio ' + key:>32} {value if isinstance(value, str) else format(value, '.3f')}")
    for row in report.get("profile", []):
        print(f"{row['seconds'] * 1e3:10.1f} ms/step {row['calls']:8.1f} calls/step  {row['where']}")


if __name__ == "__main__":
    main()
