"""Evaluation borrows a model in the middle of training; this gives it back exactly as it was."""

import copy
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn


@contextmanager
def preserved(model: nn.Module, tokenizer: Any) -> Iterator[None]:
    """Restore, whatever happens inside: each module's training flag, which parameters require gradient, the generation
    and model configs, the tokenizer's padding, and the random states of Python, numpy and torch (all devices)."""
    flags = {module: module.training for module in model.modules()}
    trainable = {parameter: parameter.requires_grad for parameter in model.parameters()}
    generation = copy.deepcopy(getattr(model, "generation_config", None))
    use_cache = getattr(getattr(model, "config", None), "use_cache", None)
    padding = (tokenizer.padding_side, tokenizer.pad_token)
    with _random_states():
        try:
            yield
        finally:
            for module, flag in flags.items():
                module.training = flag  # not .train(): that would set the children too
            for parameter, flag in trainable.items():
                parameter.requires_grad_(flag)
            if generation is not None:
                model.generation_config = generation
            if use_cache is not None:
                model.config.use_cache = use_cache
            tokenizer.padding_side, tokenizer.pad_token = padding


def seed_all(seed: int) -> None:
    """Set the random states of Python, numpy and torch."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


@contextmanager
def _random_states() -> Iterator[None]:
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        if devices:
            torch.cuda.set_rng_state_all(devices)


def max_positions(model: nn.Module) -> int | None:
    """The longest sequence, in tokens, that the model's config declares; None for one that declares none (Mamba)."""
    config = getattr(model.config, "text_config", None) or model.config
    found = (getattr(config, name, None) for name in ("n_positions", "max_position_embeddings", "n_ctx"))
    return next((int(value) for value in found if value), None)
