"""The log: what is cut off, what is kept, what trackers get."""

import json
from pathlib import Path

import pytest
from accelerate import Accelerator

from loramoe_train.errors import ConfigError, LoramoeError
from loramoe_train.training import accelerator as accelerator_module
from loramoe_train.training.accelerator import make_accelerator, start_trackers, wandb_mode
from loramoe_train.training.metrics import Metrics, flat, keep_until, losses
from tests.training.harness import make_parts, make_trainer, train


def test_lines_after_the_resumed_step_are_cut(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path, Accelerator(cpu=True))
    metrics.open()
    for step in (2, 4, 4, 6):
        metrics.write("train", step, "s", {"loss": 1.0 / step})
    metrics.close()
    whole = (tmp_path / "metrics.jsonl").read_text()
    with metrics.path.open("a") as file:
        file.write('{"kind": "train", "step": 3, "lo')
    metrics.open(resumed_at=4)
    metrics.write("train", 5, "s", {"loss": 0.0})
    metrics.close()
    lines = metrics.path.read_text().splitlines()
    assert lines[:3] == whole.splitlines()[:3] and json.loads(lines[3])["step"] == 5 and len(lines) == 4


def test_the_log_says_what_it_was_made_with(tmp_path: Path) -> None:
    def opened(resumed_at: int | None, seed: int, *steps: int) -> list[tuple]:
        metrics = Metrics(tmp_path, Accelerator(cpu=True))
        metrics.open(resumed_at=resumed_at, made_with={"seed": seed, "commit": None})
        for step in steps:
            metrics.write("train", step, "s", {"loss": 1.0, "words": '"kind": "run"'})
        metrics.close()
        found = [json.loads(line) for line in metrics.path.read_text().splitlines()]
        assert all("commit" in line for line in found if line["kind"] == "run")
        return [(line["kind"], line["step"], line.get("seed")) for line in found]

    first = [("run", 0, 1), ("train", 1, None), ("train", 2, None)]
    assert opened(None, 1, 1, 2) == first
    assert opened(2, 1) == first, "the same: nothing new to say"
    assert opened(1, 2, 2) == [*first[:2], ("run", 1, 2), ("train", 2, None)]
    assert opened(2, 2, 3)[-2:] == [("train", 2, None), ("train", 3, None)]
    assert opened(None, 2) == [("run", 0, 2)]


def test_an_unchanged_log_is_not_rewritten(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n')
    before = path.stat().st_ino
    keep_until(path, 1)
    assert path.stat().st_ino == before and path.read_text() == '{"step": 1}\n'


def test_a_new_run_starts_a_new_log(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    metrics = Metrics(tmp_path, Accelerator(cpu=True))
    metrics.open()
    metrics.close()
    assert (tmp_path / "metrics.jsonl").read_text() == ""


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(LoramoeError, match=r"metrics\.jsonl cannot be written .*choose another run_dir"):
        Metrics(tmp_path / "file", Accelerator(cpu=True)).open()


def test_losses_are_weighted_by_tokens() -> None:
    assert losses({"a": (6.0, 2.0), "b": (4.0, 8.0), "c": (0.0, 0.0)}) == {
        "loss": 1.0,
        "task_loss": {"a": 3.0, "b": 0.5},
    }
    assert losses({"a": (0.0, 0.0)}) == {"loss": None, "task_loss": {}}


def test_flat() -> None:
    assert flat({"a": {"b": 1, "c": "x"}, "d": 2.5, "e": [1], "f": True}, "p/") == {"p/a/b": 1, "p/d": 2.5}


def test_a_line_is_the_mean_of_its_window(tmp_path: Path) -> None:
    """Logging every step or every other one tells the same, weighted by supervised tokens."""
    found = {}
    for every in (1, 2):
        run_dir = tmp_path / str(every)
        train(make_parts(), make_trainer(stages={"s": {"steps": 4}}, log_every=every), run_dir)
        lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
        found[every] = [line for line in lines if line["kind"] == "train"]
    assert [line["step"] for line in found[1]] == [1, 2, 3, 4] and [line["step"] for line in found[2]] == [2, 4]
    for pair, line in zip((found[1][:2], found[1][2:]), found[2], strict=True):
        assert min(p["loss"] for p in pair) < line["loss"] < max(p["loss"] for p in pair)
        mean = sum(p["aux"]["balance"]["raw"] for p in pair) / 2
        assert line["aux"]["balance"]["raw"] == pytest.approx(mean)
        assert line["aux"]["balance"]["weighted"] == pytest.approx(0.1 * mean)
        assert line["lr"] == pair[1]["lr"] and line["grad_norm"] == pair[1]["grad_norm"]
        assert line["timing"]["tokens_per_second"] > 0 and line["timing"]["memory_gib"] > 0


def test_wandb_is_offline_without_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(accelerator_module, "_key_in_netrc", lambda: False)
    assert wandb_mode() == "offline"
    monkeypatch.setenv("WANDB_API_KEY", "x")
    assert wandb_mode() == "online"
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert wandb_mode() == "disabled"


def test_a_tracker_that_is_not_installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(accelerator_module, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="trainer.trackers names wandb, which is not installed"):
        make_accelerator(make_trainer(trackers=["wandb"]), tmp_path)


@pytest.mark.slow
def test_trackers_get_the_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("wandb", "tensorboard"):
        pytest.importorskip(name)
    monkeypatch.setenv("WANDB_MODE", "offline")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from loramoe_train.training.loop import fit
    from loramoe_train.training.stages import plan_stages

    trainer, parts = make_trainer(trackers=["wandb", "tensorboard"]), make_parts()
    accelerator = make_accelerator(trainer, tmp_path, cpu=True)
    start_trackers(accelerator, trainer, tmp_path, {"seed": 5})
    stages = plan_stages(trainer, dict.fromkeys(trainer.stages, 9), aux_losses=parts.aux)
    fit(parts, accelerator, trainer, stages, run_dir=tmp_path, seed=5)
    accelerator.end_training()
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))
    events = next(tmp_path.rglob("events.out.tfevents*"))
    found = EventAccumulator(str(events.parent)).Reload()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    expected = [(line["step"], line["loss"]) for line in lines if line["kind"] == "train"]
    assert [(e.step, e.value) for e in found.Scalars("train/loss")] == [pytest.approx(pair) for pair in expected]
    assert found.Scalars("routing/sites/model.layers.0.self_attn.q_proj/entropy")
