"""Sample plans: exact counts, any sample at once, each row once per pass; checked against plain loops."""

import math
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loramoe_train.data.sampling import SamplePlan, apportion, seeded_order, shares
from loramoe_train.errors import ConfigError
from loramoe_train.schema.data import SamplingConfig

WEIGHTS = st.lists(st.integers(0, 50), min_size=1, max_size=6).filter(any)
SIZES = st.lists(st.integers(1, 40), min_size=1, max_size=5)


def named(sizes):
    return {f"task{i}": size for i, size in enumerate(sizes)}


def plan_of(sizes, strategy="proportional", *, seed=0, stage="train", total=None, examples=None, **sampling):
    config = SamplingConfig.model_validate({"strategy": strategy, "block": 16} | sampling)
    return SamplePlan(named(sizes), config, seed=seed, stage=stage, total=total, examples=examples)


def slow_apportion(n, weights):
    """Webster by its definition: the n earliest of all samples, the k-th of task t at time (k + 1/2) / w_t."""
    counts = [0] * len(weights)
    for _ in range(n):
        times = [(Fraction(2 * c + 1, w), t) for t, (c, w) in enumerate(zip(counts, weights, strict=True)) if w]
        counts[min(times)[1]] += 1
    return counts


@settings(max_examples=80, deadline=None)
@given(n=st.integers(0, 120), weights=WEIGHTS)
def test_apportionment_is_the_slow_one(n, weights):
    assert apportion(n, weights) == slow_apportion(n, weights)


@settings(max_examples=80, deadline=None)
@given(n=st.integers(0, 10**9), weights=WEIGHTS)
def test_apportionment_is_exact_and_never_falls(n, weights):
    counts, later = apportion(n, weights), apportion(n + 1, weights)
    assert sum(counts) == n and sum(later) == n + 1
    assert all(a <= b for a, b in zip(counts, later, strict=True))
    # the error against the exact share does not grow with n
    assert all(abs(c - Fraction(n * w, sum(weights))) < len(weights) for c, w in zip(counts, weights, strict=True))
    whole = n * sum(weights)
    assert apportion(whole, weights) == [n * w for w in weights]


