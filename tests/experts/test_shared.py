"""Layers that read one tensor: together they do what each would do alone, with less work."""

import copy

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from loramoe_train.experts.bank import ExpertBank
from loramoe_train.experts.inject import share_inputs
from loramoe_train.experts.linear import ExpertLinear, share
from loramoe_train.routers.router import Policy, Router
from loramoe_train.routers.scores import LinearScore
from loramoe_train.routers.select import All, TopK
from loramoe_train.routing.context import RoutingContext
from loramoe_train.routing.types import Tokens

D, N = 16, 12


def facts(n=N, domains=None):
    domain = torch.zeros(n, dtype=torch.long) if domains is None else torch.tensor(domains)
    return Tokens(domain >= 0, domain, domain, domain >= 0)


def make_layer(name, context, *, outputs, experts=4, top_k=2, rank=4, form="auto", bias=False, dropout=0.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    bank = ExpertBank(
        D, outputs, ranks=(rank,) * experts, scales=(2.0,) * experts, dropout=dropout, form=form, generator=generator
    )
    nn.init.normal_(bank.up, generator=generator)
    score = LinearScore(D, experts, bias=bias, init="normal", std=1.0, generator=generator)
    if bias:
        nn.init.normal_(score.bias, generator=generator)
    policy = Policy(TopK(top_k, experts), "renormalised")
    base = nn.Linear(D, outputs).requires_grad_(False)
    return ExpertLinear(base, bank, Router(score=score, train=policy, evaluate=policy), site=name, context=context)


def make_layers(dtype=torch.float64, **kwargs):
    torch.manual_seed(0)
    context = RoutingContext(2)
    sizes = {"q": 16, "k": 8, "v": 8}
    made = [make_layer(n, context, outputs=o, seed=i, **kwargs) for i, (n, o) in enumerate(sizes.items())]
    return nn.ModuleList(made).to(dtype)


def outcome(layers, x, mode="learned", order=(0, 1, 2), domains=None):
    """Outputs, the gradient of x, and the gradients of every parameter."""
    context = layers[0].context
    x = x.clone().requires_grad_()
    layers.zero_grad()
    with context.override(mode), context.open(facts(x.shape[0], domains)) as records:
        outputs = {i: layers[i](x) for i in order}
        sum((i + 1) * outputs[i].sin().sum() for i in order).backward()
        weights = {site: routing.weights_NE.detach().clone() for site, routing in records.items()}
    # a member that was not called gets no gradient alone and a zero from its group
    learned = [(name, p) for name, p in layers.named_parameters() if p.requires_grad]
    grads = {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in learned}
    return [outputs[i].detach() for i in sorted(outputs)], x.grad, grads, weights


def assert_equal_outcomes(one, other, **tolerance):
    torch.testing.assert_close(one, other, **tolerance)


CASES = {
    "plain": {},
    "biased routers": {"bias": True},
    "grouped": {"form": "grouped"},
    "one expert": {"experts": 1, "top_k": 1},
}


@pytest.mark.parametrize("mode", ["learned", "by_domain", "uniform"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_together_is_alone(case, mode, dtype):
    layers = make_layers(dtype, **CASES[case])
    alone = copy.deepcopy(layers)
    share(list(layers))
    x = torch.randn(N, D, dtype=dtype)
    domains = [n % 2 for n in range(N)]
    tolerance = {} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-4}
    together = outcome(layers, x, mode, domains=domains)
    assert_equal_outcomes(together, outcome(alone, x, mode, domains=domains), **tolerance)


def test_members_may_differ():
    """Other ranks, another number of experts, another form, another kind of router, no router."""
    context = RoutingContext()
    layers = nn.ModuleList(
        [
            make_layer("q", context, outputs=16, rank=2),
            make_layer("k", context, outputs=8, experts=6, form="grouped", seed=1),
            make_layer("v", context, outputs=8, top_k=3, bias=True, seed=2),
            make_layer("g", context, outputs=8, seed=3),
        ]
    ).double()
    layers[3].router.policies = dict.fromkeys((True, False), Policy(All()))
    alone = copy.deepcopy(layers)
    share(list(layers))
    x, order = torch.randn(N, D, dtype=torch.float64), (0, 1, 2, 3)
    assert_equal_outcomes(outcome(layers, x, order=order), outcome(alone, x, order=order))


class Products(TorchDispatchMode):
    """Counts matrix products, and operations whose result's size or value the host must wait for."""

    def __init__(self):
        super().__init__()
        self.products, self.waits = 0, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name()
        self.products += name in ("aten::mm", "aten::addmm", "aten::addmm_", "aten::mm.out", "aten::bmm")
        if any(part in name for part in ("nonzero", "_local_scalar_dense", "unique", "masked_select")):
            self.waits.append(name)
        return func(*args, **(kwargs or {}))


def products(layers, x):
    with Products() as counted:
        outcome(layers, x)
    return counted


def test_shared_layers_use_one_product_each_way():
    """Forward: 3 bases, 1 shrink with the routers in it, 3 expands. Backward: 2 of the shrink, 3 bases, 3 x 2 others"""
    layers, x = make_layers(torch.float32), torch.randn(N, D)
    alone = copy.deepcopy(layers)
    share(list(layers))
    together, apart = products(layers, x), products(alone, x)
    assert together.products == 3 + 1 + 3 + 2 + 3 + 6
    assert apart.products == 3 + 3 + 3 + 6 + 3 + 6
    assert together.waits == apart.waits == []


@pytest.mark.parametrize("experts", [8, 64])
def test_work_does_not_depend_on_the_number_of_experts(experts):
    layers = make_layers(torch.float32, experts=experts, form="concatenated")
    share(list(layers))
    assert products(layers, torch.randn(N, D)).products == 18


@pytest.mark.parametrize("order", [(1, 0, 2), (2,), (0,), (0, 2)])
def test_any_order_and_any_part(order):
    layers = make_layers()
    alone = copy.deepcopy(layers)
    share(list(layers))
    x = torch.randn(N, D, dtype=torch.float64)
    for _ in range(2):  # what was left over the first time must not be found the second time
        assert_equal_outcomes(outcome(layers, x, order=order), outcome(alone, x, order=order))


def test_nothing_stale_is_ever_used():
    """The same tensor again, after weights, tensor, mode or grad mode have changed, is computed anew."""
    layers = make_layers().eval()
    share(list(layers))
    x = torch.randn(N, D, dtype=torch.float64)
    q, k, _ = layers
    expected = copy.deepcopy(layers)[1]

    def check(change):
        q(x)
        change()
        expected.load_state_dict(k.state_dict())
        torch.testing.assert_close(k(x), expected(x))

    with torch.no_grad():
        check(lambda: k.bank.down.add_(0.1))
        check(lambda: k.router.score.weight.mul_(-1.0))
        check(lambda: x.add_(1.0))
    q(x)
    with q.context.override("uniform"):
        expected.context.mode = "uniform"
        torch.testing.assert_close(k(x), expected(x))
        expected.context.mode = "learned"
    with torch.no_grad():
        q(x)
    assert k(x).requires_grad  # what waited was made without gradient


def test_evaluation_stacks_once_until_a_weight_changes():
    layers = make_layers(torch.float32).eval()
    share(list(layers))
    twin = copy.deepcopy(layers)
    x = torch.randn(1, D)
    with torch.no_grad():
        for layer in layers:
            layer(x)
        ((_, before),) = layers[0].shared._ready.values()
        layers[0](x.clone())
        assert all(prepared is before for _, prepared in layers[0].shared._ready.values())
        layers[1].bank.down.mul_(2.0)
        twin[1].bank.down.mul_(2.0)
        y = x.clone()
        torch.testing.assert_close([layer(y) for layer in layers], [layer(y.clone()) for layer in twin])
        assert all(prepared is not before for _, prepared in layers[0].shared._ready.values())
        layers.train()
        assert not layers[0].shared._ready


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_an_optimizer_step_is_noticed(fused, training):
    """The fused AdamW does not count up `_version`; a pass without gradient must see what it did all the same."""
    layers = make_layers(torch.float32).train(training)
    share(list(layers))
    optimizer = torch.optim.AdamW([p for p in layers.parameters() if p.requires_grad], lr=0.1, fused=fused)
    x = torch.randn(N, D)

    def outputs(module):
        with torch.no_grad(), module[0].context.open(facts()):
            return [layer(x) for layer in module]

    before = outputs(layers)
    for parameter in layers.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    after = outputs(layers)
    torch.testing.assert_close(after, outputs(copy.deepcopy(layers)), rtol=0, atol=0)
    assert not torch.equal(before[0], after[0])


@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("top_k", [1, 3])
@pytest.mark.parametrize("form", ["concatenated", "grouped"])
def test_in_training_a_pass_without_gradient_is_the_pass_with_it(base, top_k, form):
    """Statistics for the auxiliary losses of a step are collected in such a pass: bit for bit the same routing."""
    layers = make_layers(torch.float32, top_k=top_k, form=form, dropout=0.25).train()
    share(list(layers))
    for layer in layers:
        layer.base.to(base)
    x = torch.randn(N, D).to(base)
    found = []
    for grad in (False, True):
        torch.manual_seed(3)
        with torch.set_grad_enabled(grad), layers[0].context.open(facts()) as records:
            outputs = [layer(x).detach() for layer in layers]
            found.append([*outputs, *(routing.weights_NE.detach() for routing in records.values())])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True)) and len(found[0]) == 6


