"""One thread: tiny products gain nothing from two, and bits depend on how sums are split among threads."""

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)
