"""One routed layer on a GPU in each form against the loop over tokens and experts, in float64 on the CPU: values and
all gradients."""

import pytest
import torch
from torch import nn

from loramoe_train.experts import grouped
from tests.experts.test_bank import facts, layer_of, make_bank, pairs, run, some_weights
from tests.reference import mixture

pytestmark = pytest.mark.gpu

WIDTHS = {"d_in": 32, "d_out": 48}
# relative errors in the Frobenius norm. bfloat16 has 8 bits, and the narrow intermediate is rounded to it, too
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 2e-2}


def compare(form, ranks, tokens, dtype, *, most=2, skewed=False):
    bank = make_bank(ranks, form=form, **WIDTHS).cuda()
    if dtype == torch.float64:
        bank.double()  # else the experts are float32 beside a base of any dtype, as in a run
    base = nn.Linear(*WIDTHS.values()).to("cuda", dtype).requires_grad_(False)
    x = torch.randn(tokens, WIDTHS["d_in"], device="cuda", dtype=dtype, requires_grad=True)
    w = some_weights(tokens, len(ranks), most, torch.float64 if dtype == torch.float64 else torch.float32)
    if skewed:  # everybody goes to the first experts, and most have nobody
        w = w.sort(dim=1, descending=True).values
    w = w.cuda().requires_grad_()
    fast = run(layer_of(bank, w, most, base), x)
    assert fast.is_cuda and fast.dtype == dtype
    probe = torch.randn(tokens, WIDTHS["d_out"], dtype=torch.float64)
    inputs = [x, w, bank.down, bank.up]
    ours = (fast, *torch.autograd.grad(fast, inputs, probe.to(fast)))
    exact = [t.detach().cpu().double().requires_grad_() for t in inputs]
    weight, bias = base.weight.cpu().double(), base.bias.cpu().double()
    slow = mixture(exact[0], weight, bias, pairs(bank, exact[2], exact[3]), exact[1])
    twin = (slow, *torch.autograd.grad(slow, exact, probe.to(dtype).double()))
    used = (w != 0).cpu()  # nobody reads the gradient of a weight that selection set to zero
    for name, one, other in zip(("y", "x", "w", "down", "up"), ours, twin, strict=True):
        one, other = one.detach().cpu().double(), other.detach()
        if name == "w":
            one, other = one * used, other * used
        error = float((one - other).norm() / other.norm())
        assert error < TOLERANCE[dtype], (name, error)


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
    compare(form, ranks, 150, dtype, skewed=skewed)


@pytest.mark.parametrize("form", ["concatenated", "grouped"])
@pytest.mark.parametrize("tokens", [0, 1, 2])
def test_few_tokens(form, tokens):
    """None at all, and fewer than experts: most groups are empty."""
    if tokens:
        return compare(form, (8,) * 6, tokens + 1, torch.float32)  # the first has weights of zero
    bank = make_bank((8,) * 6, form=form, **WIDTHS).cuda()
    x = torch.randn(0, WIDTHS["d_in"], device="cuda", requires_grad=True)
    out = run(layer_of(bank, some_weights(0, 6, 2, torch.float32).cuda(), 2, nn.Linear(*WIDTHS.values()).cuda()), x)
    out.sum().backward()
    assert out.shape == (0, WIDTHS["d_out"])
    assert not bank.down.grad.any() and not bank.up.grad.any()


@pytest.mark.parametrize(("rank", "by_torch"), [(8, True), (3, False)])
def test_which_product_serves(rank, by_torch, monkeypatch):
    calls, own = [], torch.nn.functional.grouped_mm
    monkeypatch.setattr(
        grouped.functional, "grouped_mm", lambda *args, **more: (calls.append(1), own(*args, **more))[1]
    )
    compare("grouped", (rank,) * 6, 150, torch.bfloat16)
    assert bool(calls) == by_torch


@pytest.mark.parametrize("form", ["concatenated", "grouped"])
def test_nothing_waits_for_the_device(form):
    """A read of a device's value stalls the processor that fills its queue. In bfloat16: torch's own grouped product
    reads the groups' sizes for every other dtype."""
    bank = make_bank((8,) * 6, form=form, **WIDTHS).cuda()
    base = nn.Linear(*WIDTHS.values()).to("cuda", torch.bfloat16).requires_grad_(False)
    layer = layer_of(bank, some_weights(150, 6, 2, torch.float32).cuda(), 2, base)
    x = torch.randn(150, WIDTHS["d_in"], device="cuda", dtype=torch.bfloat16, requires_grad=True)
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
