"""`loramoe-plan --multirun`: a sweep's cost is the sum of its runs'."""

import re
from pathlib import Path

import pytest

from loramoe_train.errors import ConfigError
from loramoe_train.planning import make_counts
from loramoe_train.schema.run import RunConfig
from loramoe_train.schema.trainer import TrainerConfig
from loramoe_train.sweeps import cost
from loramoe_train.sweeps.cost import cost_of, print_cost
from tests.composing import composed
from tests.forks import run_forked
from tests.sweeps.made import combination


def test_a_run_by_hand() -> None:
    config = composed("+recipe=mola", "trainer.max_steps=7", "trainer.batch_size=4", "trainer.keep=3")
    found, (counts, *_) = cost_of(config), make_counts(config)
    weights = 4 * (counts.experts + counts.routers)
    assert found.steps == 7 and found.tokens > 7 * 4
    assert found.checkpoint == weights + 8 * counts.trained  # AdamW's two moments
    assert found.on_disk == (3 + 1) * found.checkpoint + 2 * weights
    assert found.memory > 4 * counts.base + weights


def test_the_command_adds_up(tmp_path: Path) -> None:
    given = ("+recipe=mola", "experts.layout=2468,8642", "seed=0,1", "trainer.max_steps=5")
    done = run_forked("plan", "--multirun", *given, "+plan.tokens_per_second=100", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert not list(tmp_path.iterdir())
    rows = [[cell.strip() for cell in re.split("[│┃]", line)[1:-1]] for line in done.stdout.splitlines()]
    rows = [row for row in rows if row]
    head, *runs, total = rows
    assert head[:4] == ["run", "experts.layout", "seed", "steps"] and len(runs) == 4 and total[0] == "all"
    for name in ("steps", "tokens", "MiB on disk"):
        at = head.index(name)
        numbers = [float(row[at].replace(",", "")) for row in runs]
        # cells are rounded
        assert abs(float(total[at].replace(",", "")) - sum(numbers)) <= 2.5 and min(numbers) > 0, name
    tokens, hours = (float(total[head.index(name)].replace(",", "")) for name in ("tokens", "hours"))
    assert abs(hours - tokens / 100 / 3600) < 0.01
    assert "1 process a run" in done.stdout


def test_without_the_data_the_rest_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    found = cost_of(composed("+recipe=mola", "data=mola_six"))
    assert found.steps is None and found.tokens is None and found.memory > found.checkpoint > 0
    print_cost([combination("seed=0", data=composed("+recipe=mola", "data=mola_six").data)])
    assert "the data or the tokenizer is not here" in " ".join(capsys.readouterr().out.split())


def test_runs_that_cost_the_same_are_counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    counted: list[int] = []
    monkeypatch.setattr(cost, "cost_of", lambda config, **_: counted.append(config.seed) or cost.Cost(1, 1.0, 1, 1, 1))
    plain = composed("+recipe=mola")
    other = {"seed": 1, "eval": plain.eval.model_copy(update={"base": False})}
    print_cost([combination("seed=0"), combination("seed=1", **other), combination("seed=2", trainer=longer(plain))])
    assert counted == [0, 0]


def longer(config: RunConfig) -> TrainerConfig:
    return config.trainer.model_copy(update={"max_steps": 9})


def test_a_run_that_cannot_be_counted_is_named() -> None:
    wrong = composed("+recipe=mola").experts.model_copy(update={"layout": [1, 2]})
    runs = [combination("experts.layout=2468"), combination("experts.layout=[1,2]", experts=wrong)]
    with pytest.raises(ConfigError, match=r"^run 1 \(experts.layout=\[1,2\]\): experts.layout=\[1, 2\] has 2 entries"):
        print_cost(runs)
