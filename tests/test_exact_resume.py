"""A run with everything at once that could depend on where it was stopped, resumed from each of its checkpoints."""

from pathlib import Path

import pytest
import torch

from loramoe_train.training.checkpoint import checkpoint_path
from tests.recipe_runs import differing, get_ready, short_run
from tests.training.test_resume import log

pytestmark = pytest.mark.usefixtures("one_thread")

# several micro-batches a step, examples packed into rows, dropout, jitter, a mixture that changes on the way, adapters
# that are pulled back, evaluations and lines of the log that fall between checkpoints
EVERYTHING = (
    "data.max_examples=7",
    "data.validation_examples=4",
    "data.packing=true",
    "data.max_length=128",
    "data.sampling.strategy=schedule",
    "data.sampling.block=4",
    "data.tasks=[tiny_math,tiny_code,tiny_facts]",
    "data.sampling.schedule=[{until: 0.5, weights: {tiny_math: 1, tiny_code: 1, tiny_facts: 0}},"
    "{until: 1.0, weights: {tiny_math: 1, tiny_code: 0, tiny_facts: 2}}]",
    "experts.dropout=0.2",
    "router.make.jitter=0.1",
    "trainer.stages.routers.train=[experts,routers]",
    "trainer.stages.routers.anchor=0.1",
    "trainer.log_every=2",
    "trainer.eval_every=2",
    "trainer.checkpoint_every=1",
)


def test_every_checkpoint_leads_to_the_same_end(tmp_path: Path) -> None:
    config = short_run("lora_mixer", tmp_path, *EVERYTHING)
    whole = get_ready(config)
    whole.train(tmp_path / "whole")
    expected, lines = whole.weights(), log(tmp_path / "whole")
    checkpoints = [checkpoint_path(tmp_path / "whole", step) for step in range(1, 6)]
    assert all(path.is_dir() for path in checkpoints)
    for path in checkpoints:
        torch.manual_seed(11)  # whatever happened in between
        again, run_dir = get_ready(config), tmp_path / path.name
        run_dir.mkdir()
        (run_dir / "metrics.jsonl").write_bytes((tmp_path / "whole" / "metrics.jsonl").read_bytes())
        again.train(run_dir, resume=path)
        assert differing(expected, again.weights()) == [], path.name
        assert log(run_dir) == lines, path.name


@pytest.mark.parametrize("change", ["router.make.jitter=0.2", "data.packing=false"])
def test_and_it_could_have_led_elsewhere(change: str, tmp_path: Path) -> None:
    """What is said to depend on nothing but the configuration does depend on it."""
    found = []
    for own in ((), (change,)):
        ready = get_ready(short_run("lora_mixer", tmp_path, *EVERYTHING, "trainer.max_steps=2", *own))
        ready.train(tmp_path / str(len(own)))
        found.append(ready.weights())
    assert differing(*found)
