"""A folded static route, loaded by PEFT, gives the logits of the routed model with that route."""

import copy

import pytest
import torch
from peft import PeftModel

from loramoe_train.errors import ConfigError
from loramoe_train.experts.adapters import adapter_tensors
from loramoe_train.experts.fold import fold, route_weights
from loramoe_train.experts.peft_folder import write_peft_folder
from tests.conftest import make_llama
from tests.test_routed_model import DOMAINS, OVERRIDES, composed, facts, ids_of, route, stir


@pytest.fixture
def routed():
    model = make_llama(vocab_size=50)
    base = copy.deepcopy(model)
    made = route(model, composed(*OVERRIDES, "experts.layout=4"))
    stir(made)
    made.model.eval()
    return base, made


def from_peft(base, made, name, folder):
    factors = fold(made.plan, adapter_tensors(made.layers), name, domains=DOMAINS)
    write_peft_folder(folder, factors, base_model="tiny")
    return PeftModel.from_pretrained(copy.deepcopy(base), folder).eval()


def test_uniform(routed, tmp_path):
    base, made = routed
    ids = ids_of()
    with torch.no_grad(), made.context.override("uniform"):
        torch.testing.assert_close(
            from_peft(base, made, "uniform", tmp_path / "a")(ids).logits, made.model(ids).logits, rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("number", range(len(DOMAINS)))
def test_each_domain(routed, tmp_path, number):
    """Four experts over three domains: the first domain owns two."""
    base, made = routed
    ids = ids_of()
    with torch.no_grad(), made.context.override("by_domain"), made.context.open(facts(ids, [number] * 3)):
        expected = made.model(ids, use_cache=False).logits
    adapted = from_peft(base, made, f"domain:{DOMAINS[number]}", tmp_path / "a")
    with torch.no_grad():
        torch.testing.assert_close(adapted(ids).logits, expected, rtol=1e-4, atol=1e-5)
    rank = {module.r["default"] for module in adapted.modules() if hasattr(module, "lora_A")}
    assert rank == {4 if number == 0 else 2}


def test_one_copy_of_whole_blocks_and_the_plain_lora_beside_it(tmp_path):
    base = make_llama(vocab_size=50)
    sizes = ("experts.rank=2", "experts.alpha=4", "experts.plain.rank=3", "experts.plain.alpha=6", "experts.layout=3")
    made = route(copy.deepcopy(base), composed("+recipe=mixlora", "model=smollm2_135m", *sizes))
    stir(made)
    ids, tensors = ids_of(), made.tensors()
    with torch.no_grad(), made.context.override("by_domain"), made.context.open(facts(ids, [1] * 3)):
        expected = made.model.eval()(ids, use_cache=False).logits
    factors = fold(made.plan, tensors, "expert:1", domains=DOMAINS, whole_blocks=True)
    write_peft_folder(tmp_path / "a", factors, base_model="tiny")
    adapted = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "a").eval()
    with torch.no_grad():
        torch.testing.assert_close(adapted(ids).logits, expected, rtol=1e-4, atol=1e-5)
    for several in ("uniform", "all"):
        with pytest.raises(ConfigError, match=rf"route={several} .*experts\.mixing=output.*route=expert:0"):
            fold(made.plan, tensors, several, domains=DOMAINS, whole_blocks=True)


def test_weights_of_a_route():
    assert route_weights("expert:2", experts=3, domains=[]) == [0.0, 0.0, 1.0]
    assert route_weights("all", experts=2, domains=[]) == [1.0, 1.0]
    assert route_weights("domain:b", experts=2, domains=["a", "b"]) == [0.0, 1.0]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("expert:3", "experts 0 to 2"),
        ("domain:mth", "did you mean 'math'|math"),
        ("learned", "write uniform"),
        ("uniform:1", "write uniform"),
    ],
)
def test_bad_routes(name, message):
    with pytest.raises(ConfigError, match=message):
        route_weights(name, experts=3, domains=["math", "code"])
