"""AdamW over the named groups of a stage, and learning rates that are a pure function of the step in the stage."""

from collections.abc import Mapping
from math import cos, pi
from typing import Any

import torch
from torch import Tensor, nn

from loramoe_train.errors import ConfigError
from loramoe_train.schema.trainer import TrainerConfig
from loramoe_train.training.stages import StagePlan

MOMENTS = ("exp_avg", "exp_avg_sq")
UP = ".bank.up"  # how the names of up factors end
FUSED_DEVICES = ("cpu", "cuda", "xpu", "mps")  # where torch has the one-kernel AdamW


def build_optimizer(
    trainer: TrainerConfig,
    plan: StagePlan,
    groups: Mapping[str, Mapping[str, nn.Parameter]],
) -> torch.optim.Optimizer:
    """AdamW with one parameter group per trained and non-empty group of `groups`; each carries its `name`.

    With `trainer.up_lr_ratio` other than 1 the experts' up factors are a group of their own, `experts_up`, at that many
    times the rate (LoRA+, arXiv 2402.12354).

    The group's `peak_lr` is the top of its schedule; `set_learning_rates` fills `lr` before every step.

    Raises:
        ConfigError: nothing to train, or `adamw_8bit` without bitsandbytes.
    """
    peaks = {
        "experts": plan.lr,
        "experts_up": plan.lr * trainer.up_lr_ratio,
        "routers": plan.router_lr,
        "base": plan.lr,
    }
    trained = {name: groups[name] for name in plan.train if groups.get(name)}
    if trainer.up_lr_ratio != 1.0 and "experts" in trained:
        ups = {name: p for name, p in trained["experts"].items() if name.endswith(UP)}
        others = {name: p for name, p in trained["experts"].items() if name not in ups}
        trained = {**trained, "experts": others, "experts_up": ups}
    entries = [
        {"name": name, "params": list(members.values()), "lr": peaks[name], "peak_lr": peaks[name]}
        for name, members in trained.items()
    ]
    if not entries:
        raise ConfigError(
            f"trainer.stages.{plan.name}.train is {list(plan.train)}, but the model has no such parameters; "
            f"it has: {', '.join(name for name, members in groups.items() if members) or 'none'}"
        )
    common: dict[str, Any] = {"betas": trainer.betas, "eps": trainer.eps, "weight_decay": trainer.weight_decay}
    if trainer.optimizer == "adamw_8bit":
        try:
            from bitsandbytes.optim import AdamW8bit
        except ImportError as error:
            raise ConfigError(
                "trainer.optimizer=adamw_8bit needs bitsandbytes: install loramoe-train[quant], or use adamw"
            ) from error
        return AdamW8bit(entries, **common)
    device = entries[0]["params"][0].device.type
    return torch.optim.AdamW(entries, fused=device in FUSED_DEVICES, **common)


def halts_on_device(optimizer: torch.optim.Optimizer, halted: Tensor) -> bool:
    """Make every later step of the optimizer do nothing where `halted` (scalar float32, on its device) holds 1.

    Parameters, moments and step counts stay as they are, and the host need not know: torch's fused AdamW looks at
    `found_inf` by itself, as it does for a GradScaler. Zeroed gradients would not do, for the moments would decay.

    Returns:
        False if the optimizer cannot: the host must then look before it asks for a step. bitsandbytes' 8-bit AdamW
        waits for the device after every parameter anyway.
    """
    if not optimizer.defaults.get("fused"):
        return False
    optimizer.found_inf = halted
    return True


def schedule_factor(trainer: TrainerConfig, plan: StagePlan, step: int) -> float:
    """Share of the peak learning rate at `step` (0 .. steps - 1) of a stage.

    Warm-up climbs in equal parts and never starts at zero; afterwards `cosine` and `linear` fall towards the zero that
    they would reach one step after the last, so that no step is wasted.
    """
    if step < plan.warmup_steps:
        return (step + 1) / (plan.warmup_steps + 1)
    done = (step - plan.warmup_steps) / (plan.steps - plan.warmup_steps)
    return {"cosine": 0.5 * (1.0 + cos(pi * done)), "linear": 1.0 - done, "constant": 1.0}[trainer.schedule]


def set_learning_rates(optimizer: torch.optim.Optimizer, factor: float) -> dict[str, float]:
    """Set every group to `factor` of its peak; returns group name -> learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor
    return {group["name"]: group["lr"] for group in optimizer.param_groups}


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: Mapping[int, str]) -> tuple[dict[str, Tensor], dict]:
    """The optimizer's state as tensors keyed `parameter name::entry`, and the entries that are plain numbers.

    The tensors are the optimizer's own, some of them (the look-up table of 8-bit states) under many names: take a
    `snapshot` before anything is stored.

    Args:
        names: id of a parameter -> its full name.
    """
    tensors, numbers = {}, {}
    for parameter, state in optimizer.state.items():
        for entry, value in state.items():
            key = f"{names[id(parameter)]}::{entry}"
            if isinstance(value, Tensor):
                tensors[key] = value.detach()
            else:
                numbers[key] = value
    return tensors, numbers


def load_optimizer_tensors(
    optimizer: torch.optim.Optimizer, names: Mapping[int, str], tensors: Mapping[str, Tensor], numbers: Mapping
) -> None:
    """Give back what `optimizer_tensors` took. Raises ConfigError where the parameters are not the same."""
    stored: dict[str, dict[str, Any]] = {}
    for key, value in {**tensors, **numbers}.items():
        name, entry = key.rsplit("::", 1)
        stored.setdefault(name, {})[entry] = value
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    ours = {names[id(parameter)] for parameter in parameters}
    if stored and ours != set(stored):
        odd = sorted(ours ^ set(stored))[0]
        raise ConfigError(
            f"the checkpoint's optimizer holds {len(stored)} tensors and this run trains {len(ours)} (first "
            f"difference: {odd}); resume with the configuration it was saved under, or use init_from for weights only"
        )
    for parameter in parameters if stored else ():
        for entry, value in stored[names[id(parameter)]].items():
            if entry in MOMENTS and value.shape != parameter.shape:
                raise ConfigError(f"the checkpoint's {entry} of {names[id(parameter)]} has shape {tuple(value.shape)}")
    state = optimizer.state_dict()
    state["state"] = {index: stored[names[id(p)]] for index, p in enumerate(parameters) if names[id(p)] in stored}
    optimizer.load_state_dict(state)
