"""Stage planning is arithmetic on exact numbers."""

import subprocess
import sys

import pytest

from loramoe_train.errors import ConfigError
from loramoe_train.schema.trainer import StageConfig, TrainerConfig
from loramoe_train.training.stages import plan_stages


def plan(stages: dict | None = None, sizes: dict | None = None, aux: tuple[str, ...] = (), **trainer):
    config = TrainerConfig(**{"batch_size": 8, **({"stages": stages} if stages else {}), **trainer})
    return plan_stages(config, sizes or dict.fromkeys(config.stages, 100), aux_losses=aux)


def test_steps_are_passes_rounded_up() -> None:
    assert [p.steps for p in plan(epochs=1)] == [13]  # 100 / 8 = 12.5
    assert plan(epochs=2)[0].steps == 25
    assert plan(epochs=0.1, batch_size=10, sizes={"train": 1000})[0].steps == 10  # not 11: 0.1 is exact here
    assert plan({"a": {"examples": 20}})[0].steps == 3
    assert plan({"a": {"examples": 500}})[0].examples == 100  # there are no more
    assert plan({"a": {"steps": 7, "epochs": 99}})[0].steps == 7


def test_stages_follow_each_other() -> None:
    first, second = plan({"a": {"steps": 5}, "b": {"epochs": 1}})
    assert (first.index, first.first_step, first.end_step) == (0, 0, 5)
    assert (second.index, second.first_step, second.end_step) == (1, 5, 18)


@pytest.mark.parametrize(
    ("steps", "limit", "expected"),
    [
        ((90, 10), 10, (9, 1)),
        ((90, 10), 100, (90, 10)),
        ((90, 10), 1000, (900, 100)),  # the total, whatever the passes give
        ((1, 1, 1), 3, (1, 1, 1)),
        ((2, 3, 5), 7, (1, 2, 4)),  # 1.4, 2.1, 3.5: the half is the largest remainder
        ((1000, 1, 1), 4, (2, 1, 1)),  # nobody gets nothing
        ((5, 5), 3, (2, 1)),  # a tie goes to the earlier stage
    ],
)
def test_max_steps_is_shared_in_proportion(steps: tuple, limit: int, expected: tuple) -> None:
    stages = {f"s{i}": {"steps": n} for i, n in enumerate(steps)}
    assert tuple(p.steps for p in plan(stages, max_steps=limit)) == expected


def test_max_steps_below_the_number_of_stages() -> None:
    with pytest.raises(ConfigError, match=r"trainer\.max_steps is 1 for 2 stages \(a, b\); give at least 2"):
        plan({"a": {}, "b": {}}, max_steps=1)


def test_learning_rates_fall_back() -> None:
    (only,) = plan({"a": {}}, lr=1e-3)
    assert (only.lr, only.router_lr) == (1e-3, 1e-3)
    (only,) = plan({"a": {}}, lr=1e-3, router_lr=2e-3)
    assert (only.lr, only.router_lr) == (1e-3, 2e-3)
    (only,) = plan({"a": {"lr": 5e-3, "router_lr": 7e-3}}, lr=1e-3, router_lr=2e-3)
    assert (only.lr, only.router_lr) == (5e-3, 7e-3)
    (only,) = plan({"a": {"lr": 5e-3}}, lr=1e-3)
    assert only.router_lr == 5e-3


def test_warmup_leaves_at_least_one_step() -> None:
    assert plan({"a": {"steps": 100}}, warmup_fraction=0.03)[0].warmup_steps == 3
    assert plan({"a": {"steps": 1}}, warmup_fraction=0.9)[0].warmup_steps == 0
    assert plan({"a": {"steps": 10}}, warmup_fraction=0.0)[0].warmup_steps == 0


def test_aux_losses_of_a_stage() -> None:
    experts = {"train": ["experts"], "routing": "by_domain"}
    stages = {"hard": experts, "soft": {}, "none": {"aux_loss": []}, "one": {"aux_loss": ["z"]}}
    assert [p.aux_losses for p in plan(stages, aux=("balance", "z"))] == [(), ("balance", "z"), (), ("z",)]
    with pytest.raises(ConfigError, match=r"trainer\.stages\.a\.aux_loss names 'balanec'; did you mean 'balance'\?"):
        plan({"a": {"aux_loss": ["balanec"]}}, aux=("balance", "z"))
    with pytest.raises(ConfigError, match="under routing=by_domain no router scores anything"):
        plan({"a": {**experts, "aux_loss": ["z"]}}, aux=("z",))


@pytest.mark.parametrize("routing", ["by_domain", "uniform"])
@pytest.mark.parametrize("train", [["routers"], ["experts", "routers"]])
def test_routers_that_nobody_asks(routing: str, train: list[str]) -> None:
    with pytest.raises(ConfigError, match=f"trainer.stages.a.train names routers, but .*routing={routing}"):
        plan({"a": {"train": train, "routing": routing}})


def test_other_mistakes() -> None:
    with pytest.raises(ConfigError, match=r"trainer\.stages\.a\.train is empty"):
        plan({"a": {"train": []}})
    with pytest.raises(ConfigError, match="anchor is 0.1 but the stage does not train the experts"):
        plan({"a": {"train": ["routers"], "anchor": 0.1}})
    with pytest.raises(ConfigError, match="holds no examples"):
        plan({"a": {}}, sizes={"a": 0})


def test_a_plan_survives_json() -> None:
    import json

    (only,) = plan({"a": {}}, aux=("z",))
    assert json.loads(json.dumps(only.plain())) == only.plain()
    assert StageConfig().routing == "learned"


def test_no_torch() -> None:
    code = "import sys, loramoe_train.training.stages; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
