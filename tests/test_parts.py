"""`_target_` parts: what may be named, which arguments fit, what a constructor is told."""

import pytest

from loramoe_train.errors import ConfigError
from loramoe_train.parts import build_part, check_part, takes

LINEAR = "loramoe_train.routers.scores.LinearScore"
TOPK = "loramoe_train.routers.select.TopK"
POLICY = "loramoe_train.routers.router.Policy"


def test_builds_nested_parts_and_offers_facts_by_name():
    part = {"_target_": POLICY, "select": {"_target_": TOPK}, "weight": "unit"}
    check_part(part, "router.make", facts=("top_k", "num_experts"))
    policy = build_part(part, "router.make", facts={"top_k": 2, "num_experts": 4, "d_in": 8})
    assert policy.select.top_k == 2 and policy.weight == "unit"


def test_the_yaml_wins_over_a_fact():
    built = build_part({"_target_": TOPK, "top_k": 1}, "x", facts={"top_k": 3, "num_experts": 4})
    assert built.top_k == 1


def test_takes_sees_nested_parts():
    part = {"_target_": POLICY, "select": {"_target_": TOPK}}
    assert takes(part, "top_k")
    assert not takes({"_target_": POLICY, "select": {"_target_": TOPK, "top_k": 2}}, "top_k")


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({}, "router.make._target_ is missing"),
        ({"_target_": 3}, "'3' is no class"),
        ({"_target_": "os.system"}, "lies outside loramoe_train.*trusted_modules"),
        ({"_target_": "loramoe_train_evil.x.Y"}, "lies outside"),
        ({"_target_": "loramoe_train.routers.score.LinearScore"}, "did you mean 'loramoe_train.routers.scores'"),
        ({"_target_": "loramoe_train.routers.scores.LinerScore"}, "did you mean 'LinearScore'"),
        ({"_target_": LINEAR, "baias": True}, "router.make.baias: .* did you mean 'bias'"),
        ({"_target_": POLICY}, "router.make.select is missing"),
        ({"_target_": POLICY, "select": {"_target_": TOPK, "k": 2}}, "router.make.select.k"),
    ],
)
def test_errors_name_the_full_key(part, message):
    with pytest.raises(ConfigError, match=message):
        check_part(part, "router.make", facts=("d_in", "num_experts", "top_k"))


def test_a_refusing_constructor_is_told_with_its_key():
    with pytest.raises(ConfigError, match="router.make.select: top_k must lie between 1 and"):
        build_part(
            {"_target_": POLICY, "select": {"_target_": TOPK}}, "router.make", facts={"top_k": 5, "num_experts": 2}
        )


def test_trusted_modules_open_other_packages():
    part = {"_target_": "fractions.Fraction", "numerator": 3}
    with pytest.raises(ConfigError, match="lies outside"):
        check_part(part, "x", facts=())
    check_part(part, "x", facts=(), trusted=["fractions"])
    assert build_part(part, "x", facts={}, trusted=["fractions"]) == 3


def test_a_class_takes_what_it_hands_on_to_its_base():
    bank = "loramoe_train.experts.principal.PrincipalBank"
    sizes = ("d_in", "d_out", "ranks", "scales")
    check_part({"_target_": bank, "dropout": 0.1}, "experts.make", facts=sizes)
    with pytest.raises(ConfigError, match="experts.make.dropot: .* did you mean 'dropout'"):
        check_part({"_target_": bank, "dropot": 0.1}, "experts.make", facts=sizes)
