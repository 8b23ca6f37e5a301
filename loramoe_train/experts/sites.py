"""A site: one linear layer of the base model that can carry experts. Pure data, the same for a model on any device."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Site:
    """Found by `loramoe_train.models.find_sites`; sizes are those of the layer, also where 4-bit weights are packed."""

    name: str  # full dotted module name
    layer: int  # index of the decoder layer, from 0
    kind: str  # attn_in, attn_out, ffn, ssm, another kind of the model group, or "other"
    in_features: int
    out_features: int
    has_bias: bool
