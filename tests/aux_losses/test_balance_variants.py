"""The published balance losses as switches of one: against loops, and their constants."""

import itertools
import math

import pytest
import torch

from loramoe_train.aux_losses.load_balance import LoadBalance
from loramoe_train.aux_losses.neg_log_mean import NegLogMean
from loramoe_train.routing.types import Routing
from tests.aux_losses import reference
from tests.aux_losses.made import records_of, tokens_of, whole

MASK = [True, True, False, True, True, False, True, True]
SAMPLES = [0, 0, 0, 0, 1, 1, 1, 1]
SITES = ("model__layers__0__q", "model__layers__0__v", "model__layers__1__q", "model__layers__1__v")
SWITCH = {"top_k": 1}
MOLA = {"top_k": 2, "pool": "layer", "reduction": "sum"}
MIXTRAL = {"top_k": 2, "share": "per_token", "pool": "model"}
DYNMOLE = {"top_k": None, "counts": "mass", "share": "per_token", "pool": "model"}
LLAVA = {"top_k": 1, "factor": "one", "pool": "sample"}


def sparse(logits, k=2):
    """Records with the raw probabilities of the k best as weights."""
    p = logits.softmax(-1)
    kept = torch.zeros_like(p).scatter(-1, p.topk(k, dim=-1).indices, 1.0)
    return Routing(p * kept, logits)


def constant(settings, logits_NE, *, sites=1, samples=None):
    n = len(logits_NE)
    k = settings["top_k"] or 2
    names = [f"layers.{i}.q" for i in range(sites)]
    records = {name: sparse(logits_NE, k) for name in names}
    tokens = tokens_of([True] * n, samples=samples or [0] * n)
    return whole(LoadBalance(**settings), records, tokens).item()


def even(experts, k):
    """Every set of k experts once, each with nearly all the probability, half and half (a rounding apart)."""
    rows = torch.full((math.comb(experts, k), experts), -40.0)
    for row, chosen in enumerate(itertools.combinations(range(experts), k)):
        rows[row, list(chosen)] = 0.0
    return rows


@pytest.mark.parametrize(
    ("settings", "balanced", "collapsed"),
    [
        (SWITCH, 1.0, 8.0),
        (MOLA, 1.0, 4.0),
        (MIXTRAL, 2.0, 8.0),
        (LLAVA, 1 / 8, 1.0),
    ],
)
def test_balanced_and_collapsed_values_of_the_table(settings, balanced, collapsed):
    """Eight experts; all tokens on the same one, or the same two where two are chosen. [measured in the notes]"""
    k = settings["top_k"]
    everybody = torch.full((28, 8), -40.0)
    everybody[:, :k] = 0.0
    assert constant(settings, even(8, k)) == pytest.approx(balanced, rel=1e-5)
    assert constant(settings, everybody) == pytest.approx(collapsed, rel=1e-5)
    assert LoadBalance(**settings, num_experts={"layers.0.q": 8}).balanced == pytest.approx(balanced)


def test_soft_counts():
    """1 at uniform p where all are kept, E for one expert; the kept mass lowers the floor of peaked routing."""
    uniform = torch.zeros(6, 8)
    loss, tokens = LoadBalance(**DYNMOLE, num_experts={"a": 8}), tokens_of([True] * 6)
    assert loss.balanced == 1.0
    assert whole(loss, {"a": Routing(uniform.softmax(-1), uniform)}, tokens).item() == pytest.approx(1.0)
    one = torch.tensor([[60.0] + [0.0] * 7] * 6)
    assert whole(loss, {"a": sparse(one)}, tokens).item() == pytest.approx(8.0)
    peaked = 3.0 * torch.eye(8)
    p = peaked.softmax(-1)
    mass = float(p.topk(2, dim=-1).values.sum(-1).mean())
    assert whole(loss, {"a": sparse(peaked)}, tokens_of([True] * 8)).item() == pytest.approx(mass, rel=1e-5)


def test_layers_add_up_for_mola_and_sites_of_a_layer_do_not():
    logits = torch.randn(16, 8)
    one = constant(MOLA, logits)
    assert constant(MOLA, logits, sites=3) == pytest.approx(3 * one, rel=1e-5)
    records = {"layers.0.q": sparse(logits), "layers.0.v": sparse(logits)}
    assert whole(LoadBalance(**MOLA), records, tokens_of([True] * 16)).item() == pytest.approx(one, rel=1e-5)
    assert LoadBalance(**MOLA, num_experts={"layers.0.q": 8, "layers.0.v": 8, "layers.1.q": 4}).balanced == 2.0


def test_a_pool_over_layers_does_not_see_opposite_collapses():
    """Two layers that collapse onto different experts of two: 1.00 pooled (its balanced value), 4.00 by layer."""
    first = torch.tensor([[40.0, 0.0]] * 8)
    records = {"layers.0.q": sparse(first, 1), "layers.1.q": sparse(first.flip(-1), 1)}
    tokens = tokens_of([True] * 8)
    pooled = LoadBalance(top_k=1, share="per_token", pool="model", num_experts={"layers.0.q": 2, "layers.1.q": 2})
    by_layer = LoadBalance(top_k=1, pool="layer", reduction="sum", num_experts={"layers.0.q": 2, "layers.1.q": 2})
    assert whole(pooled, records, tokens).item() == pytest.approx(1.0) == pytest.approx(pooled.balanced)
    assert whole(by_layer, records, tokens).item() == pytest.approx(4.0) == pytest.approx(2 * by_layer.balanced)


