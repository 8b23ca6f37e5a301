"""Which decoder layer a site belongs to, told from its name; losses and statistics take sites of a layer together."""

import re

_LAYER = re.compile(r"^(.*?\.)?\d+(?=\.|$)")


def layer_of(site: str) -> str:
    """`model.layers.3.self_attn.q_proj` -> `model.layers.3`; a site outside numbered layers is its own layer."""
    match = _LAYER.match(site)
    return match.group(0) if match else site
