"""Two gloo processes are one process, in losses and weights: each with the whole base or with a share of it, for both
scopes of auxiliary losses, both stages, experts without a token, and a run that goes on in another number of processes.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from loramoe_train.training.accelerator import make_accelerator
from tests.training.harness import double_parts, make_picky_router, make_trainer, train, weights
from tests.training.processes import run_worker

TRAINER = {"eval_every": 2, "checkpoint_every": 1, "keep": 10}


def numbers(run_dir: Path) -> list[tuple[str, float]]:
    """Every number of the log but those of the clock."""

    def walk(value, path: str):
        if isinstance(value, dict):
            for key, entry in value.items():
                if key != "timing":
                    yield from walk(entry, f"{path}/{key}")
        elif isinstance(value, list):
            for index, entry in enumerate(value):
                yield from walk(entry, f"{path}/{index}")
        elif isinstance(value, int | float):
            yield path, value

    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [pair for index, line in enumerate(lines) for pair in walk(json.loads(line), str(index))]


def check_close(one: Path, two: Path, *, numbers_at_least: int = 100) -> None:
    a, b = numbers(one), numbers(two)
    assert [path for path, _ in a] == [path for path, _ in b] and len(a) > numbers_at_least
    # float32 norms inside Llama; shares in the log are rounded to 5 digits
    assert [value for _, value in b] == pytest.approx([value for _, value in a], rel=1e-5, abs=2e-5)
    ours, theirs = load_file(one / "weights.safetensors"), load_file(two / "weights.safetensors")
    for name, value in ours.items():
        # of a learning rate of 5e-3: AdamW divides by the gradient's size, so tiny gradients' rounding is enlarged
        torch.testing.assert_close(theirs[name], value, rtol=0, atol=2e-6, msg=lambda text, n=name: f"{n}: {text}")


def leave_run(
    run_dir: Path, trainer: dict[str, Any], *, resume: Path | None = None, **options: Any
) -> dict[str, Tensor]:
    """A run in this process, as the workers leave theirs; returns the weights that it was built with."""
    parts = double_parts(**options)
    before = weights(parts)
    train(parts, make_trainer(**trainer), run_dir, resume=resume)
    save_file(weights(parts), run_dir / "weights.safetensors")
    return before


PARALLEL = ("ddp", "fsdp2")
# three tasks of which each of two ranks has one
SORTED = {
    "first": {"train": ["experts"], "routing": "by_domain", "steps": 3},
    "second": {"train": ["experts", "routers"], "steps": 3},
}


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path: Path) -> None:
    """In one test, so that the start of two processes is paid once."""
    one, jobs = tmp_path / "one", []
    leave_run(one, TRAINER, micro=4)
    for parallel in PARALLEL:
        trainer = {**TRAINER, "parallel": parallel}
        common = {"double": True, "trainer": trainer}
        jobs.append({**common, "run_dir": str(tmp_path / parallel), "parts": {"micro": 2}})
        continued = shutil.copytree(one, tmp_path / f"{parallel}-continued")
        # with recomputed activations: layers that are shared out are then put together once more
        parts, resume = {"micro": 2, "checkpointing": True}, str(continued / "checkpoints" / "step_000002")
        jobs.append({**common, "run_dir": str(continued), "parts": parts, "resume": resume})
    idle = {"parts": {"micro": 4, "tasks": 2}, "picky": True, "trainer": {**TRAINER, "stages": SORTED}}
    jobs.append({"double": True, "run_dir": str(tmp_path / "idle"), **idle})
    said = run_worker(jobs, processes=2).splitlines()
    held = [float(line.split()[1]) for line in said if line.startswith("holds")]  # by either rank, run after run

    for number, parallel in enumerate(PARALLEL):
        check_close(one, tmp_path / parallel)
        check_close(one, tmp_path / f"{parallel}-continued")
        first, second = held[4 * number : 4 * number + 2]
        assert first + second == (2 if parallel == "ddp" else pytest.approx(1)) and 0.4 < min(first, second)
        # saved on two, continued on one; the process count is no part of a checkpoint
        resume = tmp_path / parallel / "checkpoints" / "step_000004"
        leave_run(tmp_path / parallel, {**TRAINER, "parallel": parallel}, resume=resume, micro=4)
        check_close(one, tmp_path / parallel)
    check_idle_experts(tmp_path / "idle", tmp_path / "idle-one")


def check_idle_experts(two: Path, one: Path) -> None:
    """Each rank has one task alone, of three: hard routing by domain then asks one expert there, another on the other
    rank, and one nowhere. Later a router never chooses the last expert."""
    options = {"micro": 8, "tasks": 2, "router": make_picky_router}
    before = leave_run(one, {**TRAINER, "stages": SORTED}, **options)
    check_close(one, two)
    after = load_file(two / "weights.safetensors")
    for name, start in before.items():
        if ".bank." in name:
            moved = [not torch.equal(after[name][rows], start[rows]) for rows in torch.arange(6).chunk(3)]
            assert moved == [True, True, False], name
        else:
            assert not torch.equal(after[name], start), name


def test_nothing_searches_for_unused_parameters(tmp_path: Path) -> None:
    """That every parameter takes part in every pass, on every rank, is the experts' business."""
    settings = make_accelerator(make_trainer(), tmp_path, cpu=True).ddp_handler
    assert settings.find_unused_parameters is False and settings.static_graph is False
