"""A routed layer in each of its forms against the loop over tokens and experts, in values and all gradients."""

import copy

import pytest
import torch
from torch import nn

from loramoe_train.experts.bank import ExpertBank
from loramoe_train.experts.grouped import grouped_mm_serves, lay_out
from loramoe_train.experts.linear import ExpertLinear
from loramoe_train.routing.context import RoutingContext
from loramoe_train.routing.types import Chosen, Routing, Tokens
from tests.reference import mixture

FORMS = ("concatenated", "grouped")


class Given(nn.Module):
    """A router that says what it was told."""

    linear_score = None

    def __init__(self, weights_NE, most=None):
        super().__init__()
        self.weights_NE, self.most = weights_NE, most

    def forward(self, x_ND, context):
        if self.most is None:
            return Routing(self.weights_NE)
        experts_NK = self.weights_NE.topk(self.most, dim=1).indices
        return Routing(self.weights_NE, chosen=Chosen(experts_NK, self.weights_NE.gather(1, experts_NK)))


def make_bank(ranks, d_in=8, d_out=12, seed=0, **kwargs):
    generator = torch.Generator().manual_seed(seed)
    bank = ExpertBank(
        d_in, d_out, ranks=ranks, scales=[0.5 + e for e in range(len(ranks))], generator=generator, **kwargs
    )
    bank.up.data = torch.randn(bank.up.shape, generator=generator)
    return bank


def layer_of(bank, weights_NE=None, most=None, base=None, context=None):
    router = None if weights_NE is None else Given(weights_NE, most)
    base = base or nn.Linear(bank.d_in, bank.d_out).requires_grad_(False)
    return ExpertLinear(base, bank, router, site="s", context=context or RoutingContext())


def facts(n, domains=None):
    domain = torch.zeros(n, dtype=torch.long) if domains is None else torch.tensor(domains)
    return Tokens(domain >= 0, domain, domain, domain >= 0)


def run(layer, x, domains=None):
    with layer.context.open(facts(x.shape[:-1].numel(), domains)):
        return layer(x)


def pairs(bank, down, up):
    return [(down[bank.rows(e)], up[bank.rows(e)].T, bank.scales[e]) for e in range(bank.num_experts)]


