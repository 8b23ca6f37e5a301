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
    """The state of this process's generators (Python, numpy, torch, its CUDA device): tensors, and what JSON holds."""
    name, keys, position, has_gauss, gauss = np.random.get_state()
    version, internal, next_gauss = random.getstate()
    tensors = {"torch": torch.get_rng_state(), "numpy": torch.from_numpy(keys.astype(np.int64))}
    if torch.cuda.is_initialized():  # this rank's device alone: asking the others would open them, and cost memory
        tensors["cuda"] = torch.cuda.get_rng_state()
    numbers = {
        "python": [version, list(internal), next_gauss],
        "numpy": [name, int(position), int(has_gauss), float(gauss)],
    }
    return tensors, numbers


def restore(tensors: dict[str, Tensor], numbers: dict[str, Any]) -> None:
    """Put the generators back where `capture` found them; a CUDA device that is not in use any more is left out."""
    version, internal, next_gauss = numbers["python"]
    random.setstate((version, tuple(internal), next_gauss))
    name, position, has_gauss, gauss = numbers["numpy"]
    np.random.set_state((name, tensors["numpy"].numpy().astype(np.uint32), position, has_gauss, gauss))
    torch.set_rng_state(tensors["torch"])
    if "cuda" in tensors and torch.cuda.is_initialized():
        torch.cuda.set_rng_state(tensors["cuda"])
