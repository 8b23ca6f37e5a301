"""Continuing a run under another configuration: what differs is named and refused, unless it is named back."""

import json
from pathlib import Path

import pytest
import torch
import yaml

from loramoe_train.errors import ConfigError
from loramoe_train.rundir import RESOLVED, check_places, claim
from loramoe_train.schema.run import RunConfig
from loramoe_train.training.checkpoint import find_latest
from tests.composing import composed
from tests.training.harness import make_parts, make_trainer, train, weights

RUN = ("+recipe=lora_mixer", "trainer.max_steps=6", "trainer.lr=0.02")


def config(run_dir: Path, *overrides: str) -> RunConfig:
    return composed(*RUN, *overrides).model_copy(update={"run_dir": str(run_dir)})


@pytest.fixture
def begun(tmp_path: Path) -> Path:
    assert claim(tmp_path / "run", config(tmp_path / "run"))
    return tmp_path / "run"


def test_what_changes_no_result_may_change(begun):
    free = ("trainer.log_every=1", "eval.limit=3", "trainer.watch.patience=9", "offline=true")
    assert claim(begun, config(begun, "resume=auto", *free)) is False


def test_every_difference_is_named(begun):
    changed = config(begun, "resume=auto", "trainer.lr=0.01", "seed=4", "experts.rank=2")
    with pytest.raises(ConfigError) as told:
        claim(begun, changed)
    line = str(told.value)
    for words in ("trainer.lr=0.01 (it was 0.02)", "seed=4 (it was 0)", "experts.rank=2", "init_from=", "run_dir"):
        assert words in line, line
    assert "resume_changes=[experts.rank,seed,trainer.lr]" in line and "\n" not in line


def test_named_keys_may_differ(begun):
    changed = config(begun, "resume=auto", "trainer.lr=0.01", "seed=4", "resume_changes=[trainer,seed]")
    assert claim(begun, changed) is False
    with pytest.raises(ConfigError, match=r"seed=0 \(it was 4\)"):  # what was changed once is what counts from now on
        claim(begun, config(begun, "resume=auto", "trainer.lr=0.01"))


def test_a_run_of_an_older_version(begun):
    """Keys that it did not know count as their defaults."""
    stored = yaml.safe_load((begun / RESOLVED).read_text())
    del stored["trainer"]["max_skipped_steps"], stored["trainer"]["parallel"], stored["resume_changes"]
    (begun / RESOLVED).write_text(yaml.safe_dump(stored))
    with pytest.raises(ConfigError, match=r"trainer\.max_skipped_steps=2 \(it was 0\)"):
        claim(begun, config(begun, "resume=auto", "trainer.max_skipped_steps=2"))
    assert claim(begun, config(begun, "resume=auto")) is False


def test_a_name_that_is_no_key(begun):
    with pytest.raises(ConfigError, match=r"resume_changes names 'trainer\.lrr', which is no key; .*'trainer\.lr'"):
        claim(begun, config(begun, "resume=auto", "resume_changes=[trainer.lrr]"))


def test_a_checkpoint_that_is_named_is_compared_too(tmp_path):
    checkpoint = tmp_path / "other" / "checkpoints" / "step_000002"
    checkpoint.mkdir(parents=True)
    stored = {k: v for k, v in config(tmp_path).plain().items() if k not in ("run_dir", "resume", "init_from")}
    (checkpoint / "adapter.json").write_text(json.dumps({"config": stored}))
    here = f"resume={checkpoint}"
    check_places(config(tmp_path / "new", here))
    with pytest.raises(ConfigError, match=r"continues the run in .*step_000002, .*: trainer\.lr=0\.5 \(it was 0\.02\)"):
        check_places(config(tmp_path / "new", here, "trainer.lr=0.5"))


def test_another_rate_from_the_checkpoint_on(tmp_path):
    """The steps before it are what they were; those after it are taken at the new rate."""
    short = {"eval_every": None, "log_every": 2, "checkpoint_every": 2}
    parts = make_parts()
    train(parts, make_trainer(**short, lr=5e-3), tmp_path)
    again, checkpoint = make_parts(), tmp_path / "checkpoints" / "step_000002"
    with pytest.raises(ConfigError, match="stage first has lr=0.05, but checkpoint"):
        train(again, make_trainer(**short, lr=5e-2), tmp_path, resume=checkpoint)
    train(again, make_trainer(**short, lr=5e-2), tmp_path, resume=checkpoint, changed=True, seed=9)
    log = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    rates = [entry["lr"]["experts"] for entry in log if entry["kind"] == "train"]
    assert rates[0] < 6e-3 and rates[1] > 6e-3
    assert not all(torch.equal(weights(again)[name], tensor) for name, tensor in weights(parts).items())


def test_stages_keep_their_places(tmp_path):
    train(make_parts(), make_trainer(), tmp_path)
    second = find_latest(tmp_path)
    shorter = {"first": {"train": ["experts"], "routing": "by_domain", "steps": 2}, "second": {"steps": 3}}
    with pytest.raises(ConfigError, match="stage second has first_step=2, but checkpoint .* has 3"):
        train(make_parts(), make_trainer(stages=shorter), tmp_path, resume=second, changed=True)
    cut = tmp_path / "cut"
    train(make_parts(), make_trainer(checkpoint_every=2), cut)
    few = {"first": {"train": ["experts"], "routing": "by_domain", "steps": 1}}
    with pytest.raises(ConfigError, match="stage first has 1 steps, but checkpoint .* has taken 2 of it"):
        train(make_parts(), make_trainer(stages=few), cut, resume=cut / "checkpoints" / "step_000002", changed=True)
