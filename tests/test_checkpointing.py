"""Gradient checkpointing with every recipe: the same losses, gradients and records, bit for bit."""

import pytest
import torch

from loramoe_train.experts.mixed_block import MixedBlock
from loramoe_train.experts.probed import ProbedBlock
from loramoe_train.models.loading import checkpoint_activations
from tests.recipe_passes import CASES, check_reached, enter_stage, make_routed, one_pass


def calls_its_sites_otherwise(routed) -> bool:
    """Blocks that run their sites several times, or read them without a call; and models without experts."""
    return not routed.plan or any(type(block) in (MixedBlock, ProbedBlock) for block in routed.blocks.values())


@pytest.mark.parametrize("kind", ["llama", "falcon_mamba"])
@pytest.mark.parametrize("case", CASES)
def test_checkpointing_changes_nothing(case, kind, tmp_path):
    """The same operations run again on the same numbers, with the same dropout masks: equal in every bit."""
    recipe, stage = CASES[case]
    found = []
    for on in (False, True):
        folder = tmp_path / str(on)
        folder.mkdir()
        routed, config = make_routed(recipe, kind, folder)
        if on:
            checkpoint_activations(routed.model)
        enter_stage(routed, config, stage)
        calls = []
        for layer in routed.layers.values():
            layer.register_forward_pre_hook(
                lambda layer, args, calls=calls: calls.append(layer.site) if layer.context.mode != "off" else None
            )
        found.append(one_pass(routed, config, stage))
        passes = 3 if on else 2  # statistics, forward, and once more in backward
        sites = len(routed.plan)
        if not calls_its_sites_otherwise(routed):
            # the recomputation of a layer ends with the last tensor that backward needs
            assert sites * (passes - 1) < len(calls) <= sites * passes
    off, on = found
    check_reached(on)
    assert torch.equal(off.loss, on.loss)
    assert off.gradients.keys() == on.gradients.keys()
    for name, gradient in off.gradients.items():
        assert torch.equal(gradient, on.gradients[name]), name
    for site, weights in off.records.items():
        assert torch.equal(weights, on.records[site]), site
