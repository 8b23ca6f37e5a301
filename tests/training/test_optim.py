"""Schedules are functions of the step; optimizer state survives being taken apart."""

from itertools import pairwise
from math import cos, pi

import pytest
import torch
from torch import nn

from loramoe_train.errors import ConfigError
from loramoe_train.schema.trainer import TrainerConfig
from loramoe_train.training.optim import (
    build_optimizer,
    halts_on_device,
    load_optimizer_tensors,
    optimizer_tensors,
    schedule_factor,
    set_learning_rates,
)
from loramoe_train.training.snapshot import snapshot
from loramoe_train.training.stages import StagePlan, plan_stages


def make_plan(steps: int = 10, *, train: tuple[str, ...] = ("experts", "routers"), **trainer) -> tuple:
    stages = {"a": {"steps": steps, "train": list(train)}}
    config = TrainerConfig(**{"lr": 0.1, "router_lr": 0.2, "stages": stages, "warmup_fraction": 0.2, **trainer})
    return config, plan_stages(config, {"a": 100})[0]


def factors(name: str, steps: int = 10) -> list[float]:
    config, plan = make_plan(steps, schedule=name)
    return [schedule_factor(config, plan, step) for step in range(steps)]


def test_schedules_by_hand() -> None:
    warm = [1 / 3, 2 / 3]
    assert factors("constant") == pytest.approx([*warm, *[1.0] * 8])
    assert factors("linear") == pytest.approx([*warm, *[1 - i / 8 for i in range(8)]])
    assert factors("cosine") == pytest.approx([*warm, *[(1 + cos(pi * i / 8)) / 2 for i in range(8)]])


@pytest.mark.parametrize("name", ["cosine", "linear", "constant"])
@pytest.mark.parametrize("steps", [1, 2, 3, 50])
def test_no_step_is_wasted(name: str, steps: int) -> None:
    found = factors(name, steps)
    assert all(0 < factor <= 1 for factor in found) and max(found) == 1
    peak = found.index(1.0)
    assert all(a <= b for a, b in pairwise(found[: peak + 1])) and all(a >= b for a, b in pairwise(found[peak:]))


def groups() -> dict[str, dict[str, nn.Parameter]]:
    torch.manual_seed(0)
    return {
        "experts": {"s.bank.down": nn.Parameter(torch.randn(4, 6)), "s.bank.up": nn.Parameter(torch.randn(6, 4))},
        "routers": {"s.router.w": nn.Parameter(torch.randn(3, 6))},
    }


def take_steps(config: TrainerConfig, plan: StagePlan, members: dict, optimizer: torch.optim.Optimizer, steps: range):
    for step in steps:
        set_learning_rates(optimizer, schedule_factor(config, plan, step))
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.sin(parameter.detach() * (step + 1))
        optimizer.step()


def test_groups_have_their_own_rates() -> None:
    config, plan = make_plan()
    optimizer = build_optimizer(config, plan, groups())
    assert [g["name"] for g in optimizer.param_groups] == ["experts", "routers"]
    assert set_learning_rates(optimizer, 0.5) == {"experts": 0.05, "routers": 0.1}
    assert all(g["fused"] for g in optimizer.param_groups)


def test_up_factors_may_learn_faster() -> None:
    """LoRA+: the groups of experts differ by the ratio; the routers keep theirs. Without a ratio nothing is split."""
    config, plan = make_plan(up_lr_ratio=16.0)
    members = groups()
    optimizer = build_optimizer(config, plan, members)
    assert set_learning_rates(optimizer, 1.0) == {"experts": 0.1, "experts_up": pytest.approx(1.6), "routers": 0.2}
    by_name = {group["name"]: group["params"] for group in optimizer.param_groups}
    assert by_name["experts"][0] is members["experts"]["s.bank.down"]
    assert by_name["experts_up"][0] is members["experts"]["s.bank.up"]