def some_weights(tokens, experts, most, dtype=torch.float64, seed=3):
    """At most `most` positive weights per token; some tokens have fewer, the first has none."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.rand(tokens, experts, dtype=dtype, generator=generator)
    kept = torch.zeros_like(w, dtype=torch.bool).scatter_(1, w.topk(most, dim=1).indices, True)
    w = w * kept * (w > 0.3)
    w[:1] = 0.0
    return w


def assert_equals_loop(
    form,
    ranks,
    tokens,
    most,
    dtype,
    tolerance=None,
    skewed=False,
    bounded=True,
    device="cpu",
    widths=(8, 12),
    experts=None,
    relative=None,
):
    """Elementwise within `tolerance`, or each tensor as a whole within `relative` in the Frobenius norm. `experts`: the
    dtype of bank and weights, else that of the base."""
    experts = experts or dtype
    bank = make_bank(ranks, *widths, form=form).to(device, experts)
    base = nn.Linear(*widths).to(device, dtype).requires_grad_(False)
    x = torch.randn(tokens, widths[0], dtype=dtype, device=device, requires_grad=True)
    w = some_weights(tokens, len(ranks), most, experts)
    if skewed:  # nearly everybody goes to the first experts
        w = torch.where(torch.arange(tokens)[:, None] % 7 == 3, w, w.sort(dim=1, descending=True).values)
    w = w.to(device).requires_grad_()
    layer = layer_of(bank, w, most if bounded else None, base)
    expected = form if bounded and len(set(ranks)) == 1 and most < len(ranks) else "concatenated"
    assert bank.form_for(most if bounded else None, tokens) == expected
    fast = run(layer, x)
    assert fast.device.type == device and fast.dtype == dtype
    probe = torch.randn_like(fast)
    inputs = [x, w, bank.down, bank.up]
    fast_grads = torch.autograd.grad((fast * probe).sum(), inputs)
    if tokens == 0:
        assert all(torch.isfinite(g).all() for g in fast_grads)
        return
    exact = [t.detach().cpu().double().requires_grad_() for t in inputs]
    weight, bias = base.weight.cpu().double(), base.bias.cpu().double()
    slow = mixture(exact[0], weight, bias, pairs(bank, exact[2], exact[3]), exact[1])
    slow_grads = torch.autograd.grad((slow * probe.cpu().double()).sum(), exact)
    used = (w != 0).cpu()  # nobody reads the gradient of a weight that selection set to zero
    for name, ours, twin in zip("yxwdu", (fast, *fast_grads), (slow, *slow_grads), strict=True):
        ours, twin = ours.detach().cpu().double(), twin.detach()
        if name == "w":
            ours, twin = ours * used, twin * used
        if relative is None:
            torch.testing.assert_close(ours, twin, **(tolerance or {}))
        else:
            assert (ours - twin).norm() <= relative * twin.norm(), (name, float((ours - twin).norm() / twin.norm()))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("ranks", [(2,), (2, 2, 2), (1, 4, 0, 3), (4,) * 6])
@pytest.mark.parametrize("tokens", [0, 1, 6])
def test_equals_the_loop_in_values_and_gradients(form, ranks, tokens):
    assert_equals_loop(form, ranks, tokens, min(2, len(ranks)), torch.float64)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rank", [4, 3])  # 3: not aligned, so the grouped form pads
def test_equals_the_loop_in_float32(form, rank):
    assert_equals_loop(form, (rank,) * 6, 20, 2, torch.float32, tolerance={"rtol": 1e-5, "atol": 1e-5})


def test_equals_the_loop_where_the_number_of_experts_has_no_bound():
    assert_equals_loop("concatenated", (2, 2, 2), 6, 2, torch.float64, bounded=False)
    assert_equals_loop("concatenated", (1, 4, 0, 3), 6, 2, torch.float64, bounded=False)


@pytest.mark.parametrize(
    ("dtype", "rank", "width", "served"),
    [
        (torch.bfloat16, 8, 64, True),
        (torch.bfloat16, 4, 64, False),  # rows of the intermediate are 8 bytes apart
        (torch.float32, 4, 64, True),
        (torch.float32, 1, 64, False),
        (torch.float32, 4, 30, False),  # and here those of the factors 120
        (torch.float64, 8, 64, False),
    ],
)
def test_torch_is_asked_for_grouped_products_that_it_takes(dtype, rank, width, served):
    """It wants multiples of 16 bytes between rows, of what lies on a GPU."""
    factors = [torch.empty(6, rank, size, dtype=dtype, device="meta") for size in (width, 48)]
    assert grouped_mm_serves(*factors, columns=rank) == served
    assert not grouped_mm_serves(*(torch.empty(6, rank, 48, dtype=dtype) for _ in factors), columns=rank)


@pytest.mark.parametrize(("experts", "most"), [(4, 1), (6, 2), (16, 3)])
def test_equals_the_loop_when_most_tokens_go_to_few_experts(experts, most):
    """Then an expert has several blocks in the grouped form, and others have none of their tokens in theirs."""
    assert_equals_loop("grouped", (4,) * experts, 60, most, torch.float64, skewed=True)


@pytest.mark.parametrize("experts", [1, 3, 8])
@pytest.mark.parametrize("pairs", [0, 1, 40])
@pytest.mark.parametrize("skewed", [True, False])
def test_every_pair_has_one_place(experts, pairs, skewed):
    generator = torch.Generator().manual_seed(0)
    experts_NK = torch.randint(0, experts, (pairs, 1), generator=generator)
    experts_NK = experts_NK.clamp(max=0) if skewed else experts_NK
    for blocks in (True, False):
        layout = lay_out(experts_NK, experts, blocks=blocks)
        filled = layout.pair_S[layout.pair_S < pairs]
        assert sorted(filled.tolist()) == list(range(pairs))
        if blocks:
            owners = layout.expert_B.repeat_interleave(layout.size)
            assert len(owners) <= 3 * pairs + 2 * experts
        else:
            counts = torch.tensor([0, *layout.ends_E.tolist()]).diff()
            owners = torch.arange(experts).repeat_interleave(counts)
        assert torch.equal(owners[layout.pair_S < pairs], experts_NK.flatten()[filled])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("most", [2, None])
def test_a_bfloat16_base_with_float32_adapters(form, most):
    """Within bfloat16's rounding of the exact result; gradients of the adapters are float32."""
    bank = make_bank((8,) * 4, d_in=32, d_out=24, form=form)
    base = nn.Linear(32, 24).bfloat16().requires_grad_(False)
    x = torch.randn(2, 10, 32).bfloat16().requires_grad_()
    w = some_weights(20, 4, 2, torch.float32).requires_grad_()
    fast = run(layer_of(bank, w, most, base), x)
    probe = torch.randn_like(fast)
    inputs = [x, w, bank.down, bank.up]
    grads = torch.autograd.grad((fast * probe).sum(), inputs)
    assert fast.dtype == torch.bfloat16 and [g.dtype for g in grads] == [t.dtype for t in inputs]
    exact = [t.detach().double().requires_grad_() for t in inputs]
    slow = mixture(
        exact[0].view(20, 32), base.weight.double(), base.bias.double(), pairs(bank, exact[2], exact[3]), exact[1]
    )
    twins = torch.autograd.grad((slow * probe.double().view(20, 24)).sum(), exact)
    for ours, twin in zip((fast.view(20, 24), *grads), (slow, *twins), strict=True):
        ours, twin = (ours * (w != 0), twin * (w != 0)) if ours.shape == w.shape else (ours, twin)
        error = (ours.double() - twin).norm() / twin.norm()
        assert error < 1e-2, error


