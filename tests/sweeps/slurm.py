"""A real SLURM of this machine for tests, or the reason why there is none."""

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "slurm_cluster"
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun")
LONG = 500  # seconds for the jobs of a nightly test, on a machine that does other things too


@pytest.fixture(scope="session")
def cluster() -> Iterator[dict[str, str]]:
    """Environment variables with which commands find the cluster. It is gone, with its jobs, after the tests."""
    with _started(nodes=1) as environment:
        yield environment


@pytest.fixture(scope="session")
def two_nodes() -> Iterator[dict[str, str]]:
    """The same of a cluster whose second node is this machine again."""
    with _started(nodes=2) as environment:
        yield environment


@contextmanager
def _started(nodes: int) -> Iterator[dict[str, str]]:
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if missing or os.getuid() != 0:
        pytest.skip(f"SLURM: {'no ' + ', '.join(missing) if missing else 'only root can start its daemons'}")
    if find_spec("hydra_plugins") is None or find_spec("submitit") is None:
        pytest.skip("SLURM: hydra-submitit-launcher is not installed")
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))  # munge's socket wants a short path
    try:
        started = subprocess.run([SCRIPT, "start", folder, str(nodes)], capture_output=True, text=True, timeout=120)
        if started.returncode:
            pytest.skip(f"SLURM did not start here: {started.stderr.strip()[-300:]}")
        paths = [str(ROOT / "tests" / "sweeps" / "slow"), str(ROOT), os.environ.get("PYTHONPATH", "")]
        yield {
            "SLURM_CONF": str(folder / "etc" / "slurm.conf"),
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
        }
    finally:
        subprocess.run([SCRIPT, "stop", folder], capture_output=True, timeout=120)
        shutil.rmtree(folder, ignore_errors=True)


def ask(cluster: dict[str, str], *command: str) -> str:
    done = subprocess.run(command, env=os.environ | cluster, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def wait_until(happened: Callable[[], bool], told: Callable[[], str], *, timeout: float) -> None:
    deadline = time.monotonic() + timeout
    while not happened():
        assert time.monotonic() < deadline, f"it did not happen within {timeout} s: {told()}"
        time.sleep(0.2)
