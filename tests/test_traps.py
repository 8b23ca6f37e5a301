"""Mistakes of the published code of these methods, tried on every shipped recipe, found by globbing.

`docs/traps.md` lists them all, with the test that each of them would fail.
"""

import pytest
import torch
from torch import Tensor

from loramoe_train.build import RoutedModel, build_aux
from loramoe_train.schema.run import RunConfig
from loramoe_train.training.stages import plan_stages
from tests.composing import RECIPE_NAMES, composed
from tests.recipe_passes import CASES, enter_stage, make_routed
from tests.test_routed_model import facts, ids_of

every_recipe = pytest.mark.parametrize("recipe", RECIPE_NAMES)
every_stage = pytest.mark.parametrize("case", CASES)
on_both = pytest.mark.parametrize("kind", ["llama", "falcon_mamba"])


def trained_parameters(routed: RoutedModel) -> dict[str, torch.nn.Parameter]:
    return {name: parameter for members in routed.groups.values() for name, parameter in members.items()}


@torch.no_grad()
def answers(routed: RoutedModel, ids: Tensor) -> Tensor:
    """Logits in evaluation, as of the second task."""
    with routed.context.serving(task=1, domain=1):
        return routed.model.eval()(ids, use_cache=False).logits


# -- evaluation --------------------------------------------------------------------------------------------------------


@every_recipe
def test_nothing_is_left_to_chance_in_evaluation(recipe, tmp_path):
    """Dropout and jitter are off although training had them on: modules that `eval()` cannot reach would keep them."""
    jitter = ["router.make.jitter=0.5"] if _has_jitter(recipe) else []
    routed, config = make_routed(recipe, "llama", tmp_path, *jitter)
    ids, last = ids_of(), list(config.trainer.stages)[-1]
    first = answers(routed, ids)
    enter_stage(routed, config, last)
    chances = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        with routed.context.open(facts(ids, [0, 1, 2])), torch.no_grad():
            chances.append(routed.model(ids, use_cache=False).logits)
    if routed.plan:  # the base of full fine-tuning has no dropout
        assert not torch.equal(*chances)
    for seed in (2, 3):
        torch.manual_seed(seed)
        assert torch.equal(answers(routed, ids), first)


def _has_jitter(recipe: str) -> bool:
    make = composed(f"+recipe={recipe}").router.make
    return make is not None and str(make["_target_"]).endswith("router.Router")


@on_both
@every_recipe
def test_train_evaluate_generate_train_leaves_everything_as_it_was(recipe, kind, tmp_path):
    """No forward un-freezes an expert, no `generate` leaves a mode behind, and without experts it is the base."""
    routed, config = make_routed(recipe, kind, tmp_path)
    ids, (stage, *_) = ids_of(), config.trainer.stages
    enter_stage(routed, config, stage)
    model, trains = routed.model, {name: p.requires_grad for name, p in routed.model.named_parameters()}
    with routed.context.override("off"):
        off = answers(routed, ids)
    tuned = answers(routed, ids)
    for _ in range(2):
        model.train()
        with routed.context.open(facts(ids, [0, 1, 2])):
            model(ids, use_cache=False).logits.mean().backward()
        model.eval()
        with torch.no_grad(), routed.context.serving(task=1, domain=1):
            model.generate(ids, max_new_tokens=2, do_sample=False)
        assert not any(module.training for module in model.modules())
        assert torch.equal(answers(routed, ids), tuned)
        with routed.context.override("off"):
            assert torch.equal(answers(routed, ids), off)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == trains
    assert not routed.context.is_open and routed.context.mode == config.trainer.stages[stage].routing


@every_recipe
def test_frozen_parts_count_as_trained_ones_do(recipe, tmp_path):
    """A fast path that asks what needs a gradient must not leave out what needs none."""
    routed, config = make_routed(recipe, "llama", tmp_path)
    routed.context.mode = list(config.trainer.stages.values())[-1].routing
    ids, found = ids_of(), []
    for parameter in routed.model.parameters():
        parameter.requires_grad_(False)
    for trained in (False, True):
        for parameter in trained_parameters(routed).values():
            parameter.requires_grad_(trained)
        with routed.context.serving(task=1, domain=1):
            found.append(routed.model.eval()(ids, use_cache=False).logits.detach())
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)


# -- batches -----------------------------------------------------------------------------------------------------------


def losses_of(config: RunConfig, routed: RoutedModel, stage: str) -> list:
    plans = plan_stages(config.trainer, dict.fromkeys(config.trainer.stages, 1000), aux_losses=config.aux_loss)
    (names,) = (plan.aux_losses for plan in plans if plan.name == stage)
    return [term.loss for name, term in build_aux(config, routed.plan).items() if name in names]


