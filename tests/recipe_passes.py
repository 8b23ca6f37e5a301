"""Every shipped recipe on tiny models, stage by stage: what one training pass gives, to compare two ways to run it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loramoe_train.build import RoutedModel, build_aux
from loramoe_train.experts.peft_folder import read_peft_folder
from loramoe_train.schema.run import RunConfig
from tests.composing import composed
from tests.conftest import make_llama
from tests.test_routed_model import facts, ids_of, make_mamba, make_peft, route, stir

SMALL = ("experts.dropout=0.2", "router.top_k=2")
# name -> recipe, stage
CASES = {
    "lora_mixer, experts": ("lora_mixer", "experts"),
    "lora_mixer, routers": ("lora_mixer", "routers"),
    "plug and play": ("lora_mixer_plug_and_play", "routers"),
    "lora": ("lora", "train"),
    "xlora": ("xlora", "routers"),
}
IMPORTING = ("lora_mixer_plug_and_play", "xlora")  # recipes over downloaded adapters
PROJECTIONS = {"llama": ("q_proj", "v_proj"), "falcon_mamba": ("in_proj", "x_proj")}


@dataclass(frozen=True)
class Passed:
    """What a pass left behind, detached."""

    loss: Tensor
    gradients: dict[str, Tensor]  # of everything that the stage trains
    records: dict[str, Tensor]  # weights by site


def make_routed(
    recipe: str, kind: str, folder: Path, *overrides: str, **model_changes: Any
) -> tuple[RoutedModel, RunConfig]:
    """A tiny model with stirred experts in the recipe's arrangement. `kind`: llama or falcon_mamba."""
    model = make_llama(vocab_size=50, **model_changes) if kind == "llama" else make_mamba()
    own, adapters = ["experts.rank=2", "experts.alpha=4"], []
    if recipe in IMPORTING:  # of two ranks, and one without the second projection
        first, second = PROJECTIONS[kind]
        folders = [
            make_peft(model, folder / "one", 1, target_modules=[first, second]),
            make_peft(model, folder / "two", 2, r=2, target_modules=[first]),
        ]
        adapters, own = [read_peft_folder(path) for path in folders], [f"experts.adapters=[{folders[0]},{folders[1]}]"]
    if kind == "falcon_mamba":
        own.append("model=falcon_mamba_7b")
    config = composed(f"+recipe={recipe}", *SMALL, *own, *overrides)
    routed = route(model, config, adapters, domains=("only",) if recipe == "lora" else ("a", "b", "c"))
    stir(routed)
    return routed, config


def enter_stage(routed: RoutedModel, config: RunConfig, stage: str) -> None:
    """As the trainer does it."""
    plan = config.trainer.stages[stage]
    routed.context.mode = plan.routing
    for group, members in routed.groups.items():
        for parameter in members.values():
            parameter.requires_grad_(group in plan.train)
            parameter.grad = None
    routed.model.train()


def one_pass(routed: RoutedModel, config: RunConfig, stage: str, *, rows: int = 3, length: int = 6) -> Passed:
    """Forward and backward with the stage's auxiliary losses, their statistics from a pass without gradient before."""
    names = config.trainer.stages[stage].aux_loss
    terms = [term for name, term in build_aux(config, routed.plan).items() if names is None or name in names]
    ids = ids_of(rows, length, seed=rows * length)
    given = facts(ids, [row % 3 for row in range(rows)])
    with routed.context.open(given) as records, torch.no_grad():
        torch.manual_seed(3)
        routed.model(ids, use_cache=False)
        statistics = [term.loss.statistics(records, given) for term in terms]
    with routed.context.open(given) as records:
        torch.manual_seed(3)
        loss = routed.model(ids, use_cache=False).logits.square().mean()
        for term, counted in zip(terms, statistics, strict=True):
            loss = loss + 100 * term.loss(records, given, counted)  # large enough to matter in every router's gradient
        loss.backward()
        weights = {site: routing.weights_NE.detach().clone() for site, routing in records.items()}
    assert set(weights) == set(routed.recorded)
    gradients = {n: p.grad for members in routed.groups.values() for n, p in members.items() if p.requires_grad}
    for parameter in routed.model.parameters():
        parameter.grad = None
    return Passed(loss.detach(), gradients, weights)


def check_reached(passed: Passed) -> None:
    """Every gradient is there, and those of every site's group are not all zero (rank-0 experts have nothing)."""
    assert passed.gradients and all(gradient is not None for gradient in passed.gradients.values())
    for name, gradient in passed.gradients.items():
        assert not gradient.numel() or gradient.abs().sum() > 0, name
