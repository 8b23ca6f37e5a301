"""Whole tiny runs."""

import io
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from loramoe_train.errors import ConfigError, DataError, DivergedError, LoramoeError, OutOfMemoryError
from loramoe_train.experts.plan import ExpertSpec
from loramoe_train.routers.router import Policy, Router
from loramoe_train.routing.layers import layer_of
from loramoe_train.training.checkpoint import fault, find_latest
from loramoe_train.training.memory import memory_errors
from loramoe_train.training.parts import StageData, TrainingParts
from loramoe_train.training.step import autocast
from tests.training.harness import (
    TASKS,
    MadeUpData,
    make_batch,
    make_parts,
    make_router,
    make_trainer,
    train,
    weights,
)


def read(run_dir: Path, kind: str) -> list[dict]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


def kept(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


def repeating(parts: TrainingParts) -> TrainingParts:
    """The same eight examples in every step."""

    class Same(MadeUpData):
        def steps(self, *, start: int, stop: int, **_: int):
            return ([make_batch(list(range(8)))] for _ in range(start, stop))

    return replace(parts, stage_data=lambda name: Same(8, 8))


def test_two_stages(tmp_path: Path) -> None:
    parts, moved, output = make_parts(), {}, io.StringIO()
    before = weights(parts)
    made = parts.stage_data

    def stage_data(name: str) -> StageData:
        moved[name] = {n for n, value in weights(parts).items() if not torch.equal(value, before[n])}
        return made(name)

    console = Console(file=output, width=160)
    summary = train(replace(parts, stage_data=stage_data), make_trainer(), tmp_path, console=console)
    assert moved["first"] == set() and moved["second"] == set(parts.groups["experts"])  # hard routing trains no router
    assert {n for n, v in weights(parts).items() if not torch.equal(v, before[n])} == set(before)
    assert parts.context.mode == "learned" and not parts.context.is_open

    assert [(s.name, s.steps, s.stopped_early) for s in summary.stages] == [("first", 3, False), ("second", 3, False)]
    assert summary.steps == 6 and summary.last_checkpoint.name == "step_000006" and summary.warnings == ()
    json.dumps(summary.plain(), allow_nan=False)
    first, second = read(tmp_path, "train")[0], read(tmp_path, "train")[-1]
    assert set(first["lr"]) == {"experts"} and set(second["lr"]) == {"experts", "routers"}
    assert "aux" not in first and set(second["aux"]) == {"balance", "special"} and second["anchor"]["raw"] > 0
    assert set(second["task_loss"]) == set(TASKS)
    hard = read(tmp_path, "routing")[0]["layers"]["model.layers.1"]
    assert hard == {TASKS[i]: [float(i == e) for e in range(3)] for i in range(3)}
    shown = output.getvalue()
    assert "stage first: 3 steps, trains experts, routing by_domain" in shown
    assert "second 2/3 (67%)  loss 4." in shown and "eval loss 4." in shown and "3/3" in shown  # plain lines, no bar


def test_a_bar_on_a_terminal(tmp_path: Path) -> None:
    output = io.StringIO()
    console = Console(file=output, width=160, force_terminal=True)
    train(make_parts(), make_trainer(), tmp_path, console=console)
    assert "tokens/s" in output.getvalue() and "3/3" in output.getvalue() and "(67%)" not in output.getvalue()


def test_training_lowers_the_loss(tmp_path: Path) -> None:
    trainer = make_trainer(stages={"s": {"steps": 30}}, lr=2e-2, log_every=1)
    train(repeating(make_parts(fresh=True)), trainer, tmp_path)
    losses = [line["loss"] for line in read(tmp_path, "train")]
    assert losses[-1] < losses[0] - 0.1


def test_the_evaluation_is_that_of_the_stage_s_routing(tmp_path: Path) -> None:
    """By hand: mean over the supervised tokens of the held-out batches, hard routing in the first stage."""
    parts = make_parts()
    trainer = make_trainer(stages={"first": {"train": ["experts"], "routing": "by_domain", "steps": 1}})
    train(parts, trainer, tmp_path)
    parts.model.eval()
    total, tokens = 0.0, 0
    for batches in parts.validation.values():
        for batch in batches:
            with torch.no_grad(), parts.context.open(batch.tokens()):
                logits = parts.model(input_ids=batch.input_ids, attention_mask=batch.valid.long()).logits
            for b, s in (batch.labels[:, 1:] != -100).nonzero().tolist():
                total -= float(logits[b, s].log_softmax(-1)[batch.labels[b, s + 1]])
                tokens += 1
    (line,) = read(tmp_path, "eval")
    assert parts.context.mode == "by_domain" and line["loss"] == pytest.approx(total / tokens, rel=1e-5)
    assert set(line["task_loss"]) == set(TASKS)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_the_routing_of_held_out_examples_is_that_of_inference(tmp_path: Path, precision: str) -> None:
    """By hand: each task's sum of weights with the model as it is in evaluation, the mean over a layer's sites."""

    def one_expert_at_inference(spec: ExpertSpec, device: torch.device) -> Router:
        router = make_router(spec, device)
        best = Policy(lambda p_NE: p_NE == p_NE.amax(dim=-1, keepdim=True))
        return Router(score=router.score, train=router.policies[True], evaluate=best)

    parts = make_parts(router=one_expert_at_inference)
    trainer = make_trainer(stages={"s": {"steps": 2}}, mixed_precision=precision)
    train(parts, trainer, tmp_path)
    (line,), (in_training,) = read(tmp_path, "eval_routing"), read(tmp_path, "routing")
    assert line["layers"] != in_training["layers"] and line["sites"].keys() == in_training["sites"].keys()
    parts.model.eval()
    by_layer: dict[str, dict[str, list[torch.Tensor]]] = {}
    for task, (batch,) in parts.validation.items():
        cpu = torch.device("cpu")
        with torch.no_grad(), parts.context.open(batch.tokens()) as records, autocast(cpu, trainer):
            parts.model(input_ids=batch.input_ids, attention_mask=batch.valid.long())
            for site, routing in records.items():
                use_E = routing.weights_NE[batch.tokens().valid_N].double().sum(dim=0)
                by_layer.setdefault(layer_of(site), {}).setdefault(task, []).append(use_E / use_E.sum())
    assert set(line["layers"]) == set(by_layer) and line["stage"] == "s" and line["step"] == 2
    for layer, tasks in by_layer.items():
        for task, shares in tasks.items():
            mean = torch.stack(shares).mean(dim=0).tolist()
            assert line["layers"][layer][task] == pytest.approx(mean, abs=2e-5)
            assert max(mean) - min(mean) > 1e-3  # even loads would prove nothing


def test_rotation_keeps_best_and_stage_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from loramoe_train.training import stage_run
    from loramoe_train.training.validation import EvalResult

    curve = iter([3.0, 2.0, 4.0, 4.0, 9.0, 8.0, 9.0, 9.0])  # best at 2 in the first stage, at 6 in the second
    monkeypatch.setattr(stage_run, "evaluate", lambda *a, **k: EvalResult(next(curve), {}))
    stages = {"a": {"steps": 4}, "b": {"steps": 4}}
    trainer = make_trainer(stages=stages, eval_every=1, checkpoint_every=1, keep=1)
    summary = train(make_parts(), trainer, tmp_path)
    # bests 2 and 6, ends 4 and 8, and the newest of the others
    assert kept(tmp_path) == [f"step_00000{step}" for step in (2, 4, 6, 7, 8)]
    assert summary.best_checkpoint.name == "step_000006" and summary.stages[0].best_step == 2
    assert all(fault(tmp_path / "checkpoints" / name) is None for name in kept(tmp_path))


def test_early_stopping_ends_the_stage_not_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from loramoe_train.training import stage_run
    from loramoe_train.training.validation import EvalResult

    #               a: gain, gain too small, worse -> stop after 3   b: always better
    curve = iter([3.0, 2.95, 3.1, 5.0, 4.0, 3.0, 2.0])
    monkeypatch.setattr(stage_run, "evaluate", lambda *a, **k: EvalResult(next(curve), {}))
    stages = {"a": {"steps": 10}, "b": {"steps": 4}}
    trainer = make_trainer(stages=stages, eval_every=1, early_stopping={"patience": 2, "min_delta": 0.1})
    summary = train(make_parts(), trainer, tmp_path)
    assert [(s.steps, s.stopped_early) for s in summary.stages] == [(3, True), (4, False)]
    assert summary.stages[0].best_step == 2  # the lowest, however small the gain
    assert [line["step"] for line in read(tmp_path, "eval")] == [1, 2, 3, 11, 12, 13, 14]  # planned numbers
    assert summary.last_checkpoint.name == "step_000014" and summary.steps == 7


def test_early_stopping_without_evaluation(tmp_path: Path) -> None:
    trainer = make_trainer(early_stopping={"patience": 1})
    with pytest.raises(ConfigError, match="trainer.early_stopping needs an evaluation loss"):
        train(make_parts(validation=False), trainer, tmp_path)


def test_no_validation(tmp_path: Path) -> None:
    summary = train(make_parts(validation=False), make_trainer(), tmp_path)
    assert summary.best_checkpoint is None and summary.stages[0].eval_loss is None and not read(tmp_path, "eval")


def test_nothing_supervised_in_the_evaluation(tmp_path: Path) -> None:
    parts = make_parts()
    empty = replace(make_batch([0]), labels=torch.full((1, 12), -100))
    with pytest.raises(DataError, match=r"no token of the evaluation carries loss \(tasks: adding\)"):
        train(replace(parts, validation={"adding": [empty]}), make_trainer(), tmp_path)


def test_deterministic_algorithms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    try:
        train(make_parts(dropout=0.1), make_trainer(deterministic=True), tmp_path)  # nothing in a run is refused
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


def test_numbers_are_read_a_step_later_unless_something_is_due(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from loramoe_train.training.outcome import Unread

    events, read_numbers = [], Unread.read

    def note(self: Unread):
        events.append(f"read {self._step}")
        return read_numbers(self)

    class Noted(MadeUpData):
        def steps(self, **which):
            for step, batches in enumerate(super().steps(**which)):
                events.append(f"step {step}")
                yield batches

    monkeypatch.setattr(Unread, "read", note)
    trainer = make_trainer(stages={"s": {"steps": 6}}, log_every=3, checkpoint_every=4)
    train(replace(make_parts(validation=False), stage_data=lambda name: Noted(8, 8)), trainer, tmp_path)
    first = ["step 0", "step 1", "read 0", "step 2", "read 1", "read 2"]  # log
    assert events == [*first, "step 3", "read 3", "step 4", "step 5", "read 4", "read 5"]  # checkpoint, end
    assert [line["step"] for line in read(tmp_path, "train")] == [3, 6]


def test_divergence_between_lines_of_the_log(tmp_path: Path) -> None:
    """The step after it is queued before its numbers are read; it is named, and nothing has moved since."""
    parts, seen = make_parts(), {}

    class Poisoned(MadeUpData):
        def steps(self, **which):
            for step, batches in enumerate(super().steps(**which)):
                seen[step] = weights(parts)
                norm = parts.model.model.norm.weight.data
                norm.fill_(float("inf") if step == 1 else 1.0)
                yield batches

    bad = replace(parts, stage_data=lambda name: Poisoned(8, 4))
    with pytest.raises(DivergedError, match="stage s, step 2: loss of task adding is nan"):
        train(bad, make_trainer(stages={"s": {"steps": 9}}, log_every=9), tmp_path)
    assert sorted(seen) == [0, 1, 2]
    assert not all(torch.equal(seen[1][name], value) for name, value in seen[0].items())
    assert all(torch.equal(value, seen[1][name]) for name, value in weights(parts).items())


def test_divergence_keeps_the_last_checkpoint(tmp_path: Path) -> None:
    parts = make_parts()

    class Poisoned(MadeUpData):
        def steps(self, **which):
            for step, batches in enumerate(super().steps(**which)):
                if step == 2:
                    with torch.no_grad():
                        parts.model.model.norm.weight.fill_(float("inf"))
                yield batches

    bad = replace(parts, stage_data=lambda name: Poisoned(8, 4))
    with pytest.raises(DivergedError, match="stage first, step 3: loss of task adding is nan"):
        train(bad, make_trainer(checkpoint_every=2), tmp_path)
    assert kept(tmp_path) == ["step_000002"] and find_latest(tmp_path) is not None
    assert json.loads((tmp_path / "diverged.json").read_text())["stage"] == "first"


def test_a_full_disk(tmp_path: Path) -> None:
    import errno
    import os

    parts, saves = make_parts(), []

    def save_adapter(folder: Path, tensors: Mapping[str, torch.Tensor]) -> None:
        saves.append(folder)
        if len(saves) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        parts.save_adapter(folder, tensors)

    with pytest.raises(LoramoeError, match=r"No space left on device\); the former checkpoints are intact"):
        train(replace(parts, save_adapter=save_adapter), make_trainer(checkpoint_every=1), tmp_path)
    assert kept(tmp_path) == ["step_000001"] and find_latest(tmp_path) is not None


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_out_of_memory(error: Exception, tmp_path: Path) -> None:
    parts = make_parts()

    def fail(x: torch.Tensor) -> torch.Tensor:
        if parts.context.is_open:
            raise error
        return x

    parts.model.model.norm.forward = fail
    with pytest.raises(OutOfMemoryError, match="stage first, step 1: lower trainer.micro_batch_size .*data.max_length"):
        train(parts, make_trainer(), tmp_path)


def test_a_real_allocation_that_cannot_succeed() -> None:
    with pytest.raises(OutOfMemoryError, match="out of memory in the test"), memory_errors("the test"):
        torch.empty(2**56, dtype=torch.uint8)


def test_other_errors_pass() -> None:
    with pytest.raises(RuntimeError, match="shape"), memory_errors("the test"):
        raise RuntimeError("shape mismatch")


def test_settings_of_the_launcher_are_refused(tmp_path: Path) -> None:
    from accelerate import Accelerator

    from loramoe_train.training.loop import fit

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    with pytest.raises(ConfigError, match="set trainer.mixed_precision, trainer.batch_size"):
        fit(make_parts(), accelerator, make_trainer(), (), run_dir=tmp_path, seed=0)


def test_reentrant_checkpointing_is_refused(tmp_path: Path) -> None:
    parts = make_parts()
    parts.model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": True})
    with pytest.raises(ConfigError, match=r"reentrant way.*set model\.gradient_checkpointing=true"):
        train(parts, make_trainer(), tmp_path)
    parts.model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    train(parts, make_trainer(), tmp_path)