def test_both_forms_agree_under_dropout():
    """The same generator state gives both the same mask."""
    outcomes = []
    for form in FORMS:
        bank = make_bank((4,) * 6, form=form, dropout=0.5).double().train()
        w = some_weights(16, 6, 2)
        x = torch.arange(128, dtype=torch.float64).view(16, 8).div(50).requires_grad_()
        layer = layer_of(bank, w, 2, nn.Linear(8, 12).double().requires_grad_(False))
        nn.init.ones_(layer.base.weight), nn.init.zeros_(layer.base.bias)
        torch.manual_seed(5)
        y = run(layer, x)
        outcomes.append((y, *torch.autograd.grad(y.square().sum(), [x, bank.down, bank.up])))
    for one, other in zip(*outcomes, strict=True):
        torch.testing.assert_close(one, other)


def test_dropout_keeps_the_mean_and_drops_whole_inputs():
    bank = make_bank((4,), d_in=8, d_out=12, dropout=0.5).train()
    bank.scale_E.fill_(1.0)
    layer = layer_of(bank)
    nn.init.zeros_(layer.base.weight), nn.init.zeros_(layer.base.bias)
    x = torch.ones(4000, 8)
    torch.manual_seed(0)
    y = run(layer, x)
    expected = x @ (bank.up.T @ bank.down).T
    torch.testing.assert_close(y.mean(0), expected.mean(0), rtol=0.2, atol=0.2)
    assert not torch.equal(y[0], y[1])


def test_a_fresh_bank_adds_exactly_nothing():
    bank = ExpertBank(4, 3, ranks=(2, 2), scales=(1.0, 1.0))
    layer = layer_of(bank, torch.rand(5, 2))
    x = torch.randn(5, 4)
    assert torch.equal(run(layer, x), layer.base(x))


def test_no_router_means_every_expert_counts_once():
    bank, x, base = make_bank((2, 3)), torch.randn(4, 8), nn.Linear(8, 12)
    torch.testing.assert_close(run(layer_of(bank, base=base), x), run(layer_of(bank, torch.ones(4, 2), base=base), x))


