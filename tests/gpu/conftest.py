"""What tests on a GPU need before and between them."""

import os
from collections.abc import Iterator

import pytest

# read once, when cuBLAS is first used; a run sets it before that (`training/accelerator.py`)
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


@pytest.fixture(autouse=True)
def either_device() -> Iterator[None]:
    """accelerate keeps the first device of a process for ever; a test here trains on both."""
    forget_device()
    yield
    forget_device()


def forget_device() -> None:
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
