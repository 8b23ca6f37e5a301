"""A tiny run in a process of its own, or in several: `python -m tests.training.worker OPTIONS.json`. A list of options
is as many runs, one after the other.

Prints `step N` when the data of a step is asked for and `done` at the end; exits as the command line would. Writes the
final weights to `run_dir/weights.safetensors`.
"""

import json
import os
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from loramoe_train.errors import LoramoeError
from loramoe_train.training.checkpoint import find_latest
from loramoe_train.training.parts import StageData, TrainingParts
from loramoe_train.training.signals import StopSignals
from tests.training.harness import double_parts, make_parts, make_picky_router, make_trainer, train, weights


def say(line: str) -> None:
    """In one write: `print` makes two, and the thread that writes checkpoints talks beside the one that trains."""
    os.write(sys.stdout.fileno(), f"{line}\n".encode())


class Announced:
    """Stage data that says what it is asked for, and takes its time."""

    def __init__(self, data: StageData, pause: float) -> None:
        self.data, self.pause = data, pause

    def steps(self, *, start: int, **which: int) -> Iterator[list]:
        for step, batches in enumerate(self.data.steps(start=start, **which), start):
            say(f"step {step}")
            time.sleep(self.pause)
            yield batches


def announced(parts: TrainingParts, pause: float = 0.0) -> TrainingParts:
    """The parts with stage data that says `step N`, and takes `pause` seconds."""
    made = parts.stage_data
    return replace(parts, stage_data=lambda name: Announced(made(name), pause))


def held(parts: TrainingParts, step: int) -> TrainingParts:
    """The parts with a checkpoint, that of `step`, which says `writing STEP` and then waits for a signal to stop."""

    def save_adapter(folder: Path, tensors: Mapping[str, Tensor]) -> None:
        if folder.name.startswith(f"step_{step:06d}"):
            (folder / "adapter.safetensors").write_bytes(b"half")
            say(f"writing {step}")
            while not stopping():
                time.sleep(0.05)
        parts.save_adapter(folder, tensors)

    def stopping() -> bool:
        return bool(stopped)

    stopped: list[int] = []
    note = StopSignals._note

    def also_tell(self: StopSignals, number: int, frame: FrameType | None) -> None:
        stopped.append(number)
        note(self, number, frame)

    StopSignals._note = also_tell
    return replace(parts, save_adapter=save_adapter)


def held_here(parts: TrainingParts) -> float:
    """Share of the decoder layers' frozen scalars that lies in this process."""
    own = {id(p) for members in parts.groups.values() for p in members.values()}
    frozen = [p for layer in parts.layers for p in layer.parameters() if id(p) not in own]
    return sum(getattr(p, "_local_tensor", p).numel() for p in frozen) / sum(p.numel() for p in frozen)


def main(options: dict[str, Any]) -> None:
    run_dir = Path(options["run_dir"])
    make = double_parts if options.get("double") else make_parts
    router = {"router": make_picky_router} if options.get("picky") else {}
    parts = make(**options.get("parts", {}), **router)
    parts = announced(parts, options.get("pause", 0.0))
    if "hold" in options:
        parts = held(parts, options["hold"])
    if options.get("listen"):
        # who listened before, as submitit does
        signal.signal(signal.SIGUSR2, lambda *_: say(f"requeued {find_latest(run_dir).name}"))
    resume = find_latest(run_dir) if options.get("resume") == "auto" else options.get("resume")
    train(parts, make_trainer(**options.get("trainer", {})), run_dir, resume=Path(resume) if resume else None)
    save_file(weights(parts), run_dir / "weights.safetensors")
    say(f"holds {held_here(parts):.3f} of the layers' frozen weights")
    say("done")


if __name__ == "__main__":
    try:
        given = json.loads(Path(sys.argv[1]).read_text())
        for entry in given if isinstance(given, list) else [given]:
            main(entry)
    except LoramoeError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
