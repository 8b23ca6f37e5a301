"""Published and measured constants, through the recipes: a changed recipe or default shows up here."""

import pytest
import torch

from loramoe_train.build import build_aux
from loramoe_train.parts import build_part
from loramoe_train.planning import make_counts
from loramoe_train.routing.context import RoutingContext
from loramoe_train.routing.types import Routing
from tests.aux_losses.made import tokens_of, whole
from tests.composing import composed

LLAMA2 = "model=llama2_7b"


def counts(*overrides):
    return make_counts(composed(*overrides))[0]


# -- trainable parameters on LLaMA-2-7B, routers included --------------------------------------------------------------


@pytest.mark.parametrize(("layout", "expected"), [(2468, 105_635_840), (8888, 169_017_344), ("2-2-2-10", 84_508_672)])
def test_mola(layout, expected):
    """Its Table 1. Only the sum over layers matters, and tests/experts/test_layouts.py has that of every other code."""
    assert counts("+recipe=mola", LLAMA2, f"experts.layout={layout}").trained == expected


def test_lora():
    """MoLA's Table 1, LoRA of rank 64 on all seven linears; its variants count alike."""
    for recipe in ("lora", "rslora", "lora_plus"):
        found = counts(f"+recipe={recipe}", LLAMA2, "experts.sites=all_linear")
        assert found.trained == found.active == 159_907_840 and found.base == 6_738_415_616


def test_loramoe():
    assert counts("+recipe=loramoe", LLAMA2).trained == 38_486_016
    assert counts("+recipe=loramoe", LLAMA2, "experts.layout=8").trained == 51_314_688


def test_closed_forms():
    """(in, out) of the linears, 32 layers each; a router has `in` per expert."""
    ffn, attention = [(4096, 11008), (4096, 11008), (11008, 4096)], [(4096, 4096)] * 4
    assert counts("+recipe=dynmole", LLAMA2).trained == 32 * sum(6 * (24 * (d + o) + d) for d, o in ffn)
    assert counts("+recipe=hydralora", LLAMA2).trained == 32 * sum(4 * (d + 4 * o) + 4 * d for d, o in ffn)
    # a gate for each of 8 experts, and a threshold with a bias
    assert counts("+recipe=adamole", LLAMA2).trained == 32 * sum(8 * 4 * (d + o) + 9 * d + 1 for d, o in attention)
    tasks = counts("+recipe=meteora", LLAMA2, "data=mola_six")
    assert tasks.experts == 6 * 32 * 8 * sum(d + o for d, o in ffn + attention)
    assert tasks.routers == 6 * 32 * sum(d for d, _ in ffn + attention)


# -- losses and routers as the recipes make them -----------------------------------------------------------------------


def terms_of(recipe, *overrides):
    config = composed(f"+recipe={recipe}", *overrides)
    return build_aux(config, make_counts(config)[1])


def test_balanced_values():
    """1 for each of the four layers of the embedded model; 1 at uniform p; nothing known where sets vary."""
    balance = terms_of("mola")["load_balance"]
    assert (balance.balanced, balance.weight) == (4.0, 0.001)
    balance = terms_of("dynmole")["load_balance"]
    assert (balance.balanced, balance.weight) == (1.0, 0.001)
    balance = terms_of("adamole")["load_balance"]
    assert (balance.balanced, balance.weight) == (None, 0.001)
    assert terms_of("loramoe")["localized_balance"].balanced == 0.0


def one_hot(experts, which, tokens=8):
    return torch.full((tokens, experts), -40.0).index_fill_(1, torch.tensor(which), 0.0)


def test_collapse_in_opposite_directions_is_seen_by_layer_and_not_over_the_model():
    """Two layers of eight, all tokens on the same two experts: 4 in each layer; pooled, half of that per layer."""
    made = {f"model.layers.{i}.q": Routing(one_hot(8, [i, i + 4]).softmax(-1), one_hot(8, [i, i + 4])) for i in (0, 1)}
    made = {s: Routing(r.weights_NE * (r.weights_NE > 0.1), r.logits_NE) for s, r in made.items()}
    tokens = tokens_of([True] * 8, samples=[0] * 8)
    by_layer, pooled = terms_of("mola", "experts.layout=8")["load_balance"], terms_of("dynmole")["load_balance"]
    top_k = {site: 2 for site in made}
    by_layer.loss.top_k = top_k
    assert whole(by_layer.loss, made, tokens).item() == pytest.approx(8.0)
    assert whole(pooled.loss, made, tokens).item() == pytest.approx(2.0)
    # and with as many picks as experts there is nothing to balance
    pair = {"model.layers.0.q": Routing(torch.tensor([[0.9, 0.1]] * 8), torch.tensor([[2.2, 0.0]] * 8))}
    assert whole(by_layer.loss, pair, tokens).item() == pytest.approx(1.0)


def test_loramoe_favours_the_other_half():
    """0.45 on the half of an example's own group, 0.55 on the other, is the minimum for delta 0.1."""
    loss = terms_of("loramoe")["localized_balance"].loss
    low, high = [0.45 / 3] * 3, [0.55 / 3] * 3
    p = torch.tensor([low + high] * 2 + [high + low] * 2)
    tokens = tokens_of([True] * 4, tasks=[0, 0, 1, 1], samples=[0, 0, 1, 1])
    assert whole(loss, {"q": Routing(p, p.log())}, tokens).item() == pytest.approx(0.0, abs=1e-7)
    assert whole(loss, {"q": Routing(p, p.log().flip(-1))}, tokens).item() > 0.04


@pytest.mark.parametrize(
    ("p", "active"),
    [
        ([1 / 8] * 8, 8),
        ([0.93] + [0.01] * 7, 2),
        ([0.45, 0.35] + [0.2 / 6] * 6, 2),
        ([0.3, 0.2, 0.15, 0.1, 0.1, 0.05, 0.05, 0.05], 8),
    ],
)
def test_dynmoles_active_experts(p, active):
    """Eight experts, the recipe's own router, in training and in evaluation. [measured]"""
    router = build_part(
        composed("+recipe=dynmole").router.make, "router.make", facts={"d_in": 1, "num_experts": 8, "top_k": None}
    )
    with torch.no_grad():
        router.score.weight.copy_(torch.tensor(p).log().unsqueeze(-1))
        for training in (True, False):
            weights = router.train(training)(torch.ones(1, 1), RoutingContext()).weights_NE
            assert int((weights > 0).sum()) == active
            kept = sorted(p, reverse=True)[:active]
            assert weights.sum().item() == pytest.approx(sum(kept), abs=1e-5)  # not renormalised
