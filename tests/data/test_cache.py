"""The cache: same examples with it, without it and from it; another key for whatever changes a token; no damage."""

import multiprocessing
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from loramoe_train.data import cache as cache_module
from loramoe_train.data.build import build_mixture
from loramoe_train.data.cache import TokenCache, cache_folder, tokenizer_digest
from loramoe_train.data.shards import SUFFIX, as_shard, read_shard, write_shard
from loramoe_train.data.stage import MixtureStage
from loramoe_train.data.templates import Renderer
from loramoe_train.data.tokens import Encoder
from loramoe_train.errors import ConfigError, DataError
from loramoe_train.schema.data import SamplingConfig
from tests.conftest import ROOT, make_tokenizer
from tests.data.helpers import qa_config, qa_rows, qa_task, write_lines

SIZES = {"one": 30, "two": 11}


def config(root, folder, **changes):
    return qa_config(root / "rows", SIZES, cache_dir=None if folder is None else str(folder), **changes)


def batches(mixture, **options):
    plan = mixture.plan(SamplingConfig(strategy="equal"))
    stage = MixtureStage(mixture, plan, batch_size=8, micro_batch_size=4, **options)
    return [batch for step in stage.steps(start=0, stop=6) for batch in step]


def flush(mixture):
    for task in mixture.tasks:
        task.cache.flush()


def assert_same(left, right):
    assert len(left) == len(right) > 0
    for a, b in zip(left, right, strict=True):
        for name, value in vars(a).items():
            other = getattr(b, name)
            assert torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other


def forbid(monkeypatch, *owners):
    def refuse(*arguments):
        raise AssertionError("called although the cache knows")

    for owner in owners:
        monkeypatch.setattr(owner, "__call__", refuse)


@pytest.mark.parametrize("packing", [{}, {"packing": True, "max_length": 24}])
def test_on_off_and_warm_are_the_same(tmp_path, tokenizer, monkeypatch, packing):
    short = {"max_length": 24}  # some examples are cut
    off = build_mixture(config(tmp_path, None, **short), tokenizer, seed=3)
    on = build_mixture(config(tmp_path, tmp_path / "cache", **short), tokenizer, seed=3)
    plain = batches(off, **packing)
    assert_same(plain, batches(on, **packing))
    flush(on)
    forbid(monkeypatch, Encoder, Renderer)  # nor is any row rendered to be checked
    warm = build_mixture(config(tmp_path, tmp_path / "cache", **short), tokenizer, seed=3)
    assert_same(plain, batches(warm, **packing))
    assert warm.truncated == off.truncated and off.truncated["one"] > 0


def folders(folder):
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("change", ["row", "prompt", "max_length", "supervise", "tokenizer"])
def test_whatever_changes_tokens_has_its_own_folder(tmp_path, tokenizer, change):
    folder = tmp_path / "cache"
    before = build_mixture(config(tmp_path, folder), tokenizer)
    before.example(0, 0)
    flush(before)
    assert len(folders(folder)) == 2
    changes, other = {}, tokenizer
    if change == "prompt":
        changes["definitions"] = {"one": qa_task("one", prompt="Q: {{q}}\nA:"), "two": qa_task("two")}
    elif change in ("max_length", "supervise"):
        changes[change] = {"max_length": 20, "supervise": "all"}[change]
    elif change == "tokenizer":
        other = make_tokenizer(begin=True)
    new = config(tmp_path, folder, **changes)
    if change == "row":
        write_lines(tmp_path / "rows" / "one" / "train.jsonl", [{"q": "new", "a": "other"}, *qa_rows("one", 29)])
    after = build_mixture(new, other)
    fresh = build_mixture(new.model_copy(update={"cache_dir": None}), other)
    assert np.array_equal(after.example(0, 0).ids, fresh.example(0, 0).ids)
    assert np.array_equal(after.example(0, 0).supervised, fresh.example(0, 0).supervised)
    flush(after)
    assert len(folders(folder)) > 2


def test_what_changes_no_token_shares_the_folder(tmp_path, tokenizer):
    folder = tmp_path / "cache"
    for changes in ({}, {"max_examples": 5}, {"validation_examples": 2}):
        mixture = build_mixture(config(tmp_path, folder, **changes), tokenizer)
        mixture.example(0, 1)
        flush(mixture)
    assert len(folders(folder)) == 2


def test_the_digest_ignores_the_settings_of_a_call(tokenizer):
    other = make_tokenizer()
    other(["a", "bb"], padding=True, truncation=True, max_length=5)
    assert tokenizer_digest(other) == tokenizer_digest(tokenizer)
    other.add_tokens(["<new>"])
    assert tokenizer_digest(other) != tokenizer_digest(tokenizer)


def test_a_tokenizer_of_foreign_code_is_not_cached(tokenizer):
    class Foreign(type(tokenizer)):
        pass

    other = make_tokenizer()
    other.__class__ = Foreign
    assert tokenizer_digest(other) is None


def test_a_bad_row_is_found_although_others_are_known(tmp_path, tokenizer):
    folder = tmp_path / "cache"
    good = config(tmp_path, folder)
    build_mixture(good, tokenizer)
    path = write_lines(tmp_path / "rows" / "one" / "train.jsonl", [*qa_rows("one", 30), {"q": "x", "a": ""}])
    for _ in range(2):  # what failed must not count as checked
        with pytest.raises(DataError) as caught:
            build_mixture(good, tokenizer)
        assert str(caught.value).startswith(f"{path}:31: ")


def found(row, length=5):
    ids = np.arange(row, row + length, dtype=np.int32)
    return ids, ids % 2 == 0, bool(row % 3)


def assert_found(cache, rows):
    for row in rows:
        for stored, given in zip(cache.get(row), found(row, row % 7 + 1), strict=True):
            assert np.array_equal(stored, given)


