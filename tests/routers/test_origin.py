"""Routing by task: the same as one folded LoRA in generation and when stored; what it must be told. Values: twins."""

import copy

import pytest
import torch
from peft import PeftModel

from loramoe_train.build import attach, check_fit, static_routes
from loramoe_train.errors import ConfigError
from loramoe_train.experts.adapters import load_weights, plan_of, read_manifest, read_weights, save_adapter
from loramoe_train.experts.fold import fold
from loramoe_train.experts.peft_folder import write_peft_folder
from loramoe_train.export import export
from loramoe_train.routers.origin import HardByOrigin, OriginScore
from loramoe_train.routers.router import Policy, Router
from loramoe_train.routers.select import All
from loramoe_train.routing.context import RoutingContext
from loramoe_train.site_plan import plan_sites
from tests.composing import composed
from tests.conftest import make_llama
from tests.contracts import check_router
from tests.test_routed_model import ids_of

TASKS = ("tiny_math", "tiny_code", "tiny_facts")
SMALL = (f"data.tasks=[{','.join(TASKS)}]", "experts.dropout=0", "experts.rank=2", "experts.alpha=4")
RECIPES = ("moelora_task", "lora_per_task")
every = pytest.mark.parametrize("recipe", RECIPES)


def build(recipe, *overrides):
    """A tiny model with the recipe's routers over stirred experts, its untouched base, and the config."""
    model = make_llama(vocab_size=50)
    base, config = copy.deepcopy(model), composed(f"+recipe={recipe}", *SMALL, *overrides)
    routed = attach(config, model, plan_sites(config, model, TASKS), num_domains=len(TASKS))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for layer in routed.layers.values():
            layer.bank.up.normal_(0, 0.2, generator=generator)
    return routed, base, config


@every
@pytest.mark.parametrize(
    "how", [{"use_cache": False}, {"use_cache": True}, {"use_cache": True, "num_beams": 2}], ids=str
)
def test_generation_is_that_of_one_folded_lora(recipe, how, tmp_path):
    routed, base, config = build(recipe)
    tensors, counts = routed.tensors(), {"num_domains": len(TASKS), "num_tasks": len(TASKS)}
    mask = torch.ones(2, 4, dtype=torch.long)
    mask[0, :2] = 0  # padded on the left, as for generation
    options = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, **how}
    ids, answers = ids_of(rows=2, length=4), []
    for task in range(2):
        route = static_routes(config, routed.plan, tensors, "task", task, **counts)
        write_peft_folder(tmp_path / str(task), fold(routed.plan, tensors, route), base_model="tiny")
        folded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / str(task)).eval()
        with torch.no_grad(), routed.context.serving(task=task):
            torch.testing.assert_close(routed.model.eval()(ids).logits, folded(ids).logits, rtol=1e-4, atol=1e-5)
            answers.append(routed.model.generate(ids, **options))
        assert torch.equal(answers[-1], folded.generate(input_ids=ids, **options))
    assert not torch.equal(*answers)


@every
def test_the_exported_folder_is_the_stored_routers_decision(recipe, tmp_path):
    """Through files alone, and tasks in the order in which they were trained on."""
    routed, base, config = build(recipe)
    facts_stored = {"base": {}, "domains": TASKS, "tasks": TASKS, "config": config.plain()}
    save_adapter(tmp_path, routed.tensors(), routed.plan, facts_stored)
    manifest = read_manifest(tmp_path)
    other = composed(f"+recipe={recipe}", *SMALL, f"data.tasks=[{TASKS[2]}]")
    again = attach(other, make_llama(vocab_size=50), plan_of(manifest), num_domains=3, num_tasks=3)
    load_weights(again.tensors(), read_weights(tmp_path, manifest), "x")
    folder = export([str(tmp_path), str(tmp_path / "one"), f"route=task:{TASKS[2]}"])
    ids = ids_of()
    with torch.no_grad(), again.context.serving(task=2):
        expected = PeftModel.from_pretrained(base, folder).eval()(ids).logits
        torch.testing.assert_close(again.model.eval()(ids).logits, expected, rtol=1e-4, atol=1e-5)
    for arguments, message in [
        ([], "name a static route"),
        (["route=task:tiny_maths"], "no such task.*tiny_math"),
        (["route=domain:x"], "no such domain"),
        (["route=tsk:x"], "domain:NAME or task:NAME"),
    ]:
        with pytest.raises(ConfigError, match=message):
            export([str(tmp_path), str(tmp_path / "two"), *arguments])


def test_a_task_route_wants_routers_that_decide_by_task():
    _, _, config = build("lora_per_task")
    by_domain = composed("+recipe=lora_per_task", *SMALL, "router.make.origin=domain")
    routed, _, _ = build("lora_per_task", "router.make.origin=domain")
    counts = {"num_domains": 3, "num_tasks": 3}
    assert static_routes(by_domain, routed.plan, {}, "task", 0, **counts) is None
    assert static_routes(config, routed.plan, {}, "domain", 0, **counts) is None
    by_input = composed("router=soft", "router.scope=block")  # its routers are not made: their width is not known
    assert static_routes(by_input, routed.plan, {}, "task", 0, **counts) is None
    with pytest.raises(ConfigError, match="do not decide by the task"):
        fold(routed.plan, routed.tensors(), "task:tiny_math", domains=TASKS)


def served():
    context = RoutingContext()
    context.told = context.serving(task=1, domain=0)  # kept, for it ends with its last reference
    context.told.__enter__()
    return context


def test_contracts():
    def gate(d_in, experts):
        score = OriginScore(experts, 2, 1, origin="task", width=3)
        return Router(score=score, train=Policy(All()), evaluate=Policy(All()))

    check_router(gate, make_context=served)
    check_router(lambda d_in, experts: HardByOrigin(experts, 2, 1, origin="task"), make_context=served)
    check_router(lambda d_in, experts: HardByOrigin(experts, 2, 1, origin="domain"), make_context=served)


def test_nobody_told_whose_example_it_is():
    routed, _, _ = build("lora_per_task")
    with pytest.raises(RuntimeError, match=r"depends on the task: .*serving\(task=INDEX\)"):
        routed.model.eval()(ids_of())


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("+recipe=moelora_task", "router.make.score.origin=tasks"), "origin must be task or domain, got 'tasks'"),
        (("+recipe=moelora_task", "router.make.score.width=0"), "width must be at least 1, got 0"),
        (("+recipe=lora_per_task", "router.make.origin=1"), "origin must be task or domain"),
        (("+recipe=lora_per_task", "aux_loss=load_balance"), "aux_loss.load_balance needs a router that scores"),
    ],
)
def test_bad_values(overrides, message):
    config = composed(*overrides)
    with pytest.raises(ConfigError, match=message):
        check_fit(config, plan_sites(config, make_llama(vocab_size=50), TASKS))
