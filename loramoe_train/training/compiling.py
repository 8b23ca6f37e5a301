"""What torch.compile says when it cannot serve a model, as one line; experts/compiled.py is what compiles."""

from collections.abc import Iterator
from contextlib import contextmanager

from loramoe_train.errors import ConfigError
from loramoe_train.schema.trainer import TrainerConfig


@contextmanager
def compile_errors(place: str, trainer: TrainerConfig) -> Iterator[None]:
    """Around a step, whose forward and backward are compiled when they first run. Raises ConfigError for a model that
    cannot be compiled in one piece, or that is compiled again and again."""
    if not trainer.compile:
        yield
        return
    from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException

    try:
        yield
    except (TorchDynamoException, FailOnRecompileLimitHit) as error:
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ConfigError(
            f"{place}: trainer.compile=true cannot serve this model on this machine: {reason[:200]};"
            " set trainer.compile=false"
        ) from error
