"""Starting `worker.py` in processes of its own."""

import json
import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def start_worker(options: dict[str, Any] | list[dict[str, Any]], *, processes: int = 1) -> subprocess.Popen:
    """Start a run of `processes` ranks on the CPU; output is text, line by line."""
    with tempfile.NamedTemporaryFile("w", suffix=".json", delete=False) as file:
        json.dump(options, file)
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true"}
    return subprocess.Popen(
        [*launcher, "-m", "tests.training.worker", file.name],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def read_until(worker: subprocess.Popen, line: str, *, timeout: float = 120) -> str:
    """Read the standard output up to and with `line`; a worker that never says it is killed, and its words shown."""
    said, deadline = "", threading.Timer(timeout, worker.kill)
    deadline.start()
    try:
        for read in worker.stdout:
            said += read
            if read == f"{line}\n":
                return said
    finally:
        deadline.cancel()
    raise AssertionError(f"no line {line!r} within {timeout} s, but {said!r} and {worker.communicate()[1][-4000:]}")


def run_worker(options: dict[str, Any] | list[dict[str, Any]], *, processes: int = 1) -> str:
    """Run to the end and return the standard output; fails with the worker's own words."""
    worker = start_worker(options, processes=processes)
    output, errors = worker.communicate(timeout=300)
    assert worker.returncode == 0, errors[-4000:]
    return output
