"""metrics.jsonl: one JSON object a line, appended; and the same numbers to wandb or tensorboard if they are asked for.

Every line has `kind`, `step` (optimizer steps taken in the run) and `stage`:

| kind | further keys |
|---|---|
| run | config_hash, seed, versions, commit: what the lines below were made with; again where a resumed run has others |
| train | loss, task_loss {task: nats}, aux {name: {raw, weighted, balanced}}, anchor, lr, grad_norm {group}, timing |
| eval | loss, task_loss |
| routing | sites {site: load, entropy, top_share, dead}, layers {layer: {task: share of each expert}}, alarms |
| eval_routing | sites and layers as of a routing line, but of the held-out examples, routed as at inference |
| skipped | not_finite {what: value}, tasks, examples: of a step that was left out |
| stage | the stage's summary |

`balanced` is the raw value at perfectly even use of the experts, for the terms that have one.

Losses of a `train` line are means over the steps since the line before, weighted by supervised tokens. All that depends
on the clock or the machine stands under `timing`; the rest is the same in every run of the same configuration.
"""

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from accelerate import Accelerator

from loramoe_train.errors import LoramoeError
from loramoe_train.files import write_bytes
from loramoe_train.training.outcome import StepResult

FILE = "metrics.jsonl"


@dataclass
class Window:
    """Sums over the steps since the last `train` line. Plain numbers, so that a checkpoint can hold them."""

    num_tasks: int
    task_sums: list[float] = field(default_factory=list)
    task_tokens: list[float] = field(default_factory=list)
    aux: dict[str, float] = field(default_factory=dict)
    anchor: float = 0.0
    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0  # added by the loop, which knows the clock

    def __post_init__(self) -> None:
        self.task_sums = self.task_sums or [0.0] * self.num_tasks
        self.task_tokens = self.task_tokens or [0.0] * self.num_tasks

    def add(self, result: StepResult) -> None:
        self.task_sums = [a + b for a, b in zip(self.task_sums, result.task_sums, strict=True)]
        self.task_tokens = [a + b for a, b in zip(self.task_tokens, result.task_tokens, strict=True)]
        for name, value in result.aux.items():
            self.aux[name] = self.aux.get(name, 0.0) + value
        self.anchor += result.anchor
        self.steps += 1
        self.tokens += result.tokens

    def losses(self, task_names: tuple[str, ...]) -> dict[str, Any]:
        """`loss` and `task_loss`, in nats per supervised token."""
        return losses(dict(zip(task_names, zip(self.task_sums, self.task_tokens, strict=True), strict=True)))


def losses(sums: Mapping[str, tuple[float, float]]) -> dict[str, Any]:
    """task -> (sum of nats, tokens), as `loss` over all tokens and `task_loss` of the tasks that had any."""
    tokens = sum(count for _, count in sums.values())
    return {
        "loss": sum(total for total, _ in sums.values()) / tokens if tokens else None,
        "task_loss": {task: total / count for task, (total, count) in sums.items() if count},
    }


class Metrics:
    """The log of a run. Only the main process writes; every process may call."""

    def __init__(self, run_dir: Path, accelerator: Accelerator) -> None:
        self.path = run_dir / FILE
        self._accelerator = accelerator
        self._file: IO[str] | None = None

    def open(self, *, resumed_at: int | None = None, made_with: Mapping[str, Any] | None = None) -> None:
        """Start writing.

        Args:
            resumed_at: optimizer steps already taken; lines of later steps are cut off. None: a new log.
            made_with: what every number of the log carries, for a line of kind `run`. None: no such line.

        Raises:
            LoramoeError: the folder is not writable.
        """
        if not self._accelerator.is_main_process:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if self.path.is_file():
                keep_until(self.path, -1 if resumed_at is None else resumed_at)
            self._file = self.path.open("a", encoding="utf-8")
        except OSError as error:
            raise LoramoeError(f"{self.path} cannot be written ({error.strerror}); choose another run_dir") from error
        if made_with is not None and last_made_with(self.path) != made_with:
            self._append({"kind": "run", "step": resumed_at or 0, "stage": "", **made_with})

    def write(self, kind: str, step: int, stage: str, values: Mapping[str, Any]) -> None:
        """Append one line and send its numbers to the trackers."""
        if self._file is None:
            return
        self._append({"kind": kind, "step": step, "stage": stage, **values})
        if self._accelerator.trackers:
            # load per expert and share per task stay in the file: thousands of curves help nobody
            kept = {"sites": _site_scalars(values["sites"])} if "sites" in values else values
            self._accelerator.log(flat(kept, prefix=f"{kind}/"), step=step)

    def _append(self, entry: Mapping[str, Any]) -> None:
        assert self._file is not None
        line = json.dumps(entry, allow_nan=False)
        try:
            self._file.write(line + "\n")
            self._file.flush()
        except OSError as error:
            raise self._failed(error) from error

    def sync(self) -> None:
        """Flush to the disk; call it before a checkpoint, which promises that the log reaches as far. Any thread.

        Raises:
            LoramoeError: the disk is full or gone.
        """
        if self._file is None:
            return
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise self._failed(error) from error

    def _failed(self, error: OSError) -> LoramoeError:
        return LoramoeError(f"{self.path} cannot be written ({error.strerror}); make room on the disk")

    def close(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            with suppress(OSError):  # the rest of a line that could not be written: `write` has said so
                file.close()


def keep_until(path: Path, step: int) -> None:
    """Cut off the lines of steps after `step`, and a last line that was not finished."""
    content = path.read_bytes()
    kept = [line for line in content.splitlines(keepends=True) if _step(line) <= step]
    if len(b"".join(kept)) != len(content):
        write_bytes(path, b"".join(kept))


def last_made_with(path: Path) -> dict[str, Any] | None:
    """What the newest line of kind `run` says; None without one."""
    entries = (json.loads(line) for line in path.read_bytes().splitlines() if b'"kind": "run"' in line)
    found = [entry for entry in entries if entry["kind"] == "run"]
    return {key: value for key, value in found[-1].items() if key not in ("kind", "step", "stage")} if found else None


def _step(line: bytes) -> float:
    try:
        return json.loads(line)["step"] if line.endswith(b"\n") else float("inf")
    except (ValueError, KeyError, TypeError):
        return float("inf")


def _site_scalars(sites: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    return {
        site: {"entropy": facts["entropy"], "top_share": facts["top_share"], "dead": len(facts["dead"])}
        for site, facts in sites.items()
    }


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """Nested numbers as `prefix` + `a/b/c`, as trackers want them; what is no number is left out."""
    found: dict[str, float] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{key}/")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found[f"{prefix}{key}"] = value
    return found