@settings(max_examples=40, deadline=None)
@given(sizes=SIZES, strategy=st.sampled_from(["proportional", "equal", "temperature", "capped"]), data=st.data())
def test_every_block_holds_the_planned_counts(sizes, strategy, data):
    plan = plan_of(sizes, strategy, cap=10, block=data.draw(st.integers(1, 20)))
    block = plan._block
    n = data.draw(st.integers(0, 100))
    drawn = Counter(plan.names[task] for task, _ in plan.slice(0, n))
    assert {name: drawn[name] for name in plan.names} == plan.counts(n)
    if strategy == "equal":
        for b in range(3):
            counts = Counter(task for task, _ in plan.slice(b * block, (b + 1) * block))
            assert all(block // len(sizes) <= counts[t] <= math.ceil(block / len(sizes)) for t in range(len(sizes)))


@settings(max_examples=30, deadline=None)
@given(sizes=SIZES, start=st.integers(0, 300), length=st.integers(0, 70), data=st.data())
def test_any_sample_at_once(sizes, start, length, data):
    strategy = data.draw(st.sampled_from(["proportional", "equal", "temperature"]))
    examples = data.draw(st.none() | st.integers(1, 50))
    make = lambda: plan_of(sizes, strategy, examples=examples)  # noqa: E731
    from_the_beginning = make().slice(0, start + length)[start:]
    assert make().slice(start, start + length) == from_the_beginning
    fresh = make()
    assert [fresh[i] for i in reversed(range(start, start + length))] == from_the_beginning[::-1]


@settings(max_examples=30, deadline=None)
@given(sizes=SIZES, strategy=st.sampled_from(["equal", "temperature", "capped", "proportional"]))
def test_each_row_once_per_pass_over_its_task(sizes, strategy):
    plan = plan_of(sizes, strategy, cap=5)
    rows = {task: [] for task in range(len(sizes))}
    for task, row in plan.slice(0, 3 * sum(sizes)):
        rows[task].append(row)
    # draws of a task arrive block by block, and inside a block in the order of its pass
    for task, size in enumerate(sizes):
        for begin in range(0, len(rows[task]) - size + 1, size):
            assert sorted(rows[task][begin : begin + size]) == list(range(size))


@settings(max_examples=30, deadline=None)
@given(sizes=SIZES, passes=st.integers(0, 3))
def test_a_proportional_pass_holds_every_sample_once(sizes, passes):
    plan, total = plan_of(sizes), sum(sizes)
    samples = plan.slice(passes * total, (passes + 1) * total)
    assert sorted(samples) == [(task, row) for task, size in enumerate(sizes) for row in range(size)]


def test_passes_and_seeds_and_stages_differ():
    orders = {
        tuple(plan_of([50, 30], seed=seed, stage=stage).slice(begin, begin + 80))
        for seed in (0, 1)
        for stage in ("train", "routers")
        for begin in (0, 80)
    }
    assert len(orders) == 8


def test_same_on_every_machine():
    # written out once: a change here changes every published run
    assert seeded_order(8, 0, "train", "toy", 0).tolist() == [7, 2, 1, 5, 6, 4, 0, 3]
    first, second = [(0, 0), (1, 0), (0, 1), (0, 2), (1, 1)], [(0, 1), (1, 0), (1, 1), (0, 0), (0, 2)]
    assert plan_of([3, 2], block=5).slice(0, 10) == first + second


@settings(max_examples=30, deadline=None)
@given(sizes=SIZES, examples=st.integers(1, 60), strategy=st.sampled_from(["proportional", "equal", "capped"]))
def test_examples_are_the_first_distinct_ones_again_and_again(sizes, examples, strategy):
    examples = min(examples, sum(sizes) - 1)
    if examples == 0:
        return
    limited = plan_of(sizes, strategy, cap=7, examples=examples)
    distinct = limited.num_distinct
    assert distinct == examples
    first = limited.slice(0, distinct)
    assert len(set(first)) == distinct
    for turn in (1, 2):
        assert sorted(limited.slice(turn * distinct, (turn + 1) * distinct)) == sorted(first)
    # the slow way: walk the unlimited plan's tasks in apportioned order until so many distinct rows were met
    weights = shares(SamplingConfig(strategy=strategy, cap=7), named(sizes))[0][1]
    n, met = 0, [0] * len(sizes)
    while sum(met) < distinct:
        n += 1
        met = [min(c, size) for c, size in zip(slow_apportion(n, weights), sizes, strict=True)]
    assert list(limited.counts(distinct).values()) == met


def test_as_many_examples_as_there_are_is_no_limit():
    # a stage without a limit of its own may say so by the mixture's size; `equal` must stay equal
    assert plan_of([50, 10], "equal", examples=60).slice(0, 200) == plan_of([50, 10], "equal").slice(0, 200)


def test_a_limited_plan_orders_its_passes_differently():
    plan = plan_of([300, 200], examples=100)
    assert plan.slice(0, 100) != plan.slice(100, 200)
    assert sorted(plan.slice(0, 100)) == sorted(plan.slice(100, 200))


def test_long_run_shares_are_exact():
    plan = plan_of([10, 20, 30], "weights", weights={"task0": 0.5, "task1": 0.3, "task2": 0.2}, block=7)
    assert plan.counts(1_000_000) == {"task0": 500_000, "task1": 300_000, "task2": 200_000}
    assert plan.repeats(1_000_000)["task0"] == 50_000


def test_far_samples_are_cheap():
    plan = plan_of([1_000, 2_000_000], "equal")
    task, row = plan[10**12]
    assert task in (0, 1) and 0 <= row < (1_000, 2_000_000)[task]


def test_strategies():
    sizes = named([100, 400, 1600])

    def weights(strategy, **options):
        return shares(SamplingConfig(strategy=strategy, **options), sizes)[0][1]

    assert weights("proportional") == [100, 400, 1600]
    assert weights("equal") == [1, 1, 1]
    assert weights("capped", cap=500) == [100, 400, 500]
    assert weights("temperature", temperature=2.0) == [250_000_000, 500_000_000, 1_000_000_000]
    assert weights("temperature", temperature=1.0) == [62_500_000, 250_000_000, 1_000_000_000]
    assert weights("weights", weights={"task0": 0.1, "task1": 0, "task2": 0.25}) == [2, 0, 5]


def test_a_task_of_weight_zero_is_never_drawn():
    plan = plan_of([5, 5], "weights", weights={"task0": 1, "task1": 0})
    assert {task for task, _ in plan.slice(0, 100)} == {0} and plan.num_distinct == 5
    assert plan_of([5, 5], "weights", weights={"task0": 1, "task1": 0}, examples=8).num_distinct == 5


def schedule(*pieces):
    return [
        {"until": until, "weights": dict(zip(("task0", "task1"), weights, strict=True))} for until, weights in pieces
    ]


def test_schedule():
    pieces = schedule((0.25, (1, 0)), (0.5, (1, 1)), (1.0, (0, 1)))
    plan = plan_of([50, 70], "schedule", schedule=pieces, total=200)
    tasks = [task for task, _ in plan.slice(0, 260)]
    assert set(tasks[:50]) == {0} and Counter(tasks[50:100]) == {0: 25, 1: 25} and set(tasks[100:]) == {1}
    assert plan.counts(200) == {"task0": 75, "task1": 125}
    assert plan.counts(260) == {"task0": 75, "task1": 185}
    # a task goes on through its rows where the piece before stopped
    rows = [row for task, row in plan.slice(0, 200) if task == 0]
    assert sorted(rows[:50]) == list(range(50)) and len(set(rows[50:])) == 25
    assert [plan[i] for i in (199, 99, 0)] == [plan.slice(0, 200)[i] for i in (199, 99, 0)]


def test_schedule_picks_the_examples_of_a_limited_plan():
    pieces = schedule((0.5, (1, 0)), (1.0, (1, 3)))
    assert plan_of([50, 70], "schedule", schedule=pieces, examples=40).counts(40) == {"task0": 25, "task1": 15}
    # more than there is: task 0 is only drawn in the first half
    short = plan_of([50, 10], "schedule", schedule=schedule((0.5, (1, 0)), (1.0, (0, 1))), examples=58)
    assert short.counts(short.num_distinct) == {"task0": 29, "task1": 10}


@pytest.mark.parametrize(
    ("sampling", "message"),
    [
        ({"strategy": "weights", "weights": {"task0": 1, "tsk1": 1}}, "weights.tsk1: .* did you mean 'task1'?"),
        ({"strategy": "weights", "weights": {"task0": 1}}, "data.sampling.weights has no weight for task task1"),
        ({"strategy": "weights", "weights": {"task0": 0, "task1": 0}}, "all weights are 0"),
        ({"strategy": "weights", "weights": {"task0": -1, "task1": 1}}, "weights.task0=-1.0 must be a number"),
        ({"strategy": "schedule"}, "data.sampling.schedule is empty"),
        ({"strategy": "schedule", "schedule": [{"untill": 1, "weights": {}}]}, r"\[0\].untill: unknown key; did you"),
        ({"strategy": "schedule", "schedule": [{"until": "x", "weights": {}}]}, r"\[0\].until='x'; give a fraction"),
        ({"strategy": "schedule", "schedule": [{"until": 1}]}, r"\[0\].weights=None; give a weight per task"),
        ({"strategy": "schedule", "schedule": schedule((0.5, (1, 1)))}, "last piece has until=0.5; it must be 1.0"),
        (
            {"strategy": "schedule", "schedule": schedule((0.5, (1, 1)), (0.5, (1, 1)))},
            r"\[1\].until=0.5 must be above 0.5 and at most 1",
        ),
        (
            {"strategy": "schedule", "schedule": schedule((0.5, (1, 1)), (1.0, (1, 1)))},
            "strategy=schedule needs the length of the stage",
        ),
    ],
)
def test_bad_sampling(sampling, message):
    with pytest.raises(ConfigError, match=message):
        plan_of([5, 5], **sampling)


def test_empty_task():
    with pytest.raises(ConfigError, match="task task1 has no rows to draw from"):
        plan_of([5, 0])


def test_negative_sample():
    with pytest.raises(IndexError, match="a plan begins at 0"):
        plan_of([5])[-1]


@settings(max_examples=50, deadline=None)
@given(n=st.integers(0, 200))
def test_seeded_order_is_a_permutation(n):
    assert np.sort(seeded_order(n, 1, "x")).tolist() == list(range(n))
