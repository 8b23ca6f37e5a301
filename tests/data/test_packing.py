"""Rows and cuts against exhaustive search, and the share of real tokens on lengths like those of real tasks."""

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loramoe_train.data import packing
from loramoe_train.data.packing import cut, pack
from loramoe_train.data.tokens import Example


def make_examples(lengths):
    return [Example(f"toy:{i}", 0, 0, np.zeros(n, np.int32), np.ones(n, bool)) for i, n in enumerate(lengths)]


def tokens(row):
    return sum(map(len, row))


@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=30), extra=st.integers(0, 60))
def test_rows_hold_every_example_once(lengths, extra):
    limit = max(lengths) + extra
    rows = pack(make_examples(lengths), limit)
    assert all(rows) and max(map(tokens, rows)) <= limit
    assert sorted(e.name for row in rows for e in row) == sorted(f"toy:{i}" for i in range(len(lengths)))


def test_rows_by_hand():
    # two rows of 10 have no padding; three would have to be 10 wide as well
    rows = pack(make_examples([4, 6, 10]), 100)
    assert sorted(map(tokens, rows)) == [10, 10]
    # the limit leaves no choice: no two of these share a row
    assert sorted(map(tokens, pack(make_examples([7, 7, 7, 6]), 12))) == [6, 7, 7, 7]


def lengths_like(kind, count, seed):
    """Token counts as of long reasoning (mean 190) or single sentences (mean 25)."""
    rng = np.random.default_rng(seed)
    long, short = rng.gamma(6, 32, count) + 30, rng.gamma(4, 5, count) + 6
    mixed = np.where(rng.random(count) < 0.5, long, short)
    return np.minimum({"long": long, "mixed": mixed}[kind], 2048).astype(int).tolist()


@pytest.mark.parametrize("kind", ["long", "mixed"])
@pytest.mark.parametrize("count", [32, 128])
def test_packed_rows_are_full(kind, count):
    shares = []
    for seed in range(20):
        lengths = lengths_like(kind, count, seed)
        rows = pack(make_examples(lengths), 2048)
        shares.append(sum(lengths) / (len(rows) * max(map(tokens, rows))))
    assert np.mean(shares) >= 0.94


def padded(lengths, ends):
    return sum((end - begin) * lengths[end - 1] for begin, end in zip([0, *ends[:-1]], ends, strict=True))


def within(lengths, ends, ranks, budget):
    pairs = list(zip([0, *ends[:-1]], ends, strict=True))
    return all(e - b >= ranks and -(-(e - b) // ranks) * lengths[e - 1] <= budget for b, e in pairs)


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=9).map(sorted),
    micro=st.integers(1, 4),
    ranks=st.integers(1, 3),
)
def test_no_cut_has_less_padding(lengths, micro, ranks):
    chunks = -(-len(lengths) // (micro * ranks))
    if len(lengths) < chunks * ranks:
        return
    budget = micro * lengths[-1]
    ends = cut(lengths, chunks, ranks=ranks, budget=budget)
    assert len(ends) == chunks and ends[-1] == len(lengths)
    options = [[*inner, len(lengths)] for inner in combinations(range(1, len(lengths)), chunks - 1)]
    allowed = [option for option in options if within(lengths, option, ranks, budget)]
    assert ends in allowed and padded(lengths, ends) == min(padded(lengths, option) for option in allowed)


def test_many_rows_are_cut_piece_by_piece(monkeypatch):
    lengths = sorted(lengths_like("mixed", 100, 0))
    best = cut(lengths, 13, budget=8 * lengths[-1])
    monkeypatch.setattr(packing, "EXACT", 30)
    near = cut(lengths, 13, budget=8 * lengths[-1])
    by_count = [len(lengths) * (chunk + 1) // 13 for chunk in range(13)]
    assert within(lengths, near, 1, 8 * lengths[-1])
    assert padded(lengths, best) <= padded(lengths, near) < padded(lengths, by_count)