def fill(folder, rows):
    cache = TokenCache(folder)
    for row in rows:
        cache.add(row, found(row, row % 7 + 1))
    cache.flush()
    return cache


def shards(folder):
    return sorted(path for path in folder.iterdir() if path.name.endswith(SUFFIX))


def test_rows_in_any_order_and_many_shards(tmp_path, monkeypatch):
    monkeypatch.setattr(cache_module, "SHARD_ROWS", 4)
    rows = np.random.default_rng(0).permutation(100)[:50].tolist()
    fill(tmp_path, rows)
    assert len(shards(tmp_path)) == 13
    reader = TokenCache(tmp_path)
    assert len(shards(tmp_path)) == 1  # merged
    assert_found(reader, rows)
    assert all(reader.get(row) is None for row in range(100) if row not in rows)
    assert not list(tmp_path.glob("*.tmp"))


def test_rows_of_another_process_are_not_written_twice(tmp_path):
    one, two = TokenCache(tmp_path), TokenCache(tmp_path)
    for cache in (one, two):
        cache.add(1, found(1, 2))
        cache.flush()
    assert len(shards(tmp_path)) == 1 and two.get(1) is not None


@pytest.mark.parametrize("damage", ["cut", "flip", "foreign", "empty", "folder"])
def test_a_damaged_file_is_ignored_and_its_rows_made_again(tmp_path, damage):
    fill(tmp_path, [3])
    fill(tmp_path, [4])
    path = next(p for p in shards(tmp_path) if read_shard(p).rows[0] == 3)
    content = path.read_bytes()
    if damage == "folder":
        path.unlink()
        path.mkdir()
    else:
        flipped = content[:-9] + bytes([content[-9] ^ 1]) + content[-8:]
        path.write_bytes({"cut": content[:-1], "flip": flipped, "foreign": b"hello\n" * 20, "empty": b""}[damage])
    cache = TokenCache(tmp_path)
    assert cache.get(3) is None
    assert_found(cache, [4])
    assert_found(fill(tmp_path, [3]), [3, 4])


def test_merging_streams_and_keeps_the_first(tmp_path):
    parts = [as_shard({1: found(1), 5: found(5)}), as_shard({5: found(6), 2: found(2, 3)})]
    merged = read_shard(write_shard(tmp_path, parts))
    assert merged.rows.tolist() == [1, 2, 5]
    for row, wanted in ((1, found(1)), (2, found(2, 3)), (5, found(5))):
        assert all(np.array_equal(a, b) for a, b in zip(merged.find(row), wanted, strict=True))


def _fill_many(folder, first):
    cache = TokenCache(folder)
    for row in range(first, first + 40):
        cache.add(row, found(row, row % 7 + 1))
        cache.flush()


def test_several_processes_at_once(tmp_path):
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_fill_many, args=(tmp_path, first)) for first in (0, 20, 40)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    for _ in range(2):  # merged by the first reader, read by the second
        assert_found(TokenCache(tmp_path), range(80))


def test_worker_processes_fill_it(tmp_path, tokenizer, monkeypatch):
    folder = tmp_path / "cache"
    mixture = build_mixture(config(tmp_path, folder), tokenizer, seed=3)
    mixture.example(0, 0)  # the parent's own, which no worker may write for it
    made = batches(mixture, num_workers=2)
    own = mixture.example(0, 0).name
    drawn = {name for batch in made for name in batch.example_ids}
    for task in mixture.tasks:
        stored = {row for path in shards(task.cache._folder) for row in read_shard(path).rows.tolist()}
        assert {f"{task.name}:train:{row}" for row in stored} == {n for n in drawn - {own} if n.startswith(task.name)}
    flush(mixture)
    forbid(monkeypatch, Encoder)
    assert_same(made, batches(build_mixture(config(tmp_path, folder), tokenizer, seed=3)))


def test_written_when_the_process_ends(tmp_path):
    code = (
        "import numpy as np, sys; from pathlib import Path; from loramoe_train.data.cache import TokenCache;"
        "c = TokenCache(Path(sys.argv[1])); c.add(7, (np.arange(3, dtype=np.int32), np.ones(3, bool), False))"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, check=True)
    ids, supervised, truncated = TokenCache(tmp_path).get(7)
    assert ids.tolist() == [0, 1, 2] and supervised.all() and not truncated


def test_where_the_folder_is(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder("auto") == tmp_path / "xdg" / "loramoe" / "tokens"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_folder("auto") == tmp_path / "home" / ".cache" / "loramoe" / "tokens"
    assert cache_folder("~/mine") == tmp_path / "home" / "mine"
    assert cache_folder(None) is None


def test_a_folder_that_cannot_be(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match=r"data.cache_dir=.*/file cannot be used: .*; give a folder, or null"):
        cache_folder(str(tmp_path / "file"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert cache_folder("auto") is None  # nobody asked for it, so nobody is stopped


def test_a_disk_that_is_gone_stops_nobody(tmp_path):
    cache = TokenCache(tmp_path / "key")
    (tmp_path / "key").write_text("in the way")
    cache.add(1, found(1))
    cache.flush()
    assert cache.get(1) is None


def test_parquet_rows_have_a_digest(tmp_path, monkeypatch):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    from loramoe_train.data.source import open_rows
    from loramoe_train.schema.data import SourceConfig

    digests = []
    for value in ("a", "a", "b"):
        path = Path(tmp_path / f"{value}.parquet")
        if not path.exists():
            pq.write_table(pa.table({"q": [value]}), path)
        source = SourceConfig(files={"train": str(path)})
        digests.append(open_rows("t", source, "train", None).digest())
    assert digests[0] == digests[1] != digests[2]
