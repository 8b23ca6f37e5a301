"""Experts' shares from a routing record, by hand."""

import pytest

from scripts.plot_routing import shares


def test_shares_are_means_over_layers_and_tasks() -> None:
    record = {
        "layers": {
            "model.layers.0": {"a": [1.0, 0.0], "b": [0.25, 0.25]},  # weights need not add up to one
            "model.layers.1": {"a": [0.5, 0.5], "b": [0.0, 0.0]},  # no token of b came by
            "model.layers.2": {"a": [1.0], "b": [1.0]},  # fewer experts: another question
        }
    }
    assert shares(record) == {
        "a": pytest.approx([75.0, 25.0]),
        "b": pytest.approx([50.0, 50.0]),
        "all": pytest.approx([62.5, 37.5]),
    }
