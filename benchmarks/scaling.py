"""How the cost of a training step grows with tokens, layers and experts; the data of the plots in docs/performance.md.

    python -m benchmarks.scaling [--quick] [--json FILE] [--plot PNG]

One axis is varied at a time from SmolLM2-135M's width with 5 layers, 512 tokens and 8 experts of rank 8, top-2. A
curve is the best of the rounds at each place, for places are minutes apart and a median would show what else the
machine did meanwhile. For tokens and layers the exponent of a power law is fitted (1 is linear); for experts it is the
time over the base's, relative to that with 8.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.candidates import build
from benchmarks.measure import DTYPE, arguments, dtypes, finish, interleave, saved_mib, table, times
from benchmarks.shapes import Mixture, make_base, make_tokens
from benchmarks.training_step import step

AXES: dict[str, tuple[int, ...]] = {
    "tokens": (128, 256, 512, 1024, 2048),
    "layers": (2, 5, 10, 20),
    "experts": (4, 8, 16, 32, 64, 128),
}
QUICK: dict[str, tuple[int, ...]] = {"tokens": (256, 512), "layers": (2, 5), "experts": (8, 64)}
USUAL = {"tokens": 512, "layers": 5, "experts": 8}
NAMES = ("base", "lora_active", "ours")


def point(model: str, dtype: torch.dtype, values: dict[str, int], *, rounds: int, device: str) -> dict[str, Any]:
    """Seconds and saved MiB of the candidates at one place of one axis."""
    base = make_base(model, dtype, layers=values["layers"], device=device)
    ids = make_tokens(model, 2, values["tokens"] // 2, device=device)
    calls, kept = {}, {}
    for name in NAMES:
        candidate = build(name, base, Mixture(experts=values["experts"]))
        optimizer = torch.optim.AdamW(candidate.trained, lr=1e-4, fused=True) if candidate.trained else None
        with candidate.opened(ids):
            kept[name] = saved_mib(lambda c=candidate: c.loss(ids), candidate.model)
        calls[name] = lambda c=candidate, o=optimizer: step(c, o, ids)
    found = times(interleave(calls, rounds=rounds, device=device), to=("base",))
    return {name: {**found[name], "saved_mib": kept[name]} for name in NAMES}


def exponent(sizes: Sequence[int], seconds: Sequence[float]) -> float:
    """The slope of log seconds over log size, by least squares."""
    x, y = [math.log(size) for size in sizes], [math.log(value) for value in seconds]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    above = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return above / sum((a - mean_x) ** 2 for a in x)


def summarise(curves: dict[str, dict[int, dict[str, Any]]]) -> dict[str, dict[str, float]]:
    rows: dict[str, dict[str, float]] = {}
    for axis in ("tokens", "layers"):
        sizes = list(curves[axis])
        for name in NAMES:
            row = rows.setdefault(name, {})
            row[f"exponent in {axis}"] = exponent(sizes, [curves[axis][size][name]["best_seconds"] for size in sizes])
    for size, found in curves["experts"].items():
        rows["ours"][f"{size} experts"] = to_base(found, "ours") / to_base(curves["experts"][8], "ours")
    return rows


def to_base(found: dict[str, Any], name: str) -> float:
    """Best time over the base's."""
    return found[name]["best_seconds"] / found["base"]["best_seconds"]


def plot(curves: dict[str, dict[int, dict[str, Any]]], file: Path, title: str) -> None:
    """Three panels: seconds over tokens and layers, ratio to the base over experts."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    labels = {"base": "frozen base", "lora_active": "PEFT LoRA, rank 16", "ours": "ours, 8 experts, top 2"}
    for panel, axis in zip(axes, AXES, strict=True):
        sizes = list(curves[axis])
        for name in NAMES:
            at = [curves[axis][size] for size in sizes]
            values = [to_base(found, name) if axis == "experts" else found[name]["best_seconds"] for found in at]
            panel.plot(sizes, values, marker="o", label=labels[name])
        panel.set_xlabel(axis)
        panel.set_ylabel("step time over the frozen base's" if axis == "experts" else "seconds per step")
        if axis == "experts":
            panel.set_xscale("log", base=2)
            panel.set_xticks(sizes, [str(size) for size in sizes])
        panel.set_ylim(bottom=0)
        panel.grid(alpha=0.3)
    axes[0].legend()
    figure.suptitle(title)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110)
    plt.close(figure)


def main(given: Sequence[str] | None = None) -> dict[str, Any]:
    options = arguments(
        "scaling",
        __doc__,
        given,
        dtype=DTYPE,
        model={"choices": ["smollm2", "wide", "llama3_8b", "tiny"], "default": "smollm2"},
        plot={"type": Path, "help": "write the curves here"},
    )
    rounds = options.rounds or (3 if options.quick else 9)
    dtype = dtypes(options)[-1]
    curves: dict[str, dict[int, dict[str, Any]]] = {}
    for axis, sizes in (QUICK if options.quick else AXES).items():
        curves[axis] = {}
        for size in sizes:
            values = {**USUAL, axis: size}
            found = point(options.model, getattr(torch, dtype), values, rounds=rounds, device=options.device)
            curves[axis][size] = found
        table(
            f"{axis}: seconds",
            {str(s): {n: found[n]["best_seconds"] for n in NAMES} for s, found in curves[axis].items()},
        )
    summary = summarise(curves)
    table("growth", summary)
    if options.plot:
        plot(curves, options.plot, f"{options.model} width, {dtype}, {options.device}")
    report = {"model": options.model, "dtype": dtype, "curves": curves, "growth": summary}
    finish(report, options.json)
    return report


if __name__ == "__main__":
    main()
