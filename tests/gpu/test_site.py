"""One routed layer on a GPU in each form against the loop over tokens and experts, in float64 on the CPU: values and
all gradients."""

import pytest
import torch
from torch import nn

from loramoe_train.experts import grouped
from tests.experts.test_bank import assert_equals_loop, facts, layer_of, make_bank, some_weights

pytestmark = pytest.mark.gpu

WIDTHS = (32, 48)
# bfloat16 has 8 bits, and the narrow intermediate is rounded to it, too
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 2e-2}


def assert_equals_loop_on_gpu(form, ranks, tokens, dtype, *, skewed=False):
    """Experts are float32 beside a base of any dtype, as in a run, or float64 with it."""
    experts = torch.float64 if dtype == torch.float64 else torch.float32
    how = {"device": "cuda", "widths": WIDTHS, "experts": experts, "relative": TOLERANCE[dtype]}
    assert_equals_loop(form, ranks, tokens, 2, dtype, skewed=skewed, **how)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("skewed", [False, True])
@pytest.mark.parametrize(
    ("form", "ranks"),
    [
        ("concatenated", (8,) * 6),
        ("concatenated", (1, 4, 0, 3)),
        ("grouped", (8,) * 6),
        ("grouped", (3,) * 6),  # no multiple of 16 bytes: torch's grouped product would refuse it
        ("grouped", (16,) * 64),
    ],
)
def test_equals_the_loop_in_values_and_gradients(form, ranks, skewed, dtype):
    torch.manual_seed(0)
    assert_equals_loop_on_gpu(form, ranks, 150, dtype, skewed=skewed)


@pytest.mark.parametrize("form", ["concatenated", "grouped"])
@pytest.mark.parametrize("tokens", [0, 2, 3])
def test_few_tokens(form, tokens):
    """None at all, and fewer than experts: most groups are empty. The first token has weights of zero."""
    assert_equals_loop_on_gpu(form, (8,) * 6, tokens, torch.float32)


@pytest.mark.parametrize(("rank", "by_torch"), [(8, True), (3, False)])
def test_which_product_serves(rank, by_torch, monkeypatch):
    calls, own = [], torch.nn.functional.grouped_mm
    monkeypatch.setattr(
        grouped.functional, "grouped_mm", lambda *args, **more: (calls.append(1), own(*args, **more))[1]
    )
    assert_equals_loop_on_gpu("grouped", (rank,) * 6, 150, torch.bfloat16)
    assert bool(calls) == by_torch


@pytest.mark.parametrize("form", ["concatenated", "grouped"])
def test_nothing_waits_for_the_device(form):
    """A read of a device's value stalls the processor that fills its queue. In bfloat16: torch's own grouped product
    reads the groups' sizes for every other dtype."""
    bank = make_bank((8,) * 6, *WIDTHS, form=form).cuda()
    base = nn.Linear(*WIDTHS).to("cuda", torch.bfloat16).requires_grad_(False)
    layer = layer_of(bank, some_weights(150, 6, 2, torch.float32).cuda(), 2, base)
    x = torch.randn(150, WIDTHS[0], device="cuda", dtype=torch.bfloat16, requires_grad=True)
    tokens = facts(150).to(torch.device("cuda"))
    for watched in (False, True):  # the first call makes handles and compiles
        torch.cuda.set_sync_debug_mode("error" if watched else "default")
        try:
            with layer.context.open(tokens):
                out = layer(x)
            out.backward(torch.ones_like(out))
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert bank.up.grad.any()
