"""Every shipped recipe on tiny models, stage by stage: what one training pass gives, to compare two ways to run it.

Recipes are found by globbing, so one that is added later is in every test that goes over `CASES`. What a recipe needs
(adapters to start from, fewer groups of layers) is told from its composed config.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from loramoe_train.build import RoutedModel, build_aux
from loramoe_train.errors import ConfigError
from loramoe_train.experts.layouts import group_code
from loramoe_train.experts.peft_folder import LoraAdapter, read_peft_folder
from loramoe_train.schema.run import RunConfig
from loramoe_train.settle import settle
from loramoe_train.training.stages import plan_stages
from loramoe_train.validation import domains_of
from tests.composing import RECIPE_NAMES, composed, recipe_file, stages_of
from tests.conftest import make_llama
from tests.test_routed_model import facts, ids_of, make_mamba, make_peft, route, stir

# "recipe, stage" -> (recipe, stage)
CASES = {f"{recipe}, {stage}": (recipe, stage) for recipe in RECIPE_NAMES for stage in stages_of(recipe)}


def unlike_cases() -> list[str]:
    """The first of all cases whose layers run the same code, as far as the recipes' files tell: the same bank, router
    and kind of routing, and experts that are all of one rank or not."""
    first: dict[str, str] = {}
    for case, (recipe, stage) in CASES.items():
        values, stages = recipe_file(recipe), stages_of(recipe)
        groups = [
            entry for entry in values.get("defaults", []) if {"override /router", "override /experts"} & set(entry)
        ]
        routing, fresh = stages[stage].get("routing", "learned"), "experts" in str(stages) or "train" in stages
        router = [groups, values.get("router", {}).get("make")] if routing == "learned" else routing
        first.setdefault(str((router, values.get("experts", {}).get("make"), fresh)), case)
    return list(first.values())


def make_qwen3(**changes: Any) -> Any:
    """Like `make_llama`, with norms of their own on queries and keys, and heads wider than the model is divided."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    shape = dict(vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    shape |= dict(num_key_value_heads=2, head_dim=12, max_position_embeddings=256)
    torch.manual_seed(0)
    return Qwen3ForCausalLM(Qwen3Config(**(shape | changes))).eval()


@dataclass(frozen=True)
class Kind:
    """A tiny model and the model group that describes it."""

    make: Any
    group: str
    adapted: tuple[str, ...]  # linears that downloaded adapters are for


KINDS = {
    "llama": Kind(lambda **changes: make_llama(**{"vocab_size": 50, **changes}), "tiny", ("q_proj", "v_proj")),
    "qwen3": Kind(make_qwen3, "qwen3_0_6b", ("q_proj", "v_proj")),
    "falcon_mamba": Kind(make_mamba, "falcon_mamba_7b", ("in_proj", "x_proj")),
}


def needs_adapters(config: RunConfig) -> bool:
    """Whether a recipe trains routers over experts that the user brings: a run without them is refused."""
    try:
        settle(config, check_files=False, trains=False)  # tiny models are float32
    except ConfigError as error:
        if "experts.adapters" not in str(error):
            raise
        return True
    return False


def skip_unless_it_has_sites(config: RunConfig) -> None:
    """Skip the test where a method is made for linears that this kind of model has not."""
    wanted = [config.experts.sites] if isinstance(config.experts.sites, str) else config.experts.sites
    if not any(config.model.sites.get(kind, [kind]) for kind in wanted):
        pytest.skip(f"{config.model.name} has none of {', '.join(wanted)}")


def fitted(layout: int | str | list[int], layers: int) -> int | str | list[int]:
    """A layout for quarters of a model on one of fewer layers: its first groups and its last."""
    code = None if isinstance(layout, list) else group_code(layout)
    return layout if code is None or len(code) <= layers else [*code[: layers - 1], code[-1]]


def write_adapters(model: Any, folder: Path, ends: Sequence[str], number: int) -> list[Path]:
    """PEFT folders for a model: of several ranks, the odd ones without the last of the projections."""
    folders = []
    for index in range(number):
        targets = list(ends if index % 2 == 0 else ends[:-1])
        folders.append(make_peft(model, folder / str(index), index + 1, r=4 - 2 * (index % 2), target_modules=targets))
    return folders


@dataclass(frozen=True)
class Made:
    """A tiny model with a recipe's experts beside its linears."""

    routed: RoutedModel
    config: RunConfig
    adapters: tuple[LoraAdapter, ...]


def make(recipe: str, kind: str, folder: Path, *overrides: str, **model_changes: Any) -> Made:
    """The recipe on a tiny model as training would start, with small sizes. `folder` is for adapters."""
    model, group = KINDS[kind].make(**model_changes), f"model={KINDS[kind].group}"
    sizes = ["experts.rank=2", "experts.alpha=4"]
    if "plain" in recipe_file(recipe).get("experts", {}):
        sizes += ["experts.plain.rank=2", "experts.plain.alpha=4"]
    config = composed(f"+recipe={recipe}", group, *sizes, *overrides)
    skip_unless_it_has_sites(config)
    changes: dict[str, Any] = {"layout": fitted(config.experts.layout, model.config.num_hidden_layers)}
    if needs_adapters(config):
        changes["adapters"] = write_adapters(model, folder, KINDS[kind].adapted, len(domains_of(config)))
    config = config.model_copy(update={"experts": config.experts.model_copy(update=changes)})
    adapters = tuple(read_peft_folder(Path(path)) for path in config.experts.adapters)
    return Made(route(model, config, adapters, domains=domains_of(config)), config, adapters)


def make_routed(
    recipe: str, kind: str, folder: Path, *overrides: str, **model_changes: Any
) -> tuple[RoutedModel, RunConfig]:
    """The same with stirred experts and routers, and dropout."""
    made = make(recipe, kind, folder, "experts.dropout=0.2", *overrides, **model_changes)
    stir(made.routed)
    return made.routed, made.config


@dataclass(frozen=True)
class Passed:
    """What a pass left behind, detached."""

    loss: Tensor
    gradients: dict[str, Tensor]  # of everything that the stage trains
    records: dict[str, Tensor]  # weights by site


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
    """Forward and backward with the stage's auxiliary losses, their statistics from a pass without gradient before, on
    the model's device."""
    plans = plan_stages(config.trainer, dict.fromkeys(config.trainer.stages, 1000), aux_losses=config.aux_loss)
    (names,) = (plan.aux_losses for plan in plans if plan.name == stage)
    terms = [term for name, term in build_aux(config, routed.plan).items() if name in names]
    ids, device = ids_of(rows, length, seed=rows * length), next(routed.model.parameters()).device
    given, ids = facts(ids, [row % 3 for row in range(rows)]).to(device), ids.to(device)
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