def test_nothing_to_train() -> None:
    config, plan = make_plan(train=("routers",))
    with pytest.raises(ConfigError, match=r"train is \['routers'\], but the model has no such parameters; it has: exp"):
        build_optimizer(config, plan, {**groups(), "routers": {}})
    config, plan = make_plan()  # plain LoRA has no routers, and the default says both
    assert len(build_optimizer(config, plan, {**groups(), "routers": {}}).param_groups) == 1


def test_eight_bit_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    config, plan = make_plan(optimizer="adamw_8bit")
    with pytest.raises(ConfigError, match=r"trainer\.optimizer=adamw_8bit needs bitsandbytes"):
        build_optimizer(config, plan, groups())


@pytest.mark.parametrize("name", ["adamw", "adamw_8bit"])
def test_state_survives_safetensors(name: str, tmp_path) -> None:
    from safetensors.torch import load_file, save_file

    if name == "adamw_8bit":
        pytest.importorskip("bitsandbytes")
    config, plan = make_plan(optimizer=name)

    def build(members: dict) -> tuple[torch.optim.Optimizer, dict[int, str]]:
        return build_optimizer(config, plan, members), {id(p): n for g in members.values() for n, p in g.items()}

    whole = groups()
    # large enough for 8-bit states
    for group in whole.values():
        for key in group:
            group[key] = nn.Parameter(torch.randn(64, 96))
    parts = {g: {n: nn.Parameter(p.detach().clone()) for n, p in members.items()} for g, members in whole.items()}
    optimizer, _ = build(whole)
    take_steps(config, plan, whole, optimizer, range(6))

    optimizer, names = build(parts)
    take_steps(config, plan, parts, optimizer, range(3))
    tensors, numbers = optimizer_tensors(optimizer, names)
    save_file(snapshot({"o": tensors})["o"], tmp_path / "o.safetensors")
    optimizer, names = build(parts)
    load_optimizer_tensors(optimizer, names, load_file(tmp_path / "o.safetensors"), numbers)
    take_steps(config, plan, parts, optimizer, range(3, 6))
    for group in whole:
        for key in whole[group]:
            assert torch.equal(whole[group][key], parts[group][key]), key


def test_a_halted_optimizer_does_nothing_and_another_is_undisturbed() -> None:
    config, plan = make_plan(weight_decay=0.1)
    found = {}
    for name, flags in {"plain": None, "watched": [0.0] * 4, "halted": [0.0, 0.0, 1.0, 1.0]}.items():
        members = groups()
        optimizer = build_optimizer(config, plan, members)
        halted = torch.zeros(())
        if flags is not None:
            assert halts_on_device(optimizer, halted)
        for step in range(4):
            halted.fill_(0.0 if flags is None else flags[step])
            take_steps(config, plan, members, optimizer, range(step, step + 1))
            names = {id(p): n for g in members.values() for n, p in g.items()}
            tensors, _ = optimizer_tensors(optimizer, names)
            weights = {n: p.detach() for g in members.values() for n, p in g.items()}
            found[name, step] = snapshot({"all": {**tensors, **weights}})["all"]
    for key, value in found["plain", 3].items():
        assert torch.equal(found["watched", 3][key], value), key
        assert torch.equal(found["halted", 3][key], found["plain", 1][key]), key
    assert any(not torch.equal(value, found["plain", 1][key]) for key, value in found["plain", 3].items())


def test_not_every_optimizer_can_halt() -> None:
    parameter = torch.nn.Parameter(torch.zeros(2))
    assert not halts_on_device(torch.optim.AdamW([parameter], foreach=True), torch.zeros(()))


def test_state_of_other_parameters() -> None:
    config, plan = make_plan()
    members = groups()
    optimizer = build_optimizer(config, plan, members)
    take_steps(config, plan, members, optimizer, range(1))
    names = {id(p): n for g in members.values() for n, p in g.items()}
    tensors, numbers = optimizer_tensors(optimizer, names)
    fewer = {"experts": members["experts"], "routers": {}}
    with pytest.raises(ConfigError, match=r"holds 3 tensors and this run trains 2 \(first difference: s.router.w\)"):
        load_optimizer_tensors(build_optimizer(config, plan, fewer), names, tensors, numbers)
