"""Run the commands as a user does, in a fresh process, offline."""

import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from loramoe_train.training.signals import STOP_SIGNALS

# a run of seconds: few rows, short steps, no evaluation unless a test asks for it
SMALL = (
    "trainer.batch_size=4",
    "trainer.micro_batch_size=2",
    "trainer.log_every=1",
    "data.max_examples=32",
    "data.validation_examples=2",
)
NO_EVAL = "eval.enabled=false"
MIXER = ("+recipe=lora_mixer", *SMALL)
TWO_TASKS = ("data.tasks=[tiny_grammar,tiny_sentiment]", "router.top_k=2")
ADAPTER = "adapter.safetensors"


@contextmanager
def command_in_this_process() -> Iterator[None]:
    """Afterwards signals and logging are as before: a command sets them up for its process, which ends with it."""
    handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    root = logging.getLogger()
    level, outputs = root.level, root.handlers[:]
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        root.setLevel(level)
        root.handlers[:] = outputs


def run_cli(
    command: str, *arguments: str, cwd: Path, timeout: float = 300, **environment: str
) -> subprocess.CompletedProcess:
    """`loramoe-COMMAND ARGUMENTS` with captured text output; never raises for a failing exit code."""
    started = start_cli(command, *arguments, cwd=cwd, **environment)
    try:
        stdout, stderr = started.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        started.kill()
        stdout, stderr = started.communicate()
        raise AssertionError(f"no end after {timeout} s; stderr so far: {stderr[-2000:]}") from None
    return subprocess.CompletedProcess(started.args, started.returncode, stdout, stderr)


def start_cli(
    command: str,
    *arguments: str,
    cwd: Path,
    processes: int = 1,
    launcher: Sequence[str] = ("torch.distributed.run", "--standalone", "--nproc_per_node"),
    setup: Callable[[], None] | None = None,
    **environment: str,
) -> subprocess.Popen:
    """The same, still running; with `processes` above 1 under a launcher on the CPU, by default torch's.

    `setup` runs in the new process first. A launcher wants a file, so this one is started rather than `-c`.
    """
    env = os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "OMP_NUM_THREADS": "1", "COLUMNS": "160"}
    env |= environment
    start = [sys.executable]
    if processes > 1:
        start += ["-m", *launcher, str(processes)]
        env["ACCELERATE_USE_CPU"] = "true"
    return subprocess.Popen(
        [*start, str(Path(__file__).resolve()), command, *arguments],
        cwd=cwd,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=setup,
    )


def check_refused(done: subprocess.CompletedProcess, code: int, *words: str) -> str:
    """The one line of a refusal: right exit code, nothing but it in our own words, every one of `words` in it.

    Lines of progress before it are allowed; a traceback is not.
    """
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr + done.stdout, done.stderr
    ours = [line for line in done.stderr.splitlines() if line.startswith("loramoe: ")]
    assert len(ours) == 1 and done.stderr.rstrip().endswith(ours[0]), done.stderr
    for word in words:
        assert word in ours[0], f"{word!r} is not in: {ours[0]}"
    return ours[0]


def half_written(folder: Path) -> list[Path]:
    """Files and folders that only a write in progress may leave."""
    return [path for path in folder.rglob("*") if path.name.endswith((".tmp", ".old"))]


def lines(run_dir: Path, kind: str) -> list[dict[str, Any]]:
    """The entries of one kind in metrics.jsonl, without those of the clock."""
    entries = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in entry.items() if k != "timing"} for entry in entries if entry["kind"] == kind]


def losses(run_dir: Path) -> list[float]:
    return [entry["loss"] for entry in lines(run_dir, "train")]


def same_bytes(one: Path, two: Path) -> bool:
    return (one / ADAPTER).read_bytes() == (two / ADAPTER).read_bytes()


if __name__ == "__main__":
    from loramoe_train import cli

    command = sys.argv.pop(1)
    sys.argv[0] = f"loramoe-{command}"
    getattr(cli, {"eval": "evaluate"}.get(command, command))()
