"""Every shipped recipe on a GPU against the same on the CPU."""

import pytest
import torch

from tests.cli import losses
from tests.composing import RECIPE_NAMES
from tests.gpu.conftest import forget_device
from tests.recipe_passes import CASES, check_reached, enter_stage, make, one_pass
from tests.recipe_runs import differing, get_ready, logits_of, short_run
from tests.test_routed_model import ids_of, stir

pytestmark = pytest.mark.gpu
every_recipe = pytest.mark.parametrize("recipe", RECIPE_NAMES)


@pytest.fixture
def deterministic():
    yield
    torch.use_deterministic_algorithms(False)


def close(ours, theirs, name, *, relative=2e-4):
    """Within what float32 sums in another order differ by, measured against the largest of the tensor. Seen on an H100:
    1.6e-4 at most, of a router's gradient, which is a difference of nearly equal sums."""
    scale = float(theirs.abs().max()) if theirs.numel() else 0.0
    torch.testing.assert_close(ours.cpu(), theirs, rtol=0, atol=relative * scale + 1e-7, msg=lambda m: f"{name}: {m}")


def stirred(recipe, kind, folder, *overrides):
    """Without dropout: the two devices draw other masks."""
    made = make(recipe, kind, folder, "experts.dropout=0", *overrides)
    stir(made.routed)
    return made.routed, made.config


@pytest.mark.parametrize("form", ["concatenated", "grouped"])
@pytest.mark.parametrize("kind", ["llama", "falcon_mamba"])
@pytest.mark.parametrize("case", CASES)
def test_a_training_pass(case, kind, form, tmp_path):
    recipe, stage = CASES[case]
    routed, config = stirred(recipe, kind, tmp_path, f"experts.form={form}")
    enter_stage(routed, config, stage)
    expected = one_pass(routed, config, stage)
    routed.model.cuda()
    ours = one_pass(routed, config, stage)
    check_reached(ours)
    assert all(gradient.is_cuda for gradient in ours.gradients.values())
    close(ours.loss, expected.loss, "loss")
    for name, weights in expected.records.items():
        close(ours.records[name], weights, name)
    assert ours.gradients.keys() == expected.gradients.keys()
    for name, gradient in expected.gradients.items():
        close(ours.gradients[name], gradient, name)


@pytest.mark.parametrize("kind", ["llama", "falcon_mamba"])
@every_recipe
def test_generation_with_a_cache(recipe, kind, tmp_path):
    """Logits of the whole text are the CPU's, and what is generated with a cache is what is generated without."""
    routed, _ = stirred(recipe, kind, tmp_path)
    ids = ids_of(rows=2)
    expected = logits_of(routed, ids)
    routed.model.cuda()
    close(logits_of(routed, ids.cuda()), expected, "logits")
    with torch.no_grad(), routed.context.serving(task=1, domain=1, prompt=ids.shape[1]):
        told = {"max_new_tokens": 5, "do_sample": False}
        spoken = [routed.model.generate(ids.cuda(), use_cache=use, **told) for use in (True, False)]
    assert torch.equal(*spoken) and spoken[0].shape[1] > ids.shape[1]


@every_recipe
def test_a_run_is_the_run_of_a_cpu(recipe, tmp_path):
    """Six steps of the trainer, from the same start: the losses, step by step."""
    for device in ("cpu", "cuda"):
        (tmp_path / device).mkdir()
        config = short_run(recipe, tmp_path / device, "experts.dropout=0")
        forget_device()
        ready = get_ready(config, device)
        ready.train(tmp_path / device / "run")
        assert {tensor.device.type for tensor in ready.weights().values()} == {device}
    expected, ours = (losses(tmp_path / device / "run") for device in ("cpu", "cuda"))
    assert len(expected) == 6 and expected[-1] < expected[0]
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(expected), rtol=2e-3, atol=0)


@every_recipe
def test_resumed_in_the_middle_it_is_the_same_run(recipe, tmp_path, deterministic):
    config = short_run(recipe, tmp_path, "experts.dropout=0.05", "trainer.deterministic=true")
    whole, again = get_ready(config, "cuda"), get_ready(config, "cuda")
    before = whole.weights()
    whole.train(tmp_path / "run")
    torch.manual_seed(7)  # whatever happened in between
    again.train(tmp_path / "again", resume=tmp_path / "run" / "checkpoints" / "step_000002")
    assert differing(before, whole.weights())
    assert differing(whole.weights(), again.weights()) == []