@on_both
@every_stage
def test_a_row_means_the_same_in_every_batch(case, kind, tmp_path):
    """As many rows as positions, each of another task: a softmax over the flattened batch, capacities shared among
    rows or weights laid along the wrong axis would show."""
    recipe, stage = CASES[case]
    routed, config = make_routed(recipe, kind, tmp_path, "experts.dropout=0")
    enter_stage(routed, config, stage)
    ids, tasks = ids_of(rows=4, length=4), [2, 0, 1, 2]

    @torch.no_grad()
    def logits(rows: list[int]) -> Tensor:
        with routed.context.open(facts(ids[rows], [tasks[row] for row in rows])):
            return routed.model(ids[rows], use_cache=False).logits

    together = logits([0, 1, 2, 3])
    for row in range(4):
        torch.testing.assert_close(together[row : row + 1], logits([row]), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logits([3, 1]), together[[3, 1]], rtol=1e-4, atol=1e-5)


@on_both
@every_stage
def test_padding_counts_nowhere(case, kind, tmp_path):
    """Words under the mask instead of padding tokens: neither logits, nor auxiliary losses, nor any gradient change."""
    recipe, stage = CASES[case]
    routed, config = make_routed(recipe, kind, tmp_path, "experts.dropout=0")
    enter_stage(routed, config, stage)
    ids, lengths, tasks = ids_of(rows=3, length=6), torch.tensor([6, 3, 4]), [0, 1, 2]
    padded = torch.cat([ids, ids_of(rows=3, length=5, seed=9)], dim=1)
    losses, found = losses_of(config, routed, stage), []
    for given in (ids, padded):
        valid = torch.arange(given.shape[1]) < lengths[:, None]
        tokens = facts(given, tasks, valid)
        with routed.context.open(tokens) as records:
            logits = routed.model(given, attention_mask=valid.long(), use_cache=False).logits[valid]
            terms = [loss(records, tokens, loss.statistics(records, tokens)) for loss in losses]
            (logits.square().mean() + 100 * sum(terms, torch.zeros(()))).backward()
        gradients = {}
        for name, parameter in trained_parameters(routed).items():
            gradients[name], parameter.grad = parameter.grad, None
        found.append((logits.detach(), [term.detach() for term in terms], gradients))
    (logits, terms, gradients), (same_logits, same_terms, same_gradients) = found
    torch.testing.assert_close(same_logits, logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(same_terms, terms, rtol=1e-4, atol=1e-6)
    for name, gradient in gradients.items():
        if gradient is None:
            assert same_gradients[name] is None, name
            continue
        scale = float(gradient.abs().max()) if gradient.numel() else 0.0
        tolerance = {"rtol": 0, "atol": 1e-3 * scale + 1e-6, "msg": lambda m, n=name: f"{n}: {m}"}
        torch.testing.assert_close(same_gradients[name], gradient, **tolerance)


@on_both
@every_recipe
def test_padding_on_the_left_changes_no_answer(recipe, kind, tmp_path):
    """Prompts of unequal length in one batch are continued as each would be alone."""
    routed, _ = make_routed(recipe, kind, tmp_path)
    ids, lengths = ids_of(rows=3, length=6), [6, 3, 4]
    told = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    batch, mask = torch.full((3, 6), 7), torch.zeros(3, 6, dtype=torch.long)  # 7: a word like any other
    for row, length in enumerate(lengths):
        batch[row, 6 - length :], mask[row, 6 - length :] = ids[row, :length], 1
    with torch.no_grad(), routed.context.serving(task=1, domain=1):
        together = routed.model.eval().generate(batch, attention_mask=mask, **told)[:, 6:]
        for row, length in enumerate(lengths):
            own = ids[row : row + 1, :length]
            alone = routed.model.generate(own, attention_mask=torch.ones_like(own), **told)[:, length:]
            assert torch.equal(together[row : row + 1], alone), row


# -- parameters --------------------------------------------------------------------------------------------------------


@every_recipe
def test_everything_that_trains_is_registered(recipe, tmp_path):
    """Parameters in plain dicts are missed by `to`, `eval`, `state_dict` and whoever counts them."""
    routed, _ = make_routed(recipe, "llama", tmp_path)
    known = {id(parameter) for parameter in routed.model.parameters()}
    state = {tensor.data_ptr() for tensor in routed.model.state_dict().values()}
    for name, parameter in trained_parameters(routed).items():
        assert id(parameter) in known and parameter.data_ptr() in state, name
    routed.model.double()
    assert {parameter.dtype for parameter in trained_parameters(routed).values()} == {torch.float64}
    assert answers(routed, ids_of()).dtype == torch.float64
