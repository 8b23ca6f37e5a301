"""Routing above the token: several examples in a row, one a row, or each alone, with more padding, are all the same."""

import pytest
import torch

from loramoe_train.data.collate import collate, collate_packed
from tests.experts.test_probed import build as build_probed
from tests.experts.test_probed import examples, open_pass
from tests.routers.test_origin import build as build_by_task


@pytest.mark.parametrize("recipe", ["moelora_task", "lora_per_task", "mole"])
def test_packing_and_padding_change_nothing(recipe, tmp_path):
    routed, _, _ = build_probed(tmp_path) if recipe == "mole" else build_by_task(recipe)
    routed.model.double().train()
    trained = {n: p for group in routed.groups.values() for n, p in group.items() if p.requires_grad}
    a, b, c = examples()
    ways = {
        "a row each": [collate([a, b, c], pad_id=0)],
        "more padding": [collate([a, b, c], pad_id=0, multiple=16)],
        "packed": [collate_packed([[a, b], [c]], pad_id=0)],
        "alone": [collate([example], pad_id=0) for example in (a, b, c)],
    }
    found = {}
    for way, batches in ways.items():
        logits = []
        for batch in batches:
            logits += open_pass(routed, batch, backward=lambda part: part.square().sum())[0]
        found[way] = logits, {name: p.grad for name, p in trained.items()}
        for parameter in trained.values():
            parameter.grad = None
    logits, gradients = found.pop("a row each")
    assert all(gradient.abs().max() > 0 for gradient in gradients.values())
    for way, (theirs, slopes) in found.items():
        for one, other in zip(logits, theirs, strict=True):
            torch.testing.assert_close(one, other, msg=lambda text, w=way: f"{w}: {text}")
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, slopes[name], msg=lambda text, w=way, n=name: f"{w}, {n}: {text}")