def test_delta_is_the_merged_weight():
    bank = make_bank((2, 3))
    x, w = torch.randn(4, 8), torch.zeros(4, 2)
    w[:, 1] = 1.0
    layer = layer_of(bank, w)
    torch.testing.assert_close(run(layer, x), layer.base(x) + x @ bank.delta(1).T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_idle_expert_gets_a_zero_gradient_not_none(form):
    bank = make_bank((4, 4, 4), form=form)
    run(layer_of(bank, torch.tensor([[1.0, 0.0, 0.0]] * 4), 1), torch.randn(4, 8)).sum().backward()
    assert torch.equal(bank.down.grad[bank.rows(1)], torch.zeros(4, 8))
    assert bank.down.grad[bank.rows(0)].abs().sum() > 0


def test_dropout_is_off_for_frozen_experts():
    bank = make_bank((2, 3), dropout=0.5).train()
    x, layer = torch.randn(4, 8), layer_of(bank, torch.rand(4, 2))
    assert not torch.equal(run(layer, x), run(layer, x))
    bank.requires_grad_(False)
    assert torch.equal(run(layer, x), run(layer, x))


def test_initialisation_depends_on_the_generator_alone():
    torch.manual_seed(1)
    one = make_bank((2, 2)).down
    torch.manual_seed(2)
    assert torch.equal(one, make_bank((2, 2)).down)


def test_bad_ranks():
    with pytest.raises(ValueError, match="one non-negative rank"):
        ExpertBank(4, 4, ranks=(2, -1), scales=(1.0, 1.0))


def test_training_outside_the_context_is_refused_and_evaluation_is_not():
    layer = layer_of(make_bank((2,)))
    with pytest.raises(RuntimeError, match="outside"):
        layer(torch.randn(1, 3, 8))
    assert layer.eval()(torch.randn(1, 3, 8)).shape == (1, 3, 12)
    assert layer.context.records == {}


def test_off_is_the_base_bit_for_bit():
    layer = layer_of(make_bank((2, 2)))
    x = torch.randn(2, 3, 8)
    with layer.context.override("off"):
        assert torch.equal(layer(x), layer.base(x))
    assert not torch.equal(layer.eval()(x), layer.base(x))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("num_domains", [1, 2, 3, 5])
def test_hard_routing_gives_each_domain_its_own_expert(num_domains, form):
    """Values and gradients equal single experts that saw only their domain's tokens."""
    context = RoutingContext(num_domains)
    base, bank = nn.Linear(8, 12).double(), make_bank((4,) * num_domains, form=form).double()
    layer = layer_of(bank, base=base, context=context)
    domains = [d % num_domains for d in range(8)] + [-1]
    x = torch.randn(9, 8, dtype=torch.float64)
    with context.override("by_domain"):
        y = run(layer, x.view(3, 3, 8), domains).view(9, 12)
    grads = torch.autograd.grad(y.square().sum(), [bank.down, bank.up])
    for d in range(num_domains):
        own = [n for n, domain in enumerate(domains) if domain == d]
        down, up = bank.down[bank.rows(d)], bank.up[bank.rows(d)]
        single = base(x[own]) + bank.scales[d] * x[own] @ down.T @ up
        torch.testing.assert_close(y[own], single)
        alone = torch.autograd.grad(single.square().sum(), [bank.down, bank.up])
        torch.testing.assert_close(grads[0][bank.rows(d)], alone[0][bank.rows(d)])
        torch.testing.assert_close(grads[1][bank.rows(d)], alone[1][bank.rows(d)])
    torch.testing.assert_close(y[8], base(x[8]))


def test_uniform_is_the_average():
    bank = make_bank((2, 3))
    layer = layer_of(bank).eval()
    x = torch.randn(4, 8)
    with layer.context.override("uniform"):
        expected = layer.base(x) + x @ ((bank.delta(0) + bank.delta(1)) / 2).T
        torch.testing.assert_close(layer(x), expected)


def test_the_base_output_is_added_to_in_place():
    """No second tensor of the base's output is made, with or without bias; the base's gradient is unchanged."""
    for bias in (True, False):
        bank = make_bank((2, 2))
        layer = layer_of(bank, torch.rand(6, 2), base=nn.Linear(8, 12, bias=bias).requires_grad_(False))
        made = []
        layer.base.register_forward_hook(lambda _, __, y, into=made: into.append(y.data_ptr()))
        y = run(layer, torch.randn(2, 3, 8, requires_grad=True))
        assert y.data_ptr() == made[0] and type(y.grad_fn).__name__ == "_ExpandBackward"  # not by way of CopySlices


def test_a_copy_works_for_itself():
    layer = layer_of(make_bank((2, 2)), torch.rand(4, 2)).eval()
    twin = copy.deepcopy(layer)
    x = torch.randn(4, 8)
    assert torch.equal(layer(x), twin(x)) and twin.shared.members[0] is twin
