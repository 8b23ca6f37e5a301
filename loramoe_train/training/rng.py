"""Random numbers as a pure function of where the run is: a resumed step draws what it would have drawn."""

import hashlib
import random
from typing import Any

import numpy as np
import torch
from torch import Tensor


def seed_for(*place: int | str) -> int:
    """A 63-bit seed for a place such as (seed, stage, step, rank): stable over processes and Python versions."""
    digest = hashlib.blake2b("/".join(map(str, place)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def seed_everything(seed: int) -> None:
    """Seed python, numpy and torch (all devices)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def capture() -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state of every generator of this process: tensors, and what JSON can hold."""
    name, keys, position, has_gauss, gauss = np.random.get_state()
    version, internal, next_gauss = random.getstate()
    tensors = {"torch": torch.get_rng_state(), "numpy": torch.from_numpy(keys.astype(np.int64))}
    for index, state in enumerate(torch.cuda.get_rng_state_all() if torch.cuda.is_available() else ()):
        tensors[f"cuda_{index}"] = state
    numbers = {
        "python": [version, list(internal), next_gauss],
        "numpy": [name, int(position), int(has_gauss), float(gauss)],
    }
    return tensors, numbers


def restore(tensors: dict[str, Tensor], numbers: dict[str, Any]) -> None:
    """Put the generators back where `capture` found them; devices that are not there any more are left out."""
    version, internal, next_gauss = numbers["python"]
    random.setstate((version, tuple(internal), next_gauss))
    name, position, has_gauss, gauss = numbers["numpy"]
    np.random.set_state((name, tensors["numpy"].numpy().astype(np.uint32), position, has_gauss, gauss))
    torch.set_rng_state(tensors["torch"])
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        if f"cuda_{index}" in tensors:
            torch.cuda.set_rng_state(tensors[f"cuda_{index}"], index)
