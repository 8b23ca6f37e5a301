"""Every shipped recipe, found by globbing, against its slow twin; `tests/twins/` says how to write one."""

import copy
from dataclasses import replace

import pytest
import torch

from loramoe_train.build import RoutedModel, build_aux
from loramoe_train.training.optim import build_optimizer
from loramoe_train.training.stages import plan_stages
from loramoe_train.validation import domains_of
from tests.composing import RECIPE_NAMES
from tests.recipe_passes import KINDS, Made, enter_stage, make
from tests.test_routed_model import facts, stir
from tests.twins import Case, Twin, all_twins

# four layers, so that quarters of a model are what they are
SHAPES = {
    "llama": {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4},
    "qwen3": {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4, "head_dim": 6},
    "falcon_mamba": {"hidden_size": 12, "num_hidden_layers": 4, "state_size": 3, "time_step_rank": 4},
}
LENGTHS, DOMAINS, TASKS = (4, 3), (4, 1), (3, 0)  # of the rows of the batch
PROMPTS = (3, 2)  # how much of each row is no answer


def twin_of(recipe: str) -> Twin:
    """The twin, or a failure that says where one is to be written."""
    twins = all_twins()
    if recipe not in twins:
        pytest.fail(
            f"recipes/{recipe}.yaml has no slow twin: write its equations once more, from the paper, as"
            f' TWINS["{recipe}"] in a module of tests/twins (tests/twins/__init__.py says how)'
        )
    return twins[recipe]


def batch():
    """(ids, valid) of rows padded on the right."""
    ids = torch.randint(2, 50, (len(LENGTHS), max(LENGTHS)), generator=torch.Generator().manual_seed(5))
    valid = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS).view(-1, 1)
    return ids, valid


def stage_of_ours(made: Made, number: int | None):
    """(logits, weighted auxiliary loss) of a stage, or of evaluation."""
    routed, config = made.routed, made.config
    ids, valid = batch()
    inputs = {"attention_mask": valid.long(), "use_cache": False}
    if number is None:
        routed.context.mode = "learned"
        return evaluated(routed, ids, inputs), 0.0
    plans = plan_stages(config.trainer, dict.fromkeys(config.trainer.stages, 1000), aux_losses=config.aux_loss)
    enter_stage(routed, config, plans[number].name)
    terms = build_aux(config, routed.plan)
    answer = valid & (torch.arange(ids.shape[1]) >= torch.tensor(PROMPTS).view(-1, 1))
    task_N = facts(ids, TASKS, valid).domain_N
    given = replace(facts(ids, DOMAINS, valid), task_N=task_N, supervised_N=answer.reshape(-1))
    with routed.context.open(given) as records:
        logits, total = routed.model(ids, **inputs).logits, 0.0
        for name in plans[number].aux_losses:
            loss = terms[name].loss
            total = total + terms[name].weight * loss(records, given, loss.statistics(records, given))
    return logits, total


def evaluated(routed: RoutedModel, ids, inputs):
    """Logits of all rows; each is answered as an example of its task, whose prompt ends where its own does."""
    rows = []
    for row, (task, domain, prompt) in enumerate(zip(TASKS, DOMAINS, PROMPTS, strict=True)):
        with torch.no_grad(), routed.context.serving(task=task, domain=domain, prompt=prompt):
            rows.append(routed.model.eval()(ids, **inputs).logits[row])
    return torch.stack(rows)


def case_of(made: Made, base: torch.nn.Module, number: int | None) -> Case:
    tensors = {name: t.detach().clone().requires_grad_() for name, t in made.routed.tensors().items()}
    ids, valid = batch()
    adapters = tuple(adapter.modules for adapter in made.adapters)
    domains = len(domains_of(made.config))
    experts, rows = made.config.experts, (ids, valid, DOMAINS, TASKS, PROMPTS)
    return Case(copy.deepcopy(base), tensors, *rows, domains, experts.rank, experts.alpha, adapters, number)


def assert_is_as_written(recipe: str, kind: str, folder, *overrides: str) -> None:
    """Fail where the recipe, with overrides, is not its twin."""
    twin = twin_of(recipe)
    base = KINDS[kind].make(**SHAPES[kind]).double()
    made = make(recipe, kind, folder, "experts.dropout=0", *overrides, **SHAPES[kind])
    made.routed.model.double()
    begin_again(made)
    # small enough that some tokens are undecided
    stir(made.routed, routers=0.3, experts=not made.adapters)
    stages = made.config.trainer.stages
    assert [set(stage.train) for stage in stages.values()] == [set(groups) for groups in twin.trains]
    check_rates(made, twin)
    _, valid = batch()
    for number in [*range(len(stages)), None]:
        case = case_of(made, base, number)
        ours, theirs = stage_of_ours(made, number), twin(case)
        torch.testing.assert_close(ours[0][valid], theirs[0][valid], rtol=1e-6, atol=1e-6)
        if number is not None:
            torch.testing.assert_close(*(torch.as_tensor(value).double() for value in (ours[1], theirs[1])))
            check_gradients(made, case, ours, theirs, valid)


