"""What a launcher may ask of accelerate, told from its environment. Torch-free.

`accelerate launch` hands its flags over as variables. Some would be ignored without a word, others would cut up or
compile the model behind the training step's back; so each is refused, with the key of ours that does the same.
"""

import os
from collections.abc import Mapping

from loramoe_train.errors import ConfigError
from loramoe_train.schema.trainer import TrainerConfig

# how the launcher's own way of sharing out a model is asked for, and its name
SHARDERS = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism config",
}


def check_launcher(trainer: TrainerConfig, environment: Mapping[str, str] = os.environ) -> None:
    """Raise ConfigError where the launcher asks for what this program does not do, or does otherwise."""
    for variable, name in SHARDERS.items():
        if _is_on(environment.get(variable)):
            raise ConfigError(
                f"the launcher asks for {name} ({variable}={environment[variable]}), which would cut up experts and"
                " routers; launch with torchrun or accelerate launch --multi_gpu and set trainer.parallel=fsdp2, which"
                " shares out the frozen base alone"
            )
    precision = environment.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if precision not in ("no", trainer.mixed_precision):
        raise ConfigError(
            f"the launcher sets ACCELERATE_MIXED_PRECISION={precision}, but trainer.mixed_precision is"
            f" {trainer.mixed_precision}, which is what counts; set it here (no, bf16) and leave it out there"
        )
    compiler = environment.get("ACCELERATE_DYNAMO_BACKEND", "no")
    if compiler.lower() != "no":
        raise ConfigError(
            f"the launcher sets ACCELERATE_DYNAMO_BACKEND={compiler}, which would compile the whole model; set"
            " trainer.compile=true instead"
        )


def _is_on(value: str | None) -> bool:
    return (value or "false").lower() in ("1", "true", "yes", "y", "on", "t")
