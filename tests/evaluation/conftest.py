"""Tiny models for the evaluation tests."""

from typing import Any

import pytest

from tests.conftest import make_llama, make_tokenizer


@pytest.fixture
def model(tokenizer: Any) -> Any:
    """A fresh random Llama in training mode, with dropout in one place, as a trainer would hand it over."""
    import torch

    made = make_llama(vocab_size=len(tokenizer), attention_dropout=0.1, eos_token_id=tokenizer.eos_token_id)
    with torch.no_grad():
        made.lm_head.weight.mul_(20.0)  # else a random model is so even that a bug in the order of scores could hide
    return made.train()


@pytest.fixture
def plain_tokenizer() -> Any:
    """A tokenizer of its own, for tests that look at what was done to it."""
    return make_tokenizer()
