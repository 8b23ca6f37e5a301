"""The commands on a machine with a GPU: they take it without being asked, in every precision and way to save memory."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from tests.cli import ADAPTER, MIXER, NO_EVAL, TWO_TASKS, losses, run_cli
from tests.training.processes import ROOT

pytestmark = [pytest.mark.gpu, pytest.mark.slow]
SHORT = (*MIXER, "experts.dropout=0", "trainer.max_steps=8", "trainer.batch_size=8", "trainer.micro_batch_size=4")


def train(folder, *arguments, **environment):
    done = run_cli("train", *SHORT, *arguments, f"run_dir={folder / 'run'}", cwd=folder, **environment)
    assert done.returncode == 0, done.stderr[-4000:]
    return losses(folder / "run")


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """Losses of the short run on the CPU, step by step: of other tasks' examples each, so they need not fall."""
    return train(tmp_path_factory.mktemp("cpu"), NO_EVAL, ACCELERATE_USE_CPU="true", CUDA_VISIBLE_DEVICES="")


def timings(run_dir):
    entries = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [entry["timing"] for entry in entries if entry["kind"] == "train"]


def scores(run_dir):
    found = json.loads((run_dir / "results.json").read_text())["scores"]
    return {name: (score["base"], score["tuned"]) for name, score in found.items()}


def test_a_run_takes_the_gpu_and_its_scores_are_those_of_a_cpu(tmp_path, plain):
    tasks = ("eval.limit=20", "eval.tasks=[tiny_facts,tiny_math,tiny_grammar]")
    assert train(tmp_path, *tasks) == pytest.approx(plain, rel=2e-3)
    assert 0 < timings(tmp_path / "run")[-1]["memory_gib"] < 0.5  # of the device: the process itself takes more
    ours = scores(tmp_path / "run")
    again = run_cli(
        "eval",
        str(tmp_path / "run"),
        *tasks,
        "eval.again=true",
        cwd=tmp_path,
        ACCELERATE_USE_CPU="true",
        CUDA_VISIBLE_DEVICES="",
    )
    assert again.returncode == 0, again.stderr[-4000:]
    theirs = scores(tmp_path / "run")
    assert ours.keys() == theirs.keys() == {"tiny_facts", "tiny_math", "tiny_grammar"}
    for name, pair in ours.items():  # one of twenty items may be a tie that rounding decides
        assert pair == pytest.approx(theirs[name], abs=0.051), name


@pytest.mark.parametrize(
    ("options", "relative"),
    [
        (("trainer.mixed_precision=bf16",), 0.02),
        (("model.dtype=bfloat16",), 0.02),
        (("model.quantization=nf4",), 0.1),
        (("model.quantization=int8",), 0.05),
        (("trainer.optimizer=adamw_8bit",), 0.02),
        (("model.gradient_checkpointing=true",), 2e-3),
        (("data.packing=true",), None),  # other batches
        (("trainer.compile=true",), 2e-3),
        (("trainer.compile=true", "trainer.mixed_precision=bf16", "model.gradient_checkpointing=true"), 0.02),
        (("trainer.num_workers=2",), 2e-3),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_ways_to_save(options, relative, tmp_path, plain):
    ours = train(tmp_path, NO_EVAL, *options)
    assert len(ours) == 8 and all(0 < loss < 10 for loss in ours)
    if relative is not None:
        assert ours == pytest.approx(plain, rel=relative)
    assert all(torch.isfinite(tensor).all() for tensor in load_file(tmp_path / "run" / ADAPTER).values())


@pytest.mark.parametrize("parallel", ["ddp", "fsdp2"])
def test_under_a_launcher(parallel, tmp_path, plain):
    """One process, but with NCCL, and the base shared out by FSDP2."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1"]
    command += [str(ROOT / "tests" / "cli.py"), "train", *SHORT, NO_EVAL, f"trainer.parallel={parallel}"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, f"run_dir={tmp_path / 'run'}"], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert losses(tmp_path / "run") == pytest.approx(plain, rel=2e-3)


def test_without_enough_memory_one_line_says_what_to_lower(tmp_path):
    """The device's memory is all but closed to the process."""
    command = (
        "import sys, torch; torch.cuda.set_per_process_memory_fraction(1e-4);"
        "sys.argv[0] = 'loramoe-train'; from loramoe_train import cli; cli.train()"
    )
    arguments = [*SHORT, NO_EVAL, *TWO_TASKS, "trainer.micro_batch_size=8", f"run_dir={tmp_path / 'run'}"]
    done = subprocess.run([sys.executable, "-c", command, *arguments], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode != 0 and "Traceback" not in done.stderr, done.stderr[-4000:]
    assert "out of memory in" in done.stderr and "trainer.micro_batch_size" in done.stderr