def begin_again(made: Made) -> None:
    """What experts measure of the base they measured in float32. Then values that training could have led to."""
    generator = torch.Generator().manual_seed(7)
    for layer in made.routed.layers.values():
        layer.bank.begin(layer.base)
        magnitude = getattr(layer.bank, "magnitude", None)
        if magnitude is not None:
            magnitude.data.mul_(1.0 + 0.2 * torch.rand(magnitude.shape, generator=generator))
    for parameter in made.routed.groups.get("base", {}).values():
        parameter.data.mul_(1.0 + 0.2 * torch.rand(parameter.shape, generator=generator))


def check_gradients(made: Made, case: Case, mine, theirs, valid) -> None:
    """Of the logits and of the auxiliary loss apart, so that the smaller is not lost in the larger."""
    named = {n: p for members in made.routed.groups.values() for n, p in members.items() if p.requires_grad}
    twins = [case.tensors[name] for name in named]
    probe = torch.randn(mine[0].shape, generator=torch.Generator().manual_seed(6), dtype=torch.float64)[valid]
    unused = set(named)  # some learn from the auxiliary loss alone
    for which, (one, other) in enumerate(zip(mine, theirs, strict=True)):
        one, other = (torch.as_tensor(value) for value in (one, other))
        if which == 0:
            one, other = (one[valid] * probe).sum(), (other[valid] * probe).sum()
        if not one.requires_grad:
            assert not other.requires_grad
            continue
        found = torch.autograd.grad(one, list(named.values()), retain_graph=True, allow_unused=True)
        wanted = torch.autograd.grad(other, twins, retain_graph=True, allow_unused=True)
        for name, gradient, twin in zip(named, found, wanted, strict=True):
            if twin is not None:
                unused.discard(name)
            gradient, twin = (torch.zeros_like(named[name]) if value is None else value for value in (gradient, twin))
            scale = float(twin.abs().max()) if twin.numel() else 0.0
            # norms and scans of the base compute in float32, whatever the model's dtype
            tolerance = {"rtol": 0, "atol": 1e-5 * scale + 1e-12, "msg": lambda m, n=name: f"{n}: {m}"}
            torch.testing.assert_close(gradient.double(), twin.double(), **tolerance)
    assert not unused, f"the paper has nothing that {sorted(unused)[0]} would be used for"


def check_rates(made: Made, twin: Twin) -> None:
    """Learning rates of the experts' parameters, over the stage's."""
    config, groups = made.config, made.routed.groups
    names = {id(p): name for name, p in groups["experts"].items()}
    for plan in plan_stages(config.trainer, dict.fromkeys(config.trainer.stages, 1000), aux_losses=config.aux_loss):
        if "experts" not in plan.train:
            continue
        for group in build_optimizer(config.trainer, plan, groups).param_groups:
            for name in [names[id(p)] for p in group["params"] if id(p) in names]:
                wanted = next((rate for end, rate in twin.rates.items() if name.endswith(end)), 1.0)
                assert group["peak_lr"] == pytest.approx(plan.lr * wanted), name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("recipe", RECIPE_NAMES)
def test_a_recipe_is_what_its_paper_says(recipe, kind, tmp_path):
    assert_is_as_written(recipe, kind, tmp_path)


@pytest.mark.parametrize(
    ("recipe", "change"),
    [
        ("mola", "aux_loss.load_balance.make.pool=site"),
        ("mola", "experts.layout=8642"),
        ("loramoe", "aux_loss.localized_balance.make.delta=0.12"),
        ("dynmole", "router.make.train.weight=renormalised"),
        ("dynmole", "aux_loss.routing_entropy.weight=0.011"),
        ("adamole", "experts.sites=[attn_in]"),
        ("hydralora", "experts=default"),
        ("meteora", "router.top_k=3"),
        ("rslora", "experts.scale=alpha_over_rank"),
        ("lora_plus", "trainer.up_lr_ratio=16"),
        ("lora", "experts.sites=all_linear"),
        ("mixlora", "experts.mixing=delta"),
        ("mixlora", "aux_loss.load_balance.make.share=per_pick"),
        ("mixlora_dora", "aux_loss.load_balance.make.pool=sample"),
        ("llava_mole", "aux_loss.load_balance.make.pool=model"),
        ("llava_mole", "router.make.score.bias=false"),
        ("xlora", "router.make.temperature=1.1"),
        ("lora_per_task", "router.make.origin=domain"),
        ("moelora_task", "experts.scale=alpha_over_sqrt_rank"),
        ("moelora_task", "router.make.temperature=2"),
        ("dora", "experts.scale=alpha_over_sqrt_rank"),
        ("pissa", "experts.sites=all_linear"),
        ("full_finetune", "trainer.stages.again={train: [base]}"),
        ("mole", "router.make.learn_temperature=false"),
        ("mole", "aux_loss.neg_log_mean.make.tokens=valid"),
    ],
)
def test_a_wrong_recipe_is_found_out(recipe, change, tmp_path):
    with pytest.raises((AssertionError, KeyError)):
        assert_is_as_written(recipe, "llama", tmp_path, change)


def test_a_recipe_without_a_twin_is_told_where_to_write_one():
    with pytest.raises(pytest.fail.Exception, match=r"recipes/new.yaml has no slow twin.*tests/twins"):
        twin_of("new")


def test_no_twin_is_left_over():
    assert set(all_twins()) <= set(RECIPE_NAMES)
