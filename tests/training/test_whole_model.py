"""Training the base itself: a plain loop gives the same, a run goes on exactly, what it leaves is the whole model."""

import copy
import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from loramoe_train.build import RoutedModel, attach
from loramoe_train.errors import ConfigError, SavedOnSignal
from loramoe_train.experts.adapters import load_weights, read_manifest, read_weights, save_adapter
from loramoe_train.experts.compiled import compile_layers
from loramoe_train.export import export
from loramoe_train.models import load_model, original_weights
from loramoe_train.planning import make_counts
from loramoe_train.settle import settle
from loramoe_train.training.checkpoint import find_latest
from loramoe_train.training.loss import predicting
from loramoe_train.training.parts import TrainingParts
from tests.cli import SMALL
from tests.composing import composed
from tests.conftest import make_llama
from tests.forks import run_forked
from tests.training.harness import TASKS, VOCABULARY, MadeUpData, make_batch, make_trainer, train, weights
from tests.training.test_resume import stopped_at

FULL = ("+recipe=full_finetune",)
STAGES = {"first": {"train": ["base"], "steps": 4}}
TRAINER = {"lr": 1e-3, "log_every": 1, "stages": STAGES}


def make_whole(dtype: torch.dtype = torch.float32) -> RoutedModel:
    model = make_llama(vocab_size=VOCABULARY, seed=3, tie_word_embeddings=True).to(dtype)
    return attach(composed(*FULL), model, {}, num_domains=len(TASKS))


def make_parts(whole: RoutedModel) -> TrainingParts:
    def save(folder: Path, tensors: Mapping[str, Tensor]) -> None:
        save_adapter(folder, tensors, whole.plan, {"base": {}, "domains": list(TASKS)})

    return TrainingParts(
        model=whole.model,
        context=whole.context,
        groups=whole.groups,
        sites=(),
        aux={},
        stage_data=lambda name: MadeUpData(8, 4),
        validation={task: [make_batch([900 + i])] for i, task in enumerate(TASKS)},
        task_names=TASKS,
        adapter_tensors=whole.tensors,
        save_adapter=save,
        load_adapter=lambda folder: load_weights(
            whole.tensors(), read_weights(folder, read_manifest(folder)), "resume"
        ),
    )


def test_it_trains_as_a_plain_loop_does(tmp_path: Path) -> None:
    """Four steps of AdamW in float64 on every weight, tied head included, in two micro-batches or in one."""
    whole = make_whole(torch.float64)
    twin = copy.deepcopy(whole.model).train().requires_grad_(True)
    trainer = make_trainer(**TRAINER, schedule="constant", warmup_fraction=0.0, clip_norm=1e9)
    train(make_parts(whole), trainer, tmp_path)
    optimizer, losses = torch.optim.AdamW(twin.parameters(), lr=1e-3, weight_decay=0.0), []
    for step in range(4):
        batch = make_batch(range(8 * step, 8 * step + 8))
        logits = twin(input_ids=batch.input_ids, attention_mask=batch.valid.long(), use_cache=False).logits
        keep = predicting(batch)
        loss = F.cross_entropy(logits[keep], batch.labels.roll(-1, dims=1)[keep])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    start = dict(make_llama(vocab_size=VOCABULARY, seed=3, tie_word_embeddings=True).named_parameters())
    for name, parameter in twin.named_parameters():
        assert (parameter - start[name]).abs().max() > 1e-3, name
        torch.testing.assert_close(whole.model.get_parameter(name), parameter, rtol=1e-6, atol=1e-9)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["loss"] for line in lines if line["kind"] == "train"] == pytest.approx(losses)
    assert lines[0]["lr"].keys() == {"base"} == lines[0]["grad_norm"].keys()


def test_a_stopped_run_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    plain = make_parts(make_whole())
    train(plain, make_trainer(**TRAINER), tmp_path / "whole")
    with pytest.raises(SavedOnSignal, match="after step 2"):
        train(stopped_at(make_parts(make_whole()), 1), make_trainer(**TRAINER), tmp_path / "cut")
    again = make_parts(make_whole())
    train(again, make_trainer(**TRAINER), tmp_path / "cut", resume=find_latest(tmp_path / "cut"))
    expected = weights(plain)
    assert all(torch.equal(value, expected[name]) for name, value in weights(again).items()) and len(expected) > 10
    stored = load_file(find_latest(tmp_path / "cut") / "adapter.safetensors")
    assert stored.keys() == expected.keys() and "model.embed_tokens.weight" in stored


