"""Expert layouts: notations, groups that do not divide, errors."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loramoe_train.experts.layouts import expand_code, expand_layout, per_layer


def test_count_code_list_and_domains():
    assert expand_layout(8, 4) == [8] * 4
    assert expand_layout("8", 4) == [8] * 4
    assert expand_layout(2468, 8) == [2, 2, 4, 4, 6, 6, 8, 8]
    assert expand_layout("10-2-2-2", 8) == [10, 10, 2, 2, 2, 2, 2, 2]
    assert expand_layout([1, 2, 3], 3) == [1, 2, 3]
    assert expand_layout("per_domain", 3, num_domains=5, num_tasks=7) == [5] * 3
    assert expand_layout("per_task", 3, num_domains=5, num_tasks=7) == [7] * 3


def test_mola_totals_at_32_layers():
    for code in (8642, 2468, 8228, 2882, 5555):
        assert sum(expand_layout(code, 32)) == 160
    assert sum(expand_layout(8888, 32)) == 256
    assert all(sum(expand_layout(code, 32)) == 128 for code in (4444, 6532, 2356, 6226, 2662))
    extremes = ("10-2-2-2", "2-10-2-2", "2-2-10-2", "2-2-2-10")
    assert all(sum(expand_layout(code, 32)) == 128 for code in extremes)


@pytest.mark.parametrize("layers", [22, 26, 30, 42])
@pytest.mark.parametrize("code", [2468, 8642, 5555, 8228, 2882])
def test_every_layout_keeps_the_budget_when_layers_are_twice_odd(layers, code):
    assert sum(expand_layout(code, layers)) == 5 * layers


def test_ties_go_to_the_middle_groups():
    layers = expand_code((2, 4, 6, 8), 22)
    assert [layers.count(n) for n in (2, 4, 6, 8)] == [5, 6, 6, 5]


@pytest.mark.parametrize(("code", "miss"), [(2468, 1), (8642, 1), (8228, 3), (2882, 3), (5555, 0)])
@pytest.mark.parametrize("layers", [27, 33, 61])
def test_odd_depths_miss_the_budget_as_little_as_possible(layers, code, miss):
    assert abs(sum(expand_layout(code, layers)) - 5 * layers) == miss


@given(st.lists(st.integers(0, 9), min_size=1, max_size=5), st.integers(5, 70))
def test_groups_are_contiguous_and_differ_by_at_most_one_layer(code, layers):
    expanded = expand_code([10 * i + c for i, c in enumerate(code)], layers)
    assert len(expanded) == layers
    assert expanded == sorted(expanded)
    sizes = [expanded.count(10 * i + c) for i, c in enumerate(code)]
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ([1, 2], "has 2 entries for 4 layers"),
        ("24x8", "is no layout"),
        (0, "no layer an expert"),
        ([-1, 2, 2, 2], "negative"),
    ],
)
def test_errors(layout, message):
    with pytest.raises(ValueError, match=message):
        expand_layout(layout, 4)


def test_more_groups_than_layers():
    with pytest.raises(ValueError, match="4 groups for 2 layers"):
        expand_layout(2468, 2)


def test_per_layer():
    assert per_layer(3, 2) == [3, 3]
    with pytest.raises(ValueError, match="1 entries for 2 layers"):
        per_layer([3], 2)
