"""Everything about a run that can be refused before a weight or a data row is read. Torch-free, a second at most."""

import os
import shutil
import sys
import sysconfig
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loramoe_train.data.sampling import shares
from loramoe_train.errors import ConfigError
from loramoe_train.evaluation.check import check_benchmarks
from loramoe_train.launcher import check_launcher
from loramoe_train.models.architecture import max_positions, num_layers, read_architecture
from loramoe_train.models.files import model_folder
from loramoe_train.schema.run import RunConfig
from loramoe_train.serving import served_by
from loramoe_train.training.stages import plan_stages
from loramoe_train.validation import check_layout, domains_of, trains_base

OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "WANDB_MODE": "offline"}


@dataclass(frozen=True)
class Settled:
    """What the checks found out on their way."""

    architecture: Mapping[str, Any]
    num_layers: int
    max_positions: int | None
    domains: list[str]


def settle(config: RunConfig, *, check_files: bool = True, trains: bool = True) -> Settled:
    """Cross-field checks against the base model's config.json; with `check_files` also that model, data, benchmarks and
    compiler are at hand. `trains` false: what only training needs does not matter. Raises ConfigError, DataError or
    MissingFileError.
    """
    if config.offline:
        os.environ.update(OFFLINE)
    architecture = read_architecture(config.model)
    layers, positions, domains = num_layers(architecture), max_positions(architecture), domains_of(config)
    check_layout(config, layers, domains)
    if positions is not None and config.data.max_length > positions:
        raise ConfigError(
            f"data.max_length={config.data.max_length} exceeds the {positions} positions of {config.model.name};"
            f" give at most {positions}"
        )
    shares(config.data.sampling, dict.fromkeys(config.data.tasks, 1))  # weights and schedules fit the tasks
    # Step counts need the data; what a stage says about itself does not.
    plan_stages(config.trainer, dict.fromkeys(config.trainer.stages, 1 << 30), aux_losses=config.aux_loss)
    if config.trainer.early_stopping is not None and config.data.validation_examples == 0:
        raise ConfigError("trainer.early_stopping needs an evaluation loss; set data.validation_examples above 0")
    if not trains_base(config):
        _check_trained_experts(config)
    elif trains and config.model.dtype != "float32":
        raise ConfigError(
            f"model.dtype={config.model.dtype}: what trains is kept in float32, and here the base does; set"
            " model.dtype=float32 (trainer.mixed_precision=bf16 makes it faster)"
        )
    if config.data.packing and config.model.sites.get("ssm"):
        raise ConfigError(
            f"data.packing=true: the state-space layers of {config.model.name} cannot keep packed examples apart;"
            " set data.packing=false"
        )
    if config.trainer.compile and trains:
        _check_compilable(config)
        if check_files:
            _check_compiler()
    if config.eval.enabled and trains:
        served_by(config, benchmark_names(config), tasks=config.data.tasks, domains=domains)
    if trains and config.trainer.parallel == "fsdp2":
        _check_shareable(config)
    if check_files:
        check_launcher(config.trainer)
        model_folder(config.model)
        if config.eval.enabled:
            check_benchmarks(benchmark_names(config), config.eval, config.data.root, positions)
    return Settled(architecture, layers, positions, domains)


def _check_trained_experts(config: RunConfig) -> None:
    """Routers over experts that nobody trained would learn nothing: their outputs are all zero."""
    if config.experts.adapters or config.init_from:
        return
    for name, stage in config.trainer.stages.items():
        if "experts" in stage.train:
            return
        raise ConfigError(
            f"trainer.stages.{name} trains only routers, over experts that no stage has trained; give"
            " experts.adapters=[PEFT_FOLDER,...] or init_from=RUN, or train experts first"
        )


def _check_shareable(config: RunConfig) -> None:
    """Only a frozen base of plain tensors is shared out among processes."""
    if trains_base(config):
        raise ConfigError(
            "trainer.parallel=fsdp2 shares out the frozen base, and here the base trains; set trainer.parallel=ddp"
        )
    if config.model.quantization != "none":
        raise ConfigError(
            f"trainer.parallel=fsdp2: the packed weights of model.quantization={config.model.quantization} cannot be"
            " shared out; set trainer.parallel=ddp or model.quantization=none"
        )
    if config.trainer.compile:
        raise ConfigError(
            "trainer.parallel=fsdp2 puts layers together and takes them apart around every pass, which has not been"
            " compiled here; set trainer.compile=false or trainer.parallel=ddp"
        )


def _check_compilable(config: RunConfig) -> None:
    """What torch.compile cannot serve without breaking the graph of a layer."""
    if config.model.sites.get("ssm"):
        raise ConfigError(
            f"trainer.compile=true: the state-space layers of {config.model.name} reach their routed projections in"
            " ways that torch.compile cannot trace; set trainer.compile=false"
        )
    if config.model.quantization != "none":
        raise ConfigError(
            f"trainer.compile=true: the kernels of model.quantization={config.model.quantization} cannot be compiled"
            " without breaks; set trainer.compile=false or model.quantization=none"
        )
    if config.experts.form == "grouped":
        raise ConfigError(
            "trainer.compile=true: experts.form=grouped sorts tokens by expert, and the sizes of the groups depend on"
            " the data; set experts.form=auto, which compiles the concatenated form, or trainer.compile=false"
        )


def _check_compiler() -> None:
    """torch.compile writes C++ (and for a GPU Triton, which also calls a C compiler) against Python's headers."""
    usual = {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++")  # torch tries this one and no other
    wanted = os.environ.get("CXX") or usual
    if shutil.which(wanted) is None:
        raise ConfigError(
            f"trainer.compile=true needs a C++ compiler, and there is no {wanted}; install it, name another in the"
            " environment variable CXX, or set trainer.compile=false"
        )
    headers = Path(sysconfig.get_path("include"))
    if not (headers / "Python.h").is_file():
        raise ConfigError(
            f"trainer.compile=true needs the headers of Python, and {headers} has no Python.h; install the package"
            " python3-dev, or set trainer.compile=false"
        )


def benchmark_names(config: RunConfig) -> list[str]:
    """The benchmarks asked for, or those that the mixture's tasks name."""
    if config.eval.tasks is not None:
        return list(config.eval.tasks)
    named = (config.data.definitions[task].lm_eval for task in config.data.tasks)
    return list(dict.fromkeys(name for name in named if name))
