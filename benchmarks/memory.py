"""What a training step keeps and at most needs: saved activations over tokens and experts, and the process's peak.

    python -m benchmarks.memory [--quick] [--json FILE]

Saved activations (`saved_mib`) are counted from the tensors that autograd keeps, so they are the same in every run. The
peak is measured: every candidate takes three whole steps (forward, backward, fused AdamW) in a process of its own, and
`peak_growth_mib` is how far its largest resident set lies above what it held when base, adapters and optimizer stood
there. On a GPU it is the largest memory allocated by torch above the same point.
"""

import json
import resource
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.candidates import build
from benchmarks.measure import DTYPE, MIB, arguments, dtypes, finish, saved_mib, table
from benchmarks.shapes import Mixture, make_base, make_tokens
from benchmarks.training_step import step
from loramoe_train.training.memory import peak_resident

NAMES = ("base", "lora_active", "lora_total", "lora_all", "loop", "dense_loop", "ours")
QUICK = ("base", "lora_active", "loop", "ours")


def saved(model: str, dtype: torch.dtype, names: Sequence[str], lengths: Sequence[int], experts: Sequence[int]) -> Any:
    """row -> tokens -> MiB; ours once for every number of experts, the others with the first."""
    base = make_base(model, dtype)
    rows: dict[str, dict[str, float]] = {}
    for name in names:
        for number in experts if name == "ours" else experts[:1]:
            candidate = build(name, base, Mixture(experts=number))
            row = rows[f"{name}_{number}" if name == "ours" else name] = {}
            for length in lengths:
                ids = make_tokens(model, 2, length // 2)
                with candidate.opened(ids):
                    row[f"{length} tokens"] = saved_mib(lambda c=candidate, i=ids: c.loss(i), candidate.model)
    return rows


def peak(model: str, dtype: str, name: str, tokens: int, device: str) -> dict[str, float]:
    """Measured in a fresh process."""
    asked = json.dumps([model, dtype, name, tokens, device])
    command = [sys.executable, "-m", "benchmarks.memory", "--child", asked]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"memory: {name} failed with code {done.returncode}:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def child(model: str, dtype: str, name: str, tokens: int, device: str) -> dict[str, float]:
    base = make_base(model, getattr(torch, dtype), device=device)
    candidate = build(name, base, Mixture())
    optimizer = torch.optim.AdamW(candidate.trained, lr=1e-4, fused=True) if candidate.trained else None
    ids = make_tokens(model, 2, tokens // 2, device=device)
    before = _now(device)
    for _ in range(3):
        step(candidate, optimizer, ids)
    return {"peak_growth_mib": _highest(device) - before, "before_mib": before}


def _now(device: str) -> float:
    """MiB held at present."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated() / MIB
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / MIB


def _highest(device: str) -> float:
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / MIB
    return peak_resident() / MIB


def main(given: Sequence[str] | None = None) -> dict[str, Any]:
    options = arguments(
        "memory",
        __doc__,
        given,
        dtype=DTYPE,
        model={"choices": ["smollm2", "wide", "llama3_8b", "tiny"], "default": "smollm2"},
        child={"help": "for its own use"},
    )
    if options.child:
        print(json.dumps(child(*json.loads(options.child))))
        return {}
    names, lengths = (QUICK, (256, 512)) if options.quick else (NAMES, (256, 512, 1024, 2048))
    report: dict[str, Any] = {"model": options.model, "saved_mib": {}, "peak": {}}
    measured = dtypes(options)
    for dtype in measured:
        found = saved(options.model, getattr(torch, dtype), names, lengths, (8, 64))
        report["saved_mib"][dtype] = found
        table(f"saved activations in MiB, {options.model}, {dtype}", found)
    tokens = 512 if options.quick else 2048
    for dtype in measured[-1:] if options.quick else measured:
        found = {name: peak(options.model, dtype, name, tokens, options.device) for name in names}
        floor = found["lora_active"]["peak_growth_mib"]
        for row in found.values():
            row["to_lora_active"] = row["peak_growth_mib"] / floor
        report["peak"][dtype] = {"tokens": tokens, "candidates": found}
        table(f"peak of a step, {tokens} tokens, {options.model}, {dtype}", found)
    finish(report, options.json)
    return report


if __name__ == "__main__":
    main()
