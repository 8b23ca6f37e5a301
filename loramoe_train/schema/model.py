"""Group `model`: which base model, in which precision, and what its linear layers are called."""

from typing import Any, Literal

from pydantic import Field

from loramoe_train.schema.base import Strict


class SuggestConfig(Strict):
    """Sizes that suit this model; `${oc.select:model.suggest.X,DEFAULT}` in other groups and recipes picks them up.

    A paper's rank or learning rate for a 7B model is of no use on one of a few million parameters, and a recipe must
    not fix the model. A key given on the command line wins as always.
    """

    rank: int | None = None
    alpha: float | None = None
    dropout: float | None = None
    lr: float | None = None
    down_lr: float | None = None  # of the down factors where up factors learn many times faster
    router_lr: float | None = None
    base_lr: float | None = None  # where the base's own weights train
    batch_size: int | None = None
    micro_batch_size: int | None = None
    max_steps: int | None = None


class ModelConfig(Strict):
    """The frozen base model and its tokenizer."""

    name: str  # hub name, or the name of an embedded model; recorded in every checkpoint
    path: str | None = None  # a local folder (or a folder with a GGUF file) that replaces the hub
    revision: str | None = None  # hub revision
    gguf_file: str | None = None  # file name inside the folder or hub repository, read through transformers
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the frozen base; what is trained stays float32
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    quantization: Literal["none", "nf4", "int8"] = "none"  # through bitsandbytes
    gradient_checkpointing: bool = False  # the non-reentrant kind
    trust_remote_code: bool = False
    layers: str = "model.layers"  # dotted name of the list of decoder layers
    sites: dict[str, list[str]] = Field(default_factory=dict)  # site kind -> module names inside one layer
    suggest: SuggestConfig = Field(default_factory=SuggestConfig)
    architecture: dict[str, Any] | None = None  # facts of config.json, so that a plan needs no hub
