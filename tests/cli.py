"""Run the commands as a user does, in a fresh process, offline."""

import os
import subprocess
import sys
from pathlib import Path


def run_cli(
    command: str, *arguments: str, cwd: Path, timeout: float = 300, **environment: str
) -> subprocess.CompletedProcess:
    """`loramoe-COMMAND ARGUMENTS` with captured text output; never raises for a failing exit code."""
    env = os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    code = f"import sys; sys.argv[0] = 'loramoe-{command}'; from loramoe_train import cli; cli.{command}()"
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=cwd,
        env=env | environment,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
