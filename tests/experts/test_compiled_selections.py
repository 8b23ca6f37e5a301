"""Every selection can be traced: sites that share an input compare their routers inside compiled code."""

import pytest
import torch

from loramoe_train.experts.compiled import compile_layers
from tests.composing import composed
from tests.conftest import make_llama
from tests.test_routed_model import facts, ids_of, route, stir


@pytest.mark.parametrize(
    "router",
    ["topk", "entropy_switch", *(pytest.param(name, marks=pytest.mark.nightly) for name in ("top_p", "threshold"))],
)
def test_compiled_is_uncompiled(router):
    torch._dynamo.reset()
    sizes = ("experts.layout=3", "experts.rank=2", "experts.sites=[attn_in,attn_out]")
    routed = route(make_llama(vocab_size=50), composed(f"router={router}", *sizes))
    stir(routed)
    routed.model.train()
    ids, logits = ids_of(), []
    for compiled in (False, True):
        if compiled:
            compile_layers(routed.model.model.layers, routed.layers.values(), backend="eager")
        with routed.context.open(facts(ids)):
            logits.append(routed.model(ids, use_cache=False).logits.detach())
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-5)
