"""The learned router: contract, hand-computed weights, policies of training and evaluation."""

import pytest
import torch

from loramoe_train.routers.router import Policy, Router
from loramoe_train.routers.scores import LinearScore
from loramoe_train.routers.select import All, TopK
from loramoe_train.routing.context import RoutingContext
from tests.contracts import check_router


def soft(d_in, experts):
    return Router(
        score=LinearScore(d_in, experts),
        train=Policy(All()),
        evaluate=Policy(TopK(min(2, experts), experts), "renormalised"),
    )


def sparse(d_in, experts):
    policy = Policy(TopK(min(2, experts), experts), "renormalised")
    return Router(score=LinearScore(d_in, experts, init="kaiming"), train=policy, evaluate=policy)


def test_contracts():
    check_router(soft)
    check_router(sparse)
    check_router(
        lambda d, e: Router(
            score=LinearScore(d, e, bias=True), normalise="sigmoid", train=Policy(All()), evaluate=Policy(All())
        ),
        sums_to_one=False,
    )


def test_weights_by_hand():
    router = soft(2, 3)
    router.score.weight.data = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
    x = torch.tensor([[2.0, 1.0]])  # logits 2, 1, 0
    p = torch.tensor([0.66524096, 0.24472847, 0.09003057])
    torch.testing.assert_close(router(x, RoutingContext()).weights_NE[0], p)
    kept = router.eval()(x, RoutingContext()).weights_NE[0]
    torch.testing.assert_close(kept, torch.tensor([0.73105858, 0.26894142, 0.0]))


@pytest.mark.parametrize("weight", ["probability", "renormalised", "unit"])
def test_exactly_k_experts_even_among_ties(weight):
    w = Policy(TopK(2, 5), weight)(torch.zeros(4, 5), "softmax").weights_NE
    assert ((w > 0).sum(dim=-1) == 2).all()
    assert w.max().item() == pytest.approx({"probability": 0.2, "renormalised": 0.5, "unit": 1.0}[weight])


def test_zero_initialised_router_starts_at_the_uniform_average():
    w = soft(4, 5)(torch.randn(3, 4), RoutingContext()).weights_NE
    torch.testing.assert_close(w, torch.full((3, 5), 0.2))


def test_temperature_divides_the_logits():
    router = Router(
        score=LinearScore(2, 2, init="normal"), train=Policy(All()), evaluate=Policy(All()), temperature=2.0
    )
    x = torch.randn(3, 2)
    torch.testing.assert_close(router(x, RoutingContext()).logits_NE, router.score(x) / 2.0)


@pytest.mark.parametrize("learned", [False, True])
def test_evaluation_may_have_a_temperature_of_its_own(learned):
    score, policy = LinearScore(2, 3, init="normal", std=1.0), Policy(TopK(2, 3), "renormalised")
    settings = {"score": score, "train": policy, "evaluate": policy, "temperature": 2.0, "learn_temperature": learned}
    router, same = Router(**settings, test_temperature=15.0), Router(**settings)
    x, context = torch.randn(4, 2), RoutingContext()
    torch.testing.assert_close(router(x, context).weights_NE, same(x, context).weights_NE)
    router.eval(), same.eval()
    best, places = score(x).topk(2)
    expected = torch.zeros(4, 3).scatter(1, places, (best / 15.0).softmax(dim=1))
    torch.testing.assert_close(router(x, context).weights_NE, expected)
    torch.testing.assert_close(same(x, context).weights_NE, torch.zeros(4, 3).scatter(1, places, (best / 2).softmax(1)))
    assert not router.is_like(same)


def test_jitter_scales_what_the_score_sees_in_training_alone():
    policy = Policy(TopK(2, 4), "renormalised")
    router = Router(score=LinearScore(3, 4, init="normal", std=1.0), train=policy, evaluate=policy, jitter=0.5)
    x, context = torch.randn(200, 3), RoutingContext()
    found = []
    for _ in range(2):
        torch.manual_seed(0)
        found.append(router(x, context).logits_NE)
    assert torch.equal(*found) and router.linear_score is None
    torch.manual_seed(0)
    factor = torch.empty(200, 3).uniform_(0.5, 1.5)
    torch.testing.assert_close(found[0], router.score(x * factor))
    assert factor.min() < 0.55 and factor.max() > 1.45
    assert torch.equal(router.eval()(x, context).logits_NE, router.score(x)) and router.linear_score is not None


