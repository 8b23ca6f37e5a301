"""Short runs of every shipped recipe through the program's own `prepare` and `fit`, in this process."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loramoe_train.build import RoutedModel
from loramoe_train.experts.peft_folder import LoraFactors, write_peft_folder
from loramoe_train.models import meta_model
from loramoe_train.run import Prepared, prepare
from loramoe_train.schema.run import RunConfig
from loramoe_train.settle import settle
from loramoe_train.training.accelerator import make_accelerator
from loramoe_train.training.loop import fit
from loramoe_train.validation import domains_of
from tests.composing import composed
from tests.recipe_passes import needs_adapters

# every step sees the same examples, two of each task, in two micro-batches
QUICK = (
    "data.max_examples=2",
    "data.validation_examples=0",
    "data.cache_dir=null",
    "trainer.batch_size=10",
    "trainer.micro_batch_size=5",
    "trainer.max_steps=6",
    "trainer.log_every=1",
    "trainer.checkpoint_every=2",
    "trainer.keep=10",
    "eval.enabled=false",
)


@dataclass(frozen=True)
class Ready:
    """A run that can be trained."""

    config: RunConfig
    parts: Prepared
    device: str = "cpu"

    @property
    def routed(self) -> RoutedModel:
        return self.parts.routed

    def weights(self) -> dict[str, Tensor]:
        """Copies of all that an adapter stores."""
        return {name: tensor.clone() for name, tensor in self.parts.parts.adapter_tensors().items()}

    def train(self, run_dir: Path, *, resume: Path | None = None) -> None:
        """All stages; leaves the log, checkpoints and the adapter in `run_dir`."""
        trainer = self.config.trainer
        accelerator = make_accelerator(trainer, run_dir, cpu=self.device == "cpu")
        assert accelerator.device.type == self.device, "accelerate keeps the first device of a process"
        run_dir.mkdir(parents=True, exist_ok=True)
        options = {"run_dir": run_dir, "seed": self.config.seed, "resume": resume}
        fit(self.parts.parts, accelerator, trainer, self.parts.stages, **options)
        if accelerator.is_main_process:
            self.parts.parts.save_adapter(run_dir, self.parts.parts.adapter_tensors())


def short_run(recipe: str, folder: Path, *more: str) -> RunConfig:
    """A short run of the recipe, with adapters in `folder` where it starts from some."""
    config = composed(f"+recipe={recipe}", *QUICK, *more)
    if not needs_adapters(config):
        return config
    adapters = [str(path) for path in write_adapters(folder, len(domains_of(config)), config)]
    return changed(config, "experts", adapters=adapters)


def changed(config: RunConfig, group: str, **values: Any) -> RunConfig:
    """The config with other values in a group."""
    return config.model_copy(update={group: getattr(config, group).model_copy(update=values)})


def get_ready(config: RunConfig, device: str = "cpu") -> Ready:
    """Check and prepare, as the command does."""
    return Ready(config, prepare(config, settle(config), device=torch.device(device)), device)


def write_adapters(folder: Path, number: int, config: RunConfig | None = None) -> list[Path]:
    """PEFT folders of different ranks and coverage for the run's base, by default the embedded model."""
    config = config or composed("+recipe=lora")
    model, generator, paths = meta_model(config.model), torch.Generator().manual_seed(0), []
    for index in range(number):
        # only one is absent anywhere: routers cannot tell two absent experts apart, and rounding would choose
        ends = {0: ("q_proj", "v_proj"), 1: ("q_proj", "down_proj")}.get(index, ("q_proj", "v_proj", "down_proj"))
        modules = {
            name: LoraFactors(
                torch.randn(2 + index % 2, module.in_features, generator=generator) * 0.1,
                torch.randn(module.out_features, 2 + index % 2, generator=generator) * 0.1,
            )
            for name, module in model.named_modules()
            if name.endswith(ends)
        }
        paths.append(write_peft_folder(folder / f"adapter{index}", modules, base_model=config.model.name))
    return paths


def differing(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> list[str]:
    """Names of the tensors that are not equal, bit for bit."""
    assert one.keys() == other.keys()
    return [name for name, tensor in one.items() if not torch.equal(tensor, other[name])]


@torch.no_grad()
def logits_of(routed: RoutedModel, ids: Tensor) -> Tensor:
    """(B, S, V) in evaluation, as of the second task."""
    with routed.context.serving(task=1, domain=1):
        return routed.model.eval()(ids, use_cache=False).logits
