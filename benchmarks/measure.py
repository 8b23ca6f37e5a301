"""What all benchmarks share: candidates that take turns, medians and ratios, saved memory, one report.

Times of one candidate alone mean nothing on a machine that others use. So the candidates run in turn, A B C C B A ...,
and what is reported is the median over the rounds of the *ratio within a round*, beside each candidate's own median.
"""

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from loramoe_train.experts.products import multiplies_natively

MIB = 2**20
Samples = dict[str, list[float]]  # candidate -> seconds, one per round


def interleave(
    candidates: Mapping[str, Callable[[], Any]], *, rounds: int, warmup: int = 1, device: str = "cpu"
) -> Samples:
    """Seconds of every candidate in every round; the order turns round from one round to the next."""
    names = list(candidates)
    for name in names * warmup:
        candidates[name]()
    samples: Samples = {name: [] for name in names}
    for number in range(rounds):
        for name in names if number % 2 == 0 else names[::-1]:
            samples[name].append(seconds(candidates[name], device))
    return samples


def seconds(call: Callable[[], Any], device: str = "cpu") -> float:
    """Wall time of a call, everything that it launched on the device included."""
    if device == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def ratio(samples: Samples, name: str, to: str) -> float:
    """The median over the rounds of the ratio within the round."""
    return statistics.median(a / b for a, b in zip(samples[name], samples[to], strict=True))


def times(samples: Samples, to: Sequence[str]) -> dict[str, dict[str, float]]:
    """candidate -> median and best seconds, and its ratio to each of `to` that takes part."""
    return {
        name: {
            "seconds": statistics.median(values),
            "best_seconds": min(values),
            **{f"to_{other}": ratio(samples, name, other) for other in to if other in samples},
        }
        for name, values in samples.items()
    }


def saved_mib(forward: Callable[[], Tensor], model: nn.Module) -> float:
    """MiB that a forward pass keeps for backward, apart from parameters and buffers. Deterministic."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        output = forward()
    total = sum(kept.values()) / MIB
    del output
    return total


class CountOps(TorchDispatchMode):
    """Counts tensor operations, and those whose result sizes depend on data: on a GPU they wait for the device."""

    DATA_DEPENDENT = ("nonzero", "_local_scalar_dense", "masked_select", "repeat_interleave")
    FREE = ("view", "reshape", "t", "transpose", "detach", "unbind", "split", "unsqueeze", "select", "slice", "alias")

    def __init__(self) -> None:
        super().__init__()
        self.ops, self.data_dependent = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        self.ops += name not in self.FREE
        self.data_dependent += name in self.DATA_DEPENDENT
        return func(*args, **(kwargs or {}))


# -- the frame of a benchmark ------------------------------------------------------------------------------------------


def arguments(module: str, doc: str | None, given: Sequence[str] | None, **extra: dict[str, Any]) -> argparse.Namespace:
    """`--quick --json FILE --rounds N --device D`, and what else a benchmark asks for."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{module}", description=(doc or "").split("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="under eight minutes on two cores")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--rounds", type=int, help="how often every candidate runs")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    for name, options in extra.items():
        parser.add_argument(f"--{name.replace('_', '-')}", **options)
    return parser.parse_args(given)


DTYPE = {"choices": ["float32", "bfloat16"], "help": "this one alone; default: those that the device can multiply"}


def dtypes(options: argparse.Namespace) -> tuple[str, ...]:
    """Which to measure, float32 first: `--dtype`, or both, but bfloat16 only where the device need not emulate it (so
    slowly that ratios would say nothing of the candidates)."""
    if options.dtype:
        return (options.dtype,)
    native = multiplies_natively(torch.bfloat16, torch.device(options.device))
    if not native:
        print(
            "bfloat16 is left out: this device has no instructions for it (--dtype bfloat16 measures it all the same)"
        )
    return ("float32", "bfloat16") if native else ("float32",)


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    found = {"processor": _processor(), "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    for package in ("torch", "transformers", "peft", "trl", "accelerate"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        names = [line.split(":", 1)[1] for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        flags = [flag for flag in ("avx512_bf16", "amx_bf16") if flag in cpuinfo.read_text()]
        if names:
            return " ".join([names[0].strip(), *flags])
    return platform.processor() or platform.machine()


def table(title: str, rows: Mapping[str, Mapping[str, Any]]) -> None:
    """Print rows of the same columns."""
    columns = list(dict.fromkeys(key for row in rows.values() for key in row))
    widths = [max(len(column), 9) for column in columns]
    first = max([len(name) for name in rows] + [4])
    print(f"\n{title}\n" + " " * first + "".join(f"  {c:>{w}}" for c, w in zip(columns, widths, strict=True)))
    for name, row in rows.items():
        cells = [_cell(row.get(column)) for column in columns]
        print(f"{name:<{first}}" + "".join(f"  {c:>{w}}" for c, w in zip(cells, widths, strict=True)), flush=True)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.3f}" if abs(value) < 100 else f"{value:.0f}"
    return str(value)


def finish(report: dict[str, Any], file: Path | None) -> None:
    """Add the machine, and write the report as JSON where that was asked for."""
    report = {"machine": machine(), **report}
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
