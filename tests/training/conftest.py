"""One thread: tiny products gain nothing from two, and bits depend on how sums are split among threads."""

import pytest


@pytest.fixture(scope="module", autouse=True)
def _one_thread(one_thread: None) -> None:
    """For every test here."""
