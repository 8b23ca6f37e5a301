"""Every way to save memory or time trains as the plain path does: twenty steps of a routed model, loss by loss.

The gradient norms of experts and routers are compared as well, step by step: a path that lost the routers' gradient
(reentrant checkpointing, a packed base without a backward pass) would show there first.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from loramoe_train.models import load_model
from loramoe_train.paths import ASSETS
from loramoe_train.schema.model import ModelConfig
from tests.conftest import make_llama
from tests.recipe_runs import differing, get_ready, short_run

STEPS = 20
RUN = (
    f"trainer.max_steps={STEPS}",
    "trainer.batch_size=4",
    "trainer.micro_batch_size=4",
    "trainer.checkpoint_every=10",
    "trainer.lr=0.004",
    "experts.sites=[attn_out,ffn]",
    "experts.layout=4",
    "experts.rank=16",  # large enough for 8-bit states
    "experts.dropout=0.1",
    "data.tasks=[tiny_grammar,tiny_sentiment]",
    "data.max_examples=8",
)


pytestmark = pytest.mark.usefixtures("one_thread")


@dataclass(frozen=True)
class Ran:
    """What a finished run leaves: numbers step by step, weights before and after, its folder."""

    run_dir: Path
    losses: list[float]
    norms: dict[str, list[float]]  # of the gradients, by group
    before: dict[str, Tensor]
    after: dict[str, Tensor]


def train(folder: Path, base: Path, *overrides: str, resume: Path | None = None) -> Ran:
    folder.mkdir(exist_ok=True)
    ready = get_ready(short_run("mola", folder, *RUN, f"model.path={base}", *overrides))
    before, run_dir = ready.weights(), folder / "run"
    ready.train(run_dir, resume=resume)
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["kind"] == "train"]
    assert len(steps) == STEPS
    norms = {group: [line["grad_norm"][group] for line in steps] for group in ("experts", "routers")}
    return Ran(run_dir, [line["loss"] for line in steps], norms, before, ready.weights())


def farthest(ours: list[float], theirs: list[float]) -> float:
    """The largest difference between two rows of numbers, as a share of the first row's."""
    return max(abs(b / a - 1) for a, b in zip(ours, theirs, strict=True))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of sizes that bitsandbytes' kernels for the CPU take, with the embedded tokenizer."""
    folder, tiny = tmp_path_factory.mktemp("memory") / "base", ASSETS / "tiny" / "model"
    vocabulary = json.loads((tiny / "config.json").read_text())["vocab_size"]
    shape = {"hidden_size": 64, "intermediate_size": 128, "pad_token_id": 0, "eos_token_id": 1}
    make_llama(vocab_size=vocabulary, initializer_range=0.1, **shape).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def plain(base: Path) -> Ran:
    return train(base.parent / "plain", base)


@pytest.fixture(scope="module")
def on_dequantised(base: Path) -> Callable[[str], Ran]:
    """The plain path on a float32 base of the very numbers that the packed weights stand for."""

    @cache
    def ran(quantization: str) -> Ran:
        packed = load_model(ModelConfig(name="base", path=str(base), quantization=quantization))
        folder = base.with_name(quantization)
        shutil.copytree(base, folder)
        packed.dequantize().float().save_pretrained(folder)
        return train(base.with_name(f"{quantization}-run"), folder)

    return ran


@dataclass(frozen=True)
class Saving:
    """A path and how far it may go, as a share: the loss of any step, and the sum of all steps' gradient norms.

    Where the base is packed (`stands_for`), that is against the plain path on a float32 base of the very numbers that
    the packed weights stand for; `packed` is the loss's share against the base as it was before packing.
    """

    overrides: tuple[str, ...]
    loss: float = 0.0
    gradient: float = 0.0
    stands_for: str | None = None
    packed: float = 0.0


NF4, CHECKPOINTING, BF16 = "model.quantization=nf4", "model.gradient_checkpointing=true", "trainer.mixed_precision=bf16"
EIGHT_BIT, HALF = "trainer.optimizer=adamw_8bit", "model.dtype=bfloat16"
# What rounding changes grows with the steps, and a top-2 router then chooses otherwise here and there.
PATHS = {
    "checkpointing": Saving((CHECKPOINTING,)),
    "nf4": Saving((NF4,), loss=1e-4, gradient=1e-4, stands_for="nf4", packed=0.1),
    "int8": Saving(("model.quantization=int8",), loss=1e-4, gradient=1e-4, stands_for="int8", packed=0.02),
    "adamw_8bit": Saving((EIGHT_BIT,), loss=0.01, gradient=0.05),
    "bf16": Saving((BF16,), loss=0.02, gradient=0.15),
    "bfloat16 base": Saving((HALF,), loss=0.02, gradient=0.15),
    "all together": Saving(
        (HALF, NF4, CHECKPOINTING, EIGHT_BIT, BF16), loss=0.05, gradient=0.2, stands_for="nf4", packed=0.1
    ),
}


@pytest.mark.parametrize("path", PATHS)
def test_it_trains_as_the_plain_path_does(
    path: str, base: Path, plain: Ran, on_dequantised: Callable[[str], Ran], tmp_path: Path
) -> None:
    saving, expected = PATHS[path], plain
    if saving.stands_for or EIGHT_BIT in saving.overrides:
        pytest.importorskip("bitsandbytes")
    found = train(tmp_path, base, *saving.overrides)
    assert plain.losses[-1] < 0.5 * plain.losses[0]  # there is something to differ in
    if saving.stands_for:
        assert farthest(plain.losses, found.losses) <= saving.packed
        expected = on_dequantised(saving.stands_for)
    figures = [f"{farthest(one.losses, found.losses):.2g}" for one in (expected, plain)]
    print(f"\n{path}: {figures[0]}, from the plain path {figures[1]}")  # for docs/reliability.md
    assert farthest(expected.losses, found.losses) <= saving.loss
    for group, norms in expected.norms.items():
        assert abs(sum(found.norms[group]) / sum(norms) - 1) <= saving.gradient, group
    routers = {name for name in found.after if ".router." in name}
    assert routers and routers <= set(differing(found.before, found.after))
    if path == "checkpointing":
        assert differing(plain.after, found.after) == []
    if path == "adamw_8bit":
        check_resumes(found, base, tmp_path / "again", *saving.overrides)


def check_resumes(whole: Ran, base: Path, folder: Path, *overrides: str) -> None:
    """Quantised moments and their scales lie in the checkpoint and give the same weights, bit for bit."""
    checkpoint = whole.run_dir / "checkpoints" / "step_000010"
    stored = load_file(checkpoint / "state" / "optimizer.safetensors")
    packed = [tensor for name, tensor in stored.items() if name.endswith(("::state1", "::state2"))]
    assert any(tensor.dtype == torch.uint8 for tensor in packed)
    (folder / "run").mkdir(parents=True)
    shutil.copy(whole.run_dir / "metrics.jsonl", folder / "run")
    again = train(folder, base, *overrides, resume=checkpoint)
    assert differing(whole.after, again.after) == [] and again.losses == whole.losses