@pytest.mark.parametrize("settings", [SWITCH, MOLA, MIXTRAL, DYNMOLE, LLAVA])
def test_against_the_loop(settings):
    """Values and gradients, with padding, several layers, and two examples of different length."""
    torch.manual_seed(0)
    logits = {s: torch.randn(8, 4, dtype=torch.float64, requires_grad=True) for s in SITES}
    records = {name.replace("__", "."): sparse(value) for name, value in logits.items()}
    value = whole(LoadBalance(**settings), records, tokens_of(MASK, samples=SAMPLES))
    tokens = [n for n, used in enumerate(MASK) if used]
    p = {s: [list(row) for row in torch.exp(z) / torch.exp(z).sum(-1, keepdim=True)] for s, z in logits.items()}
    used = {s: reference.top_k_used(rows, settings["top_k"] or 2) for s, rows in p.items()}
    if settings is DYNMOLE:
        used = {s: [[m * q for m, q in zip(*pair, strict=True)] for pair in zip(used[s], p[s], strict=True)] for s in p}
    options = {"experts": 4, "per_pick": settings.get("share") != "per_token"}
    options["factor"] = 1 if settings.get("factor") == "one" else 4

    def over(sites, tokens):
        return reference.balance({s: p[s] for s in sites}, used, tokens, **options)

    expected = {
        "site": lambda: sum(over([s], tokens) for s in SITES) / 4,
        "layer": lambda: over(SITES[:2], tokens) + over(SITES[2:], tokens),
        "model": lambda: over(SITES, tokens),
        "sample": lambda: sum(over(SITES, [n for n in tokens if SAMPLES[n] == b]) for b in (0, 1)) / 2,
    }[settings.get("pool", "site")]()
    torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-9)
    ours = torch.autograd.grad(value, list(logits.values()), retain_graph=True)
    twins = torch.autograd.grad(expected, list(logits.values()))
    for one, other in zip(ours, twins, strict=True):
        assert other.abs().sum() > 0
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9)


def test_a_router_may_say_what_its_probabilities_are():
    logits = torch.randn(5, 3)
    shifted = logits.softmax(-1) - 0.2
    records = {"a": Routing((shifted > 0).float(), logits, p_NE=shifted)}
    loss = LoadBalance(top_k=None, counts="kept", share="per_token", reduction="sum", num_experts={"a": 3})
    expected = 3 * ((shifted > 0).float().mean(0) * shifted.mean(0)).sum()
    torch.testing.assert_close(whole(loss, records, tokens_of([True] * 5)), expected)
    assert loss.balanced is None


def test_pools_of_unequal_layers_are_refused():
    counts = {"model.layers.0.q": 2, "model.layers.1.q": 4}
    with pytest.raises(ValueError, match=r"pool=model takes model.layers.0.q with 2 experts together with model.layer"):
        LoadBalance(top_k=2, pool="model", num_experts=counts)
    with pytest.raises(ValueError, match="pool=model"):
        NegLogMean(num_experts=counts)
    LoadBalance(top_k=2, pool="layer", num_experts=counts)
    with pytest.raises(ValueError, match="pool=sample"):  # not known beforehand
        records = records_of(a=torch.randn(3, 2), b=torch.randn(3, 4))
        whole(LoadBalance(top_k=1, pool="sample"), records, tokens_of([True] * 3, samples=[0, 0, 0]))
    with pytest.raises(ValueError, match="tell its examples apart"):
        whole(LoadBalance(top_k=1, pool="sample"), records_of(a=torch.randn(3, 2)), tokens_of([True] * 3))
    with pytest.raises(ValueError, match="needs top_k"):
        LoadBalance(top_k=None)


def test_neg_log_mean_against_the_loop():
    torch.manual_seed(0)
    logits = {s: torch.randn(8, 4, dtype=torch.float64, requires_grad=True) for s in SITES}
    records = {name.replace("__", "."): sparse(value) for name, value in logits.items()}
    tokens = [n for n, used in enumerate(MASK) if used]
    for pool, sites in (("model", [SITES]), ("layer", [SITES[:2], SITES[2:]]), ("site", [[s] for s in SITES])):
        terms = []
        for pooled in sites:
            q = [sum(logits[s][n].softmax(-1)[e] for s in pooled for n in tokens) for e in range(4)]
            terms.append(-sum(torch.log(value / (len(tokens) * len(pooled))) for value in q))
        value = whole(NegLogMean(pool=pool), records, tokens_of(MASK))
        torch.testing.assert_close(value, sum(terms) / len(terms), rtol=1e-6, atol=1e-9)
    samples = [0, 0, 0, 0, 0, 0, 1, 1]
    by_example = [[n for n in tokens if samples[n] == sample] for sample in (0, 1)]
    p = torch.stack([routing.logits_NE.softmax(-1) for routing in records.values()]).mean(dim=0)
    q_E = torch.stack([p[own].mean(dim=0) for own in by_example]).mean(dim=0)
    value = whole(NegLogMean(tokens="example"), records, tokens_of(MASK, samples=samples))
    torch.testing.assert_close(value, -q_E.log().sum(), rtol=1e-6, atol=1e-9)
    with pytest.raises(ValueError, match="does not tell its examples apart"):
        whole(NegLogMean(tokens="example"), records, tokens_of(MASK))
    uniform = records_of(a=torch.zeros(3, 4))
    loss = NegLogMean(num_experts={"a": 4})
    assert whole(loss, uniform, tokens_of([True] * 3)).item() == pytest.approx(4 * math.log(4)) == loss.balanced
