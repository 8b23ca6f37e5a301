"""Faults that train on silently elsewhere."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from loramoe_train.errors import ConfigError
from loramoe_train.routing.types import Routing
from loramoe_train.training.checks import GradientCheck, check_sites_called, unit_of, unmoved_experts
from loramoe_train.training.stages import StagePlan, plan_stages
from tests.training.harness import (
    EXPERTS,
    SITES,
    MadeUpData,
    PlainRouter,
    make_batch,
    make_parts,
    make_step,
    make_trainer,
    train,
    weights,
)


def bypass(module: nn.Module) -> None:
    """The model multiplies by the raw weight instead of calling the layer, as fused kernels do."""
    base = module.base
    module.forward = lambda x: x @ base.weight.T


def test_a_bypassed_site(tmp_path: Path) -> None:
    parts = make_parts()
    bypass(parts.model.get_submodule(SITES[2]))
    before = weights(parts)
    with pytest.raises(ConfigError, match=f"1 of 4 sites of experts.sites were never called .*: {SITES[2]}; leave"):
        train(parts, make_trainer(), tmp_path)
    assert all(torch.equal(value, before[name]) for name, value in weights(parts).items())
    assert not (tmp_path / "checkpoints").exists()


def test_sites_are_listed_up_to_a_limit() -> None:
    with pytest.raises(ConfigError, match="7 of 8 .*: s1, s2, s3, s4, s5 and 2 more; leave"):
        check_sites_called([f"s{i}" for i in range(8)], {"s0": 3})


class Deaf(PlainRouter):
    """Scores the tokens and then lets everybody vote alike."""

    def forward(self, x_ND: Tensor, context) -> Routing:
        routing = super().forward(x_ND, context)
        return Routing(torch.full_like(routing.weights_NE, 1 / EXPERTS) + 0.0 * routing.weights_NE, routing.logits_NE)


class Detached(PlainRouter):
    def forward(self, x_ND: Tensor, context) -> Routing:
        routing = super().forward(x_ND, context)
        return Routing(routing.weights_NE.detach())


def parts_with(router: type, broken: str = SITES[1], **options):
    def make(spec, device):
        return (router if spec.site.name == broken else PlainRouter)(spec.site.in_features, spec.num_experts)

    return make_parts(router=make, aux={}, **options)


def test_a_router_whose_gradient_is_zero(tmp_path: Path) -> None:
    trainer = make_trainer(stages={"soft": {"steps": 6}})
    with pytest.raises(ConfigError) as caught:
        train(parts_with(Deaf), trainer, tmp_path)
    text = str(caught.value)
    assert (
        f"stage soft: the gradient of the routers of 1 of 4 sites was zero throughout the first 5 steps: {SITES[1]}"
        in text
    )
    assert "router.top_k" in text and "\n" not in text


def test_a_router_without_any_gradient(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"stage soft: no gradient reaches {SITES[1]}\.router\.weight; nothing"):
        train(parts_with(Detached), make_trainer(stages={"soft": {"steps": 6}}), tmp_path)


@pytest.mark.parametrize("steps", [1, 2, 6])
def test_fresh_experts_are_no_false_alarm(steps: int, tmp_path: Path) -> None:
    """Their outputs are all zero at first, so routers get no gradient in the first step, and may have only that one."""
    summary = train(parts_with(PlainRouter, fresh=True), make_trainer(stages={"soft": {"steps": steps}}), tmp_path)
    assert summary.steps == steps


def test_the_router_of_a_single_expert_has_nothing_to_learn(tmp_path: Path) -> None:
    summary = train(parts_with(PlainRouter, ranks=(4,)), make_trainer(stages={"s": {"steps": 3}}), tmp_path)
    assert summary.steps == 3


def test_experts_that_reach_nothing(tmp_path: Path) -> None:
    """A layer whose output is multiplied by zero: every tensor has a gradient, and all are zero."""
    parts = make_parts(aux={})
    layer = parts.model.get_submodule(SITES[0])
    inner = layer.forward
    layer.forward = lambda x: inner(x) * 0.0
    with pytest.raises(
        ConfigError, match=f"the gradient of the experts of 1 of 4 sites was zero .*: {SITES[0]}; check"
    ):
        train(parts, make_trainer(stages={"s": {"train": ["experts"], "steps": 5}}), tmp_path)


def watch(steps: int, start: int, gradients: list[float | None]) -> list[bool]:
    """Which of the steps ask for a verdict, for one parameter with these gradients."""
    trainer = make_trainer(stages={"s": {"train": ["experts"], "steps": steps}})
    plan: StagePlan = plan_stages(trainer, {"s": 1})[0]
    parts = make_parts()
    parameter = nn.Parameter(torch.ones(2))
    check = GradientCheck(replace(parts, groups={"experts": {"a.bank.up": parameter}}), plan, start=start)
    due = []
    for step, gradient in enumerate(gradients, start):
        parameter.grad = None if gradient is None else torch.full((2,), gradient)
        due.append(check.observe(step))
        if due[-1]:
            check.verdict({"a": 3})
    return due


def test_when_the_verdict_is_due() -> None:
    assert watch(9, 0, [0.0, 0.0, 0.0, 1.0, 0.0, 0.0]) == [False, False, False, False, True, False]
    assert watch(2, 0, [0.0, 1.0]) == [False, True]
    assert watch(9, 7, [0.0, 1.0]) == [False, True]  # resumed near the end
    assert watch(9, 8, [0.0]) == [True]  # one step is too few to judge
    with pytest.raises(ConfigError, match="was zero throughout"):
        watch(9, 0, [0.0] * 5)
    with pytest.raises(ConfigError, match=r"no gradient reaches a\.bank\.up"):
        watch(9, 0, [None])


def test_unit_names() -> None:
    assert unit_of("m.q.bank.up", "experts") == "m.q" and unit_of("m.q.router.score.weight", "routers") == "m.q"
    assert unit_of("head", "routers") == "head"


def test_experts_that_never_moved(tmp_path: Path) -> None:
    """Two of three domains occur; ranks differ, so columns must be counted right."""
    parts = make_parts(ranks=(1, 3, 2), aux={})
    step = make_step(parts, make_trainer(stages={"s": {"train": ["experts"], "routing": "by_domain"}}), "s", tmp_path)
    for index in range(2):
        step(index, [make_batch([0, 1, 3, 4])])
    found = unmoved_experts(parts.model, step.optimizer, parts.groups["experts"])
    assert found == {site: [2] for site in SITES}
    step(2, [make_batch([2])])
    assert unmoved_experts(parts.model, step.optimizer, parts.groups["experts"]) == {}


def test_the_warning_is_in_summary_and_log(tmp_path: Path) -> None:
    class TwoTasks(MadeUpData):
        def steps(self, *, start: int, stop: int, **_: int):
            return ([make_batch([3 * s, 3 * s + 1])] for s in range(start, stop))

    parts = replace(make_parts(aux={}), stage_data=lambda name: TwoTasks(2, 2))
    trainer = make_trainer(stages={"hard": {"train": ["experts"], "routing": "by_domain", "steps": 3}})
    summary = train(parts, trainer, tmp_path)
    assert len(summary.warnings) == 1
    assert summary.warnings[0].startswith("hard: 4 experts never moved: no gradient of the stage reached them (model.")
    assert "never moved" in (tmp_path / "metrics.jsonl").read_text()


@pytest.mark.parametrize(("rise", "warned"), [(0.01, True), (0.1, False)])
def test_a_stage_that_leaves_the_loss_higher_than_it_found_it(rise: float, warned: bool, tmp_path: Path) -> None:
    """Here by a learning rate that no stage should have."""
    stages = {"hard": {"train": ["experts"], "routing": "by_domain", "steps": 3}, "soft": {"steps": 3, "lr": 3.0}}
    summary = train(make_parts(aux={}), make_trainer(stages=stages, watch={"loss_rise": rise}), tmp_path)
    before, after = (stage.eval_loss for stage in summary.stages)
    assert 0.01 < after - before < 0.1
    said = f"soft: the evaluation loss is {after:.4f} after 3 steps, and was {before:.4f} after stage hard; give this"
    assert [text.startswith(said) for text in summary.warnings if "evaluation loss" in text] == [True] * warned
