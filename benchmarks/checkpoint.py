"""Size and time of a checkpoint: ours, and Accelerate's `save_state` of the same model with the same optimizer.

    python -m benchmarks.checkpoint [--quick] [--json FILE]

A Llama with experts on q, k, v and o whose AdamW has taken a step. Both keep what a run needs to go on: weights,
moments, random generators. `save_state` writes the frozen base as well, and returns before anything is on the disk.

| row | what is timed |
|---|---|
| held_up | for how long our save keeps training from going on: the copy that `training/snapshot.py` makes |
| ours | that copy, and the writing that is done beside training: checksums, every file flushed, renamed |
| save_state | `Accelerator.save_state`, during which training waits |
| save_state_flushed | the same, and its files flushed to the disk like ours |
"""

import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.measure import MIB, arguments, finish, seconds, table, times
from benchmarks.shapes import Mixture, make_base, routed_config
from loramoe_train.files import sync

BASES = ("embedded", "smollm2", "tiny")  # the tests' own model, 135 million weights, and one for the benchmark's test


class Saver:
    """A model that can be saved both ways."""

    def __init__(self, model: str, device: str) -> None:
        from accelerate import Accelerator

        from loramoe_train.build import attach
        from loramoe_train.site_plan import plan_sites

        base = base_of(model, device)
        self.config = routed_config(Mixture())
        self.routed = attach(self.config, base, plan_sites(self.config, base, ["all"]), num_domains=1)
        named = {name: p for members in self.routed.groups.values() for name, p in members.items()}
        self.names = {id(parameter): name for name, parameter in named.items()}
        self.optimizer = torch.optim.AdamW([p.requires_grad_() for p in named.values()], lr=1e-4)
        for parameter in named.values():
            parameter.grad = torch.randn_like(parameter)
        self.optimizer.step()
        self.accelerator = Accelerator(cpu=device == "cpu")
        self.accelerator.prepare(self.routed.model, self.optimizer)
        self.weights = {
            "base": sum(p.numel() for p in base.parameters()) - sum(p.numel() for p in named.values()),
            "trained": sum(p.numel() for p in named.values()),
        }

    def copy(self) -> tuple[dict[str, Any], dict[str, Any]]:
        from loramoe_train.training import rng
        from loramoe_train.training.optim import optimizer_tensors
        from loramoe_train.training.snapshot import snapshot

        moments, numbers = optimizer_tensors(self.optimizer, self.names)
        generators, _ = rng.capture()
        return snapshot({"optimizer": moments, "rng_0": generators, "adapter": self.routed.tensors()}), numbers

    def ours(self, folder: Path) -> Path:
        from loramoe_train.experts.adapters import save_adapter
        from loramoe_train.training.checkpoint import write_checkpoint

        copies, numbers = self.copy()
        adapter = copies.pop("adapter")
        facts = {"base": {}, "tasks": [], "domains": ["all"], "config": self.config.plain(), "versions": {}}
        return write_checkpoint(
            folder,
            1,
            save_adapter=lambda place: save_adapter(place, adapter, self.routed.plan, facts),
            tensors=copies,
            state={"step": 1, "optimizer": numbers},
        )

    def save_state(self, folder: Path) -> Path:
        self.accelerator.save_state(str(folder))
        return folder

    def save_state_flushed(self, folder: Path) -> Path:
        self.save_state(folder)
        for path in [*folder.rglob("*"), folder]:
            sync(path)
        return folder


def base_of(model: str, device: str) -> nn.Module:
    if model != "embedded":
        return make_base(model, torch.float32, device=device)
    from transformers import AutoModelForCausalLM

    from loramoe_train.paths import ASSETS

    return AutoModelForCausalLM.from_pretrained(ASSETS / "tiny" / "model").to(device).eval().requires_grad_(False)


def size(folder: Path) -> int:
    """Bytes of all files."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def measure(model: str, rounds: int, device: str) -> dict[str, Any]:
    """Rows of one model; every save goes to a folder of its own, which is removed again outside the time."""
    from loramoe_train.training.checkpoint import fault

    saver = Saver(model, device)
    calls: dict[str, Callable[[Path], Any]] = {
        "held_up": lambda folder: saver.copy(),
        "ours": saver.ours,
        "save_state": saver.save_state,
        "save_state_flushed": saver.save_state_flushed,
    }
    samples: dict[str, list[float]] = {name: [] for name in calls}
    sizes: dict[str, int] = {}
    for number in range(-1, rounds):  # the first is for warming up
        for name in list(calls) if number % 2 == 0 else list(calls)[::-1]:
            with tempfile.TemporaryDirectory() as parent:
                folder = Path(parent) / "saved"
                folder.mkdir()
                taken = seconds(lambda call=calls[name], place=folder: call(place), device)
                sizes[name] = size(folder)
                if name == "ours" and (reason := fault(folder / "checkpoints" / "step_000001")) is not None:
                    raise SystemExit(f"checkpoint: what was written is no checkpoint: {reason}")
                shutil.rmtree(folder)
            if number >= 0:
                samples[name].append(taken)
    rows = times(samples, ("save_state", "save_state_flushed"))
    for name, row in rows.items():
        row["mib"] = sizes[name] / MIB
        row["size_to_save_state"] = sizes[name] / sizes["save_state"]
    return {"weights": saver.weights, "rounds": rounds, "rows": rows, "samples": samples}


def main(given: Sequence[str] | None = None) -> dict[str, Any]:
    model = {"choices": BASES, "help": "this one alone; default: embedded and smollm2"}
    options = arguments("checkpoint", __doc__, given, model=model)
    rounds = options.rounds or (3 if options.quick else 9)
    report: dict[str, Any] = {"device": options.device, "models": {}}
    for name in [options.model] if options.model else ["embedded", "smollm2"]:
        found = report["models"][name] = measure(name, rounds, options.device)
        weights = ", ".join(f"{number:,} {kind}" for kind, number in found["weights"].items())
        table(f"{name} ({weights}), {rounds} rounds on {options.device}", found["rows"])
    finish(report, options.json)
    return report


if __name__ == "__main__":
    main()