def test_what_waits_is_dropped_when_the_pass_ends():
    layers = make_layers()
    share(list(layers))
    with pytest.raises(ZeroDivisionError), layers[0].context.open(facts()):
        layers[0](torch.randn(N, D, dtype=torch.float64))
        assert layers[0].shared._waiting
        1 / 0  # noqa: B018
    assert not layers[0].shared._waiting


def test_under_gradient_checkpointing():
    layers = make_layers(dropout=0.25).train()
    share(list(layers))
    x = torch.randn(N, D, dtype=torch.float64)

    def block(x):
        x = x * 1.0
        return sum(layer(x).sum(dim=1) for layer in layers)

    results = []
    for checkpointed in (False, True):
        layers.zero_grad()
        torch.manual_seed(7)
        own = x.clone().requires_grad_()
        with layers[0].context.open(facts()):
            y = checkpoint(block, own, use_reentrant=False) if checkpointed else block(own)
            y.square().sum().backward()
        results.append((y.detach(), own.grad, [p.grad.clone() for p in layers.parameters() if p.grad is not None]))
    assert all(torch.equal(a, b) for a, b in zip(results[0][2], results[1][2], strict=True))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])


def test_dropout_is_one_mask_for_all_members_and_none_for_routers():
    layers = make_layers(torch.float32, dropout=0.5).train()
    share(list(layers))
    x = torch.randn(N, D)
    kept = []
    with layers[0].context.open(facts()) as records:
        layers[0](x)
        kept = [seen.kept.mask_ND for seen in layers[0].shared._waiting.values()]
        dropped = {site: routing.weights_NE for site, routing in records.items()}
    assert kept[0] is kept[1] and 0.2 < kept[0].float().mean() < 0.8
    layers.eval()
    with layers[0].context.open(facts()) as records:
        layers[0](x)
        torch.testing.assert_close(dropped["q"], records["q"].weights_NE)


