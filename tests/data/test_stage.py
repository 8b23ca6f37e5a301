"""Stages: what each rank gets in each step, with any number of ranks, from any step on, with and without workers."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loramoe_train.data.build import build_mixture, build_validation
from loramoe_train.data.stage import MixtureStage, check_batch_size
from loramoe_train.errors import ConfigError, DataError
from loramoe_train.schema.data import SamplingConfig
from tests.data.helpers import qa_config, qa_mixture


@pytest.fixture(scope="module")
def mixture(tmp_path_factory, tokenizer):
    return qa_mixture(tmp_path_factory.mktemp("stage"), {"one": 30, "two": 11, "three": 20}, tokenizer)


def make_stage(mixture, *, batch_size=12, micro_batch_size=4, **options):
    plan = mixture.plan(SamplingConfig(strategy="equal"), stage="train")
    return MixtureStage(mixture, plan, batch_size=batch_size, micro_batch_size=micro_batch_size, **options)


def names(batches):
    return [name for batch in batches for name in batch.example_ids]


def planned(mixture, stage, step, batch_size):
    return sorted(mixture.example(*stage.plan[i]).name for i in range(step * batch_size, (step + 1) * batch_size))


@settings(max_examples=40, deadline=None)
@given(
    world_size=st.integers(1, 5),
    batch_size=st.integers(1, 24),
    micro_batch_size=st.integers(1, 7),
    packing=st.booleans(),
    step=st.integers(0, 6),
)
def test_ranks_share_a_step_without_loss(mixture, world_size, batch_size, micro_batch_size, packing, step):
    options = {"packing": packing, "max_length": 64} if packing else {}
    stage = make_stage(mixture, batch_size=batch_size, micro_batch_size=micro_batch_size, **options)
    try:
        check_batch_size(batch_size, micro_batch_size, world_size)
    except ConfigError:
        assert batch_size < world_size or (micro_batch_size == 1 and batch_size % world_size)
        return
    shares = [next(stage.steps(start=step, stop=step + 1, rank=r, world_size=world_size)) for r in range(world_size)]
    assert sorted(name for share in shares for name in names(share)) == planned(mixture, stage, step, batch_size)
    assert len({len(share) for share in shares}) == 1
    row_tokens = 64 if packing else max(map(len, stage.examples(step)))
    for share in shares:
        for batch in share:
            assert batch.valid.numel() <= micro_batch_size * row_tokens and batch.num_supervised() > 0
            assert batch.packed == packing and batch.input_ids.shape[1] <= row_tokens


def test_sorting_wastes_little_padding(mixture):
    stage = make_stage(mixture, batch_size=24, micro_batch_size=4)
    (batches,) = stage.steps(start=0, stop=1)
    assert len(batches) == 6
    lengths = [batch.valid.sum(1).tolist() for batch in batches]
    assert sum(lengths, []) == sorted(sum(lengths, []))
    padding = sum(int((~batch.valid).sum()) for batch in batches)
    unsorted = list(map(len, stage.examples(0)))
    assert padding < 0.25 * padding_of(unsorted) and padding < 0.8 * padding_of(sorted(unsorted))


def padding_of(lengths):
    cut = [lengths[i : i + 4] for i in range(0, len(lengths), 4)]
    return sum(max(part) * len(part) - sum(part) for part in cut)


def test_ranks_get_alike_lengths(mixture):
    stage = make_stage(mixture, batch_size=24, micro_batch_size=4)
    one, two = (next(stage.steps(start=0, stop=1, rank=rank, world_size=2)) for rank in range(2))
    assert len(one) == len(two) == 3
    for left, right in zip(one, two, strict=True):
        lengths = torch.cat([left.valid.sum(1), right.valid.sum(1)]).sort().values.tolist()
        # dealt out in turn: the ranks' totals differ by no more than the stretch's longest does from its shortest
        assert abs(int(left.valid.sum()) - int(right.valid.sum())) <= lengths[-1]


def test_packing_uses_fewer_rows(mixture):
    (packed,) = make_stage(mixture, batch_size=24, packing=True, max_length=64).steps(start=0, stop=1)
    assert sum(len(batch.input_ids) for batch in packed) < 24


def test_any_step_at_once(mixture):
    whole = list(make_stage(mixture).steps(start=0, stop=6))
    later = list(make_stage(mixture).steps(start=4, stop=6))
    assert [names(step) for step in later] == [names(step) for step in whole[4:]]
    assert list(make_stage(mixture).steps(start=3, stop=3)) == []


def assert_same(left, right):
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert x.example_ids == y.example_ids
            assert torch.equal(x.input_ids, y.input_ids) and torch.equal(x.labels, y.labels)


def test_workers_change_nothing(tmp_path, tokenizer):
    sizes = {"one": 30, "two": 11}
    here, there = (qa_mixture(tmp_path, sizes, tokenizer, max_length=24) for _ in range(2))
    alone = list(make_stage(here).steps(start=1, stop=9, rank=1, world_size=2))
    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    ahead = list(make_stage(there, num_workers=2).steps(start=1, stop=9, rank=1, world_size=2))
    assert torch.equal(torch.random.get_rng_state(), state)  # dropout is not disturbed
    assert_same(alone, ahead)
    # what a worker cut is counted here as well
    assert here.truncated == there.truncated and here.truncated["one"] > 0


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_error_arrives_as_one_line(tmp_path, tokenizer, monkeypatch, num_workers):
    mixture = qa_mixture(tmp_path, {"one": 30}, tokenizer)

    def fail(rendered, where):
        raise DataError(f"{where}: bad row")

    monkeypatch.setattr(mixture, "encoder", fail)
    with pytest.raises(DataError) as caught:
        list(make_stage(mixture, num_workers=num_workers).steps(start=0, stop=2))
    assert str(caught.value).endswith(": bad row") and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("batch_size", "micro_batch_size", "world_size", "message"),
    [
        (2, 4, 3, "trainer.batch_size=2 is less than one example for each of 3 processes; use at least 3"),
        (9, 1, 4, "trainer.batch_size=9 cannot give 4 processes equally many .*; use 8 or 12, or"),
    ],
)
def test_batches_that_cannot_be_shared(mixture, batch_size, micro_batch_size, world_size, message):
    stage = make_stage(mixture, batch_size=batch_size, micro_batch_size=micro_batch_size)
    with pytest.raises(ConfigError, match=message):
        stage.steps(start=0, stop=1, rank=0, world_size=world_size)


def test_packing_needs_a_length(mixture):
    with pytest.raises(ConfigError, match="data.packing=true needs data.max_length"):
        make_stage(mixture, packing=True)


def test_validation_batches(tmp_path, tokenizer):
    config = qa_config(tmp_path, {"one": 50, "small": 5, "two": 30}, validation_examples=5)
    train = build_mixture(config, tokenizer)
    batches, notes = build_validation(config, tokenizer, train, batch_size=2)
    assert list(batches) == ["one", "two"] and len(notes) == 3
    assert [len(batch.input_ids) for batch in batches["one"]] == [2, 2, 1]
    assert sorted(names(batches["one"])) == [f"one:train:{i}" for i in range(45, 50)]
    # the task keeps its index although `small` has no rows
    assert set(batches["two"][0].task_ids[batches["two"][0].valid].tolist()) == {2}
