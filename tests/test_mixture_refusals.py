"""Mixtures that cannot be: one line that says why and what would be right, before a weight is read."""

import pytest
import torch

from loramoe_train import run
from loramoe_train.errors import ConfigError
from loramoe_train.settle import settle
from loramoe_train.validation import domains_of
from tests.composing import composed

CASES = {
    "top-k above a layer's experts": (
        ["+recipe=mola", "router.top_k=3"],
        ["router.top_k=3", "layer 0, which has 2 experts", "at most 2"],
    ),
    "top-k above another layer's": (
        ["+recipe=mola", "experts.layout=[4,4,1,4]", "router.top_k=[4,4,2,4]"],
        ["router.top_k=2", "layer 2, which has 1 expert;"],
    ),
    "one pool for layers of different counts": (
        ["+recipe=mola", "aux_loss.load_balance.make.pool=model"],
        ["aux_loss.load_balance", "pool=model", "with 2 experts together", "pool=layer"],
    ),
    "whole blocks with weights that do not sum to one": (
        ["+recipe=mixlora", "router.make.train.weight=probability"],
        ["experts.mixing=output", "sum to one"],
    ),
    "whole outputs with weights that do not sum to one": (
        ["+recipe=mixlora_dora", "experts.mixing=delta", "router.make.train.weight=probability"],
        ["sum to one"],
    ),
    "a route by task and an example of no task": (
        ["+recipe=moelora_task", "data.tasks=[tiny_math,tiny_code]", "eval.tasks=[tiny_facts]"],
        ["tiny_facts: routing depends on the task", "eval.serve_as.tiny_facts=TASK"],
    ),
    "magnitudes beside a packed base": (
        ["+recipe=dora", "model.quantization=nf4"],
        ["model.quantization=nf4", "packed", "experts=default"],
    ),
    "a mixture of magnitudes beside a packed base": (
        ["+recipe=mixlora_dora", "model.quantization=int8"],
        ["model.quantization=int8", "packed"],
    ),
    "a packed base that trains": (
        ["+recipe=full_finetune", "model.quantization=nf4"],
        ["model.quantization=nf4", "packed weights cannot train"],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_it_is_refused_before_weights_are_read(case, monkeypatch):
    overrides, words = CASES[case]
    monkeypatch.setattr(run, "load_model", lambda *args, **options: pytest.fail("weights were read"))
    with pytest.raises(ConfigError) as told:
        config = composed(*overrides)
        settle(config)
        run.build_routed(config, domains_of(config), device=torch.device("cpu"))
    line = str(told.value)
    assert "\n" not in line and all(word in line for word in words), line
