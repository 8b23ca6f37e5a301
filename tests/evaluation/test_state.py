"""`preserved` and `max_positions` on their own."""

import pytest
from transformers import FalconMambaConfig, GPT2Config, LlamaConfig

from loramoe_train.evaluation.state import max_positions, preserved


class Holder:
    def __init__(self, config):
        self.config = config


@pytest.mark.parametrize(
    ("config", "expected"),
    [(LlamaConfig(max_position_embeddings=77), 77), (GPT2Config(n_positions=55), 55), (FalconMambaConfig(), None)],
)
def test_max_positions(config, expected):
    assert max_positions(Holder(config)) == expected


def test_preserved_restores_what_was_changed_inside(model, plain_tokenizer):
    model.model.layers[1].mlp.eval()
    flags = [module.training for module in model.modules()]
    side = plain_tokenizer.padding_side
    with pytest.raises(RuntimeError, match="stop"), preserved(model, plain_tokenizer):
        model.eval()
        model.config.use_cache = not model.config.use_cache
        model.generation_config.max_length = 3
        plain_tokenizer.padding_side = "left" if side == "right" else "right"
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        raise RuntimeError("stop")
    assert [module.training for module in model.modules()] == flags
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert plain_tokenizer.padding_side == side and model.generation_config.max_length != 3