def test_kaiming_draws_weight_and_bias_as_torch_does():
    """Within the same bound and reaching for it: U(-1/sqrt(D), 1/sqrt(D)). The weight does not depend on the bias."""
    own = {"init": "kaiming", "bias": True}
    score = LinearScore(16, 2000, **own, generator=torch.Generator().manual_seed(0))
    for parameter in score.parameters():
        assert 0.245 < parameter.max() <= 0.25 and -0.25 <= parameter.min() < -0.245
    alone = LinearScore(16, 2000, init="kaiming", generator=torch.Generator().manual_seed(0))
    assert torch.equal(alone.weight, score.weight) and not LinearScore(16, 5, init="normal", bias=True).bias.any()


def test_a_learned_temperature():
    """Starts where it is told, stays positive whatever a step does, gets the loop's gradient, and is nobody else's."""

    def make(d_in, experts, learned=True):
        policies = {"train": Policy(All()), "evaluate": Policy(TopK(1, experts))}
        score = LinearScore(d_in, experts, init="normal")
        return Router(score=score, temperature=2.0, learn_temperature=learned, **policies)

    check_router(make, sums_to_one=False)
    router, x = make(2, 3), torch.randn(4, 2)
    assert router.log_temperature.exp().item() == pytest.approx(2.0)
    fixed = make(2, 3, learned=False)
    fixed.score = router.score
    torch.testing.assert_close(router(x, RoutingContext()).weights_NE, fixed(x, RoutingContext()).weights_NE)
    temperature = torch.tensor(2.0, requires_grad=True)
    (torch.softmax(router.score(x) / temperature, dim=-1) ** 2).sum().backward()
    (router(x, RoutingContext()).weights_NE ** 2).sum().backward()
    torch.testing.assert_close(router.log_temperature.grad, 2.0 * temperature.grad)  # d / d log t = t d / d t
    few = [made.eval().few(made.score(x)).weights_NK for made in (router, fixed)]
    torch.testing.assert_close(*few)
    assert not router.is_like(make(2, 3)) and not fixed.is_like(router)
    names = [name for name, _ in router.named_parameters()]
    assert sorted(names) == ["log_temperature", "score.weight"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TopK(3, 2), "between 1 and the layer's 2 experts, got 3"),
        (lambda: Policy(All(), "half"), "weight must be"),
        (
            lambda: Router(score=LinearScore(2, 2), train=Policy(All()), evaluate=Policy(All()), temperature=0),
            "temperature must be positive, got 0",
        ),
        (
            lambda: Router(score=LinearScore(2, 2), train=Policy(All()), evaluate=Policy(All()), test_temperature=-1),
            "test_temperature must be positive, got -1",
        ),
        (lambda: LinearScore(2, 2, init="ones"), "init must be"),
        (lambda: Router(score=LinearScore(2, 2), train=Policy(All()), evaluate=Policy(All()), jitter=1.0), r"\[0, 1\)"),
    ],
)
def test_bad_values(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("weight", ["probability", "renormalised", "unit"])
@pytest.mark.parametrize("normalise", ["softmax", "sigmoid"])
@pytest.mark.parametrize("select", [All(), TopK(2, 5), TopK(1, 5)])
def test_policy_against_the_loop(weight, normalise, select):
    """Values, and gradients through the weights of the kept experts, token by token."""
    logits = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    routing = Policy(select, weight)(logits, normalise)
    fast = routing.weights_NE
    if isinstance(select, TopK):  # the same by token
        assert torch.equal(fast.gather(1, routing.chosen.experts_NK), routing.chosen.weights_NK)
        assert routing.chosen.experts_NK.shape == (6, select.top_k)
    rows = []
    for z in logits:
        p = torch.exp(z) / torch.exp(z).sum() if normalise == "softmax" else 1 / (1 + torch.exp(-z))
        count = 5 if isinstance(select, All) else select.top_k
        kept = sorted(range(5), key=lambda e, p=p: -p[e].item())[:count]
        total = sum(p[e] for e in kept)
        value = {"probability": lambda e, p=p: p[e], "renormalised": lambda e, p=p, t=total: p[e] / t}
        value["unit"] = lambda e, p=p: torch.ones_like(p[e])
        rows.append(torch.stack([value[weight](e) if e in kept else 0.0 * p[e] for e in range(5)]))
    slow = torch.stack(rows)
    torch.testing.assert_close(fast, slow)
    if weight != "unit":
        probe = torch.randn_like(slow)
        ours, twin = (torch.autograd.grad((w * probe).sum(), logits, retain_graph=True)[0] for w in (fast, slow))
        torch.testing.assert_close(ours, twin)


def test_routers_are_alike_only_with_equal_settings():
    assert soft(3, 4).is_like(soft(5, 4)) and not soft(3, 4).is_like(sparse(3, 4))
    assert not soft(3, 4).is_like(soft(3, 1))  # another k
    twins = [Policy(lambda p: p > 0), Policy(lambda p: p > 1)]
    assert not twins[0].is_like(twins[1]) and twins[0].is_like(twins[0])
