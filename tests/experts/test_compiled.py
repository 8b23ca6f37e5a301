"""Compiled decoder layers against the same layers uncompiled: one graph, the same numbers, no compilation after the
first passes."""

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from loramoe_train.errors import ConfigError
from loramoe_train.experts.compiled import compile_layers
from loramoe_train.models.loading import checkpoint_activations
from loramoe_train.training.compiling import compile_errors
from tests.recipe_passes import CASES, check_reached, enter_stage, make_routed, one_pass, unlike_cases
from tests.test_routed_model import ids_of
from tests.training.harness import make_trainer

SHAPES = ((3, 6), (2, 9), (5, 4))  # rows, positions


@pytest.fixture(autouse=True)
def _nothing_compiled():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def compilations() -> int:
    return counters["stats"]["unique_graphs"]


def compiled_and_not(recipe, folder, *overrides, backend="aot_eager", **changes):
    """((routed, config) uncompiled, the same compiled)."""
    pair = []
    for number in range(2):
        own = folder / str(number)
        own.mkdir()
        pair.append(make_routed(recipe, "llama", own, *overrides, **changes))
    compile_all(pair[1][0], backend)
    return pair


def compile_all(routed, backend):
    """As a run does it."""
    deciding = (*routed.layers.values(), *routed.blocks.values())
    compile_layers(routed.model.model.layers, deciding, backend=backend)


def check_same(plain, compiled, *, rtol=1e-4, atol=1e-6):
    """Within float32's rounding: the compiler multiplies and adds in another order."""
    torch.testing.assert_close(compiled.loss, plain.loss, rtol=1e-5, atol=0)
    assert plain.gradients.keys() == compiled.gradients.keys()
    for name, gradient in plain.gradients.items():
        scale = float(gradient.abs().max()) if gradient.numel() else 0.0
        torch.testing.assert_close(
            compiled.gradients[name], gradient, rtol=rtol, atol=atol + rtol * scale, msg=lambda m, n=name: f"{n}: {m}"
        )
    for site, weights in plain.records.items():
        torch.testing.assert_close(compiled.records[site], weights, rtol=1e-4, atol=1e-6)


# a graph for backward, too, takes thrice as long to make
WITH_BACKWARD = ("lora, train", "lora_mixer, experts", "lora_mixer, routers")

# of the other kinds of layer code: a decision for several linears, one with a switch
ALWAYS = (*WITH_BACKWARD[1:], "mixlora, train", "dynmole, train")
ALL = [
    pytest.param(case, marks=() if case in ALWAYS else pytest.mark.nightly)
    for case in dict.fromkeys([*ALWAYS, *unlike_cases()])
]


@pytest.mark.slow
@pytest.mark.parametrize("case", ALL)
def test_every_recipe_gives_the_same_in_one_graph_compiled_once(case, tmp_path):
    recipe, stage = CASES[case]
    plain, compiled = compiled_and_not(recipe, tmp_path, backend="aot_eager" if case in WITH_BACKWARD else "eager")
    after = []
    for rows, length in SHAPES:
        results = []
        for routed, config in (plain, compiled):
            enter_stage(routed, config, stage)
            results.append(one_pass(routed, config, stage, rows=rows, length=length))
        check_reached(results[1])
        check_same(*results)
        after.append(compilations())
    assert not counters["graph_break"]
    # without gradient, once for layers that are alike; with it where the input has none (first layer); with it; and a
    # first pass with the experts off
    shapes = {}
    for spec in compiled[0].plan.values():
        shapes.setdefault(spec.site.layer, []).append((spec.site.kind, spec.ranks))
    kinds = len({str(shape) for shape in shapes.values()})
    assert after == [2 + kinds + (config.router.scope == "model")] * 3


@pytest.mark.slow
def test_layers_that_are_alike_share_their_code_and_stages_follow_each_other(tmp_path):
    """Five layers take no more compilations than two, in either stage; the second stage trains other parameters."""
    plain, compiled = compiled_and_not("lora_mixer", tmp_path, backend="eager", num_hidden_layers=5)
    seen = []
    for stage in ("experts", "routers"):
        for _ in range(2):
            results = []
            for routed, config in (plain, compiled):
                enter_stage(routed, config, stage)
                results.append(one_pass(routed, config, stage))
            check_same(*results)
            seen.append(compilations())
    assert seen == [3, 3, 6, 6] and not counters["graph_break"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param(
            ("experts.layout=2444", "router.top_k=2", "experts.sites=all_linear"),
            id="layers that differ",
            marks=pytest.mark.nightly,
        ),
        pytest.param(("experts.rank=16", "experts.layout=16"), id="grouped uncompiled"),
    ],
)
def test_sparse_routing_in_other_layouts(overrides, tmp_path):
    plain, compiled = compiled_and_not("lora_mixer", tmp_path, "router=topk", *overrides, backend="eager")
    for _ in range(2):
        results = []
        for routed, config in (plain, compiled):
            enter_stage(routed, config, "routers")
            results.append(one_pass(routed, config, "routers", rows=8, length=12))  # enough tokens for grouping
        check_same(*results)
    assert not counters["graph_break"]


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.nightly)])
def test_with_checkpointing_around_it(backend, tmp_path):
    recipe, stage = CASES["lora_mixer, routers"]
    (tmp_path / "other").mkdir()
    plain, config = make_routed(recipe, "llama", tmp_path)
    routed, _ = make_routed(recipe, "llama", tmp_path / "other")
    checkpoint_activations(routed.model)
    compile_all(routed, backend)
    runs = []
    call = routed.model.model.layers[0]._compiled_call_impl
    inner = call.compiled
    call.compiled = lambda *args, **kwargs: (runs.append(torch.is_grad_enabled()), inner(*args, **kwargs))[1]
    for model in (plain, routed):
        enter_stage(model, config, stage)
    check_same(one_pass(plain, config, stage), one_pass(routed, config, stage))
    assert runs == [False, True, True]  # statistics, forward, recomputation
    before = compilations()
    one_pass(routed, config, stage, rows=2, length=9)
    assert compilations() == before and not counters["graph_break"]


def test_evaluation_is_not_compiled_and_names_stay(tmp_path):
    (plain, _), (compiled, _) = compiled_and_not("lora_mixer", tmp_path, backend="eager")
    ids = ids_of()
    with torch.no_grad():
        assert torch.equal(plain.model.eval()(ids).logits, compiled.model.eval()(ids).logits)
        compiled.model.generate(ids, max_new_tokens=3, do_sample=False)
    assert compilations() == 0
    assert list(plain.model.state_dict()) == list(compiled.model.state_dict())
    assert [name for name, _ in plain.model.named_modules()] == [name for name, _ in compiled.model.named_modules()]


def test_what_cannot_be_compiled_is_one_line():
    class Breaks(nn.Module):
        def forward(self, x):
            torch._dynamo.graph_break()
            return x + 1

    layers = nn.ModuleList([Breaks()])
    compile_layers(layers, (), backend="eager")
    with (
        pytest.raises(ConfigError, match=r"stage a, step 1: trainer.compile=true .*set trainer.compile=false") as info,
        compile_errors("stage a, step 1", make_trainer(compile=True)),
    ):
        layers[0](torch.ones(1))
    assert "\n" not in str(info.value)