@pytest.mark.nightly
def test_compiled_layers_give_the_same_gradients() -> None:
    whole = make_whole()
    whole.model.train().requires_grad_(True)
    ids, seen = torch.arange(12).view(2, 6), []
    for compiled in (False, True):
        if compiled:
            torch._dynamo.reset()
            compile_layers(whole.model.model.layers, (), backend="aot_eager")
        whole.model(ids, use_cache=False).logits.square().mean().backward()
        seen.append({name: p.grad for name, p in whole.model.named_parameters()})
        whole.model.zero_grad(set_to_none=True)
    torch._dynamo.reset()
    for name, gradient in seen[0].items():
        assert gradient.abs().sum() > 0, name
        torch.testing.assert_close(seen[1][name], gradient, rtol=1e-4, atol=1e-7)


def test_for_a_while_it_has_its_original_weights(tiny_model_dir: Path) -> None:
    config = composed(*FULL, "model=custom", "model.name=x", f"model.path={tiny_model_dir}").model
    model = load_model(config)
    before = {name: p.clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    trained = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(KeyError, match="inside"), original_weights(model, config):
        assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
        raise KeyError("inside")
    assert all(torch.equal(p, trained[name]) for name, p in model.named_parameters())


def test_the_plan_counts_the_base_as_trained() -> None:
    counts, plan, _, _ = make_counts(composed(*FULL))
    assert counts.trained == counts.base == counts.total > 1_000_000 and not plan and counts.active == 0


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ("experts=default",),
            "trainer.stages.train: the base trains only without experts, and here a layer gets 8; set experts=none",
        ),
        (("experts.adapters=[a,b]",), "the base trains only without experts"),
        (("experts.plain={sites: [ffn], rank: 2, alpha: 4}",), "experts.plain cannot stand beside a base that trains"),
        (("router=soft",), "router.make chooses among experts, and experts.layout=0 gives none; set router=none"),
        (("model.quantization=nf4",), "model.quantization=nf4: packed weights cannot train"),
        (("model.dtype=bfloat16",), "model.dtype=bfloat16: what trains is kept in float32.*mixed_precision=bf16"),
        (("trainer.stages={a: {train: [base, experts]}}",), r"trainer.stages.a.train=.*leaves the base alone"),
        (("trainer.stages={a: {train: [experts]}}",), "experts.layout=0 gives no layer an expert"),
        (("trainer.stages={a: {train: [base], anchor: 0.1}}",), "the stage does not train the experts"),
    ],
)
def test_what_does_not_go_with_it(overrides: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        settle(composed(*FULL, *overrides), check_files=False)


@pytest.mark.slow
def test_a_run_leaves_the_whole_model_and_a_new_process_scores_it_alike(tmp_path: Path) -> None:
    run_dir, task = tmp_path / "run", ("eval.limit=8", "eval.tasks=[tiny_grammar]")
    arguments = (*FULL, *SMALL, *task, "trainer.max_steps=20", "data.max_examples=8", "data.tasks=[tiny_grammar]")
    done = run_forked("train", *arguments, f"run_dir={run_dir}", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    log = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in log if line["kind"] == "train"]
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])
    before = json.loads((run_dir / "results.json").read_text())["scores"]["tiny_grammar"]
    assert before["base_metrics"] != before["tuned_metrics"]
    done = run_forked("eval", str(run_dir), *task, f"run_dir={tmp_path / 'again'}", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    again = json.loads((tmp_path / "again" / "results.json").read_text())["scores"]["tiny_grammar"]
    for side in ("base_metrics", "tuned_metrics"):
        assert again[side] == before[side], side
    with pytest.raises(ConfigError, match="no LoRA in it"):
        export([str(run_dir), str(tmp_path / "folder")])
