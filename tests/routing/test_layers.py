"""The layer of a site, from its name."""

from loramoe_train.routing.layers import layer_of


def test_layers():
    assert layer_of("model.layers.3.self_attn.q_proj") == "model.layers.3"
    assert layer_of("backbone.layers.12.mixer.in_proj") == "backbone.layers.12"
    assert layer_of("h.0") == "h.0" and layer_of("lm_head") == "lm_head"
