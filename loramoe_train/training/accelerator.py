"""The Accelerator of a run: devices, processes and trackers. Mixed precision is the step's own business."""

import netrc
import os
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs

from loramoe_train.errors import ConfigError
from loramoe_train.schema.trainer import TrainerConfig
from loramoe_train.training.metrics import flat

PROJECT = "loramoe-train"


def make_accelerator(trainer: TrainerConfig, run_dir: Path, *, cpu: bool = False) -> Accelerator:
    """An Accelerator as `fit` wants it.

    Args:
        cpu: stay on the CPU where there is a GPU.

    `trainer.deterministic` makes torch refuse every operation that has no deterministic implementation, from here on.

    Raises:
        ConfigError: a tracker whose package is not installed (accelerate would leave it out without a word).
    """
    if trainer.deterministic:
        # cuBLAS reads it when CUDA starts, so before the Accelerator
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    for name in trainer.trackers:
        if find_spec(name) is None:
            raise ConfigError(f"trainer.trackers names {name}, which is not installed; install loramoe-train[track]")
    return Accelerator(
        # "no": autocast is entered by the step; accelerate's would turn all logits into float32
        mixed_precision="no",
        gradient_accumulation_steps=1,  # the step scales its loss by tokens itself
        cpu=cpu,
        log_with=list(trainer.trackers) or None,
        project_dir=str(run_dir),
        # buffers of routers change by reduced statistics, so they are the same on every rank already
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
    )


def start_trackers(accelerator: Accelerator, trainer: TrainerConfig, run_dir: Path, config: Mapping[str, Any]) -> None:
    """Start the trackers. wandb is offline unless WANDB_MODE says otherwise or a key is at hand."""
    if not trainer.trackers:
        return
    run_dir.mkdir(parents=True, exist_ok=True)
    wandb = {"mode": wandb_mode(), "dir": str(run_dir), "name": run_dir.name}
    accelerator.init_trackers(PROJECT, config=flat(config), init_kwargs={"wandb": wandb})


def wandb_mode() -> str:
    """WANDB_MODE if it is set, else online with a key (environment or netrc) and offline without."""
    if os.environ.get("WANDB_MODE"):
        return os.environ["WANDB_MODE"]
    return "online" if os.environ.get("WANDB_API_KEY") or _key_in_netrc() else "offline"


def _key_in_netrc() -> bool:
    try:
        return netrc.netrc().authenticators("api.wandb.ai") is not None
    except (OSError, netrc.NetrcParseError):
        return False
