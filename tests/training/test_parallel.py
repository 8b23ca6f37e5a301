"""Two gloo processes are one process, in losses and weights, for both scopes of auxiliary losses and both stages."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.training.harness import double_parts, make_trainer, train, weights
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


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from safetensors.torch import save_file

    run_dir = tmp_path_factory.mktemp("one")
    parts = double_parts(micro=4)
    train(parts, make_trainer(**TRAINER), run_dir)
    save_file(weights(parts), run_dir / "weights.safetensors")
    return run_dir


@pytest.mark.slow
def test_two_processes_equal_one(one_process: Path, tmp_path: Path) -> None:
    options = {"run_dir": str(tmp_path), "double": True, "parts": {"micro": 2}, "trainer": TRAINER}
    run_worker(options, processes=2)
    check_close(one_process, tmp_path)

    # saved on two, continued on one; the process count is no part of a checkpoint
    solo = {**options, "parts": {"micro": 4}, "resume": str(tmp_path / "checkpoints" / "step_000004")}
    run_worker(solo)
    check_close(one_process, tmp_path)


@pytest.mark.slow
def test_saved_on_one_and_continued_on_two(one_process: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(one_process, tmp_path, dirs_exist_ok=True)
    resume = str(tmp_path / "checkpoints" / "step_000002")
    options = {"run_dir": str(tmp_path), "double": True, "parts": {"micro": 2}, "trainer": TRAINER, "resume": resume}
    run_worker(options, processes=2)
    check_close(one_process, tmp_path)