def test_sites_that_share_are_found_by_running_the_model():
    from loramoe_train.build import attach
    from loramoe_train.site_plan import plan_sites
    from tests.composing import composed
    from tests.conftest import make_llama

    config = composed("experts.sites=all_linear", "experts.layout=2", "experts.rank=2")
    model = make_llama(vocab_size=50)
    model.train()
    routed = attach(config, model, plan_sites(config, model, ["only"]), num_domains=1)
    groups = {tuple(m.site.split(".", 3)[3] for m in layer.shared.members) for layer in routed.layers.values()}
    assert groups == {
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        ("self_attn.o_proj",),
        ("mlp.gate_proj", "mlp.up_proj"),
        ("mlp.down_proj",),
    }
    assert model.training and routed.context.mode == "learned" and not routed.context.records


def test_a_model_that_cannot_be_tried_shares_nothing():
    model = nn.ModuleDict({"a": make_layers()[0]})
    layers = {"q": model["a"]}
    assert share_inputs(model, layers, layers["q"].context) == []


@pytest.mark.parametrize("tokens", [1, 4, 7, 80])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("mode", ["learned", "uniform"])
def test_the_short_way_without_gradient_is_the_long_one(case, mode, tokens):
    layers = make_layers(torch.float32, **CASES[case]).eval()
    share(list(layers))
    x = torch.randn(tokens, D)
    with layers[0].context.override(mode):
        long = [layer(x.clone()).detach() for layer in layers]
        with torch.no_grad():
            short = [layer(x) for layer in layers]
            with layers[0].context.open(facts(tokens)) as records:
                recorded = [layer(x) for layer in layers]
    torch.testing.assert_close(short, long, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(recorded, long, rtol=1e-4, atol=1e-5)
    assert set(records) == {"q", "k", "v"}


@pytest.mark.parametrize("tokens", [1, 7])
def test_few_tokens_of_a_half_precision_base_are_no_less_exact(tokens):
    """One token is multiplied in float32, several in bfloat16: both are near the exact result."""
    layers = make_layers(torch.float32).eval()
    share(list(layers))
    exact = copy.deepcopy(layers).double()
    for layer, twin in zip(layers, exact, strict=True):
        layer.base.to(torch.bfloat16)
        twin.base.load_state_dict(layer.base.state_dict())
    x = torch.randn(tokens, D).bfloat16()
    with torch.no_grad():
        for layer, twin in zip(layers, exact, strict=True):
            y, wanted = layer(x), twin(x.double())
            assert y.dtype == torch.bfloat16 and (y.double() - wanted).norm() / wanted.norm() < 1e-2


def test_what_is_kept_for_backward_does_not_grow_with_the_experts():
    """Neither do logits drag along the narrow product that they were computed with."""
    from torch.autograd.graph import saved_tensors_hooks

    def kept(experts):
        layers = make_layers(torch.float32, experts=experts, form="concatenated")
        share(list(layers))
        own = {t.untyped_storage().data_ptr() for t in (*layers.parameters(), *layers.buffers())}
        storages = {}

        def pack(tensor):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        x = torch.randn(N, D, requires_grad=True)
        with saved_tensors_hooks(pack, lambda t: t), layers[0].context.open(facts()):
            outputs = [layer(x) for layer in layers]
        del outputs
        return sum(size for place, size in storages.items() if place not in own)

    assert kept(64) - kept(8) < N * 4  # not one number per token
