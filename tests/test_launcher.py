"""What `accelerate launch` asks for by its environment is done as our keys say, or refused in one line."""

import pytest

from loramoe_train.errors import ConfigError
from loramoe_train.launcher import check_launcher
from loramoe_train.schema.trainer import TrainerConfig
from loramoe_train.settle import settle
from tests.cli import check_refused
from tests.composing import composed
from tests.forks import run_forked


def test_a_plain_launch_is_let_through() -> None:
    plain = {"ACCELERATE_USE_FSDP": "false", "ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_DYNAMO_BACKEND": "NO"}
    for environment in ({}, plain, {"ACCELERATE_USE_CPU": "true"}):
        check_launcher(TrainerConfig(), environment)
    check_launcher(TrainerConfig(mixed_precision="bf16"), {"ACCELERATE_MIXED_PRECISION": "bf16"})


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("ACCELERATE_USE_FSDP", "true", r"asks for FSDP \(ACCELERATE_USE_FSDP=true\).*set trainer\.parallel=fsdp2"),
        ("ACCELERATE_USE_FSDP", "1", "asks for FSDP"),
        ("ACCELERATE_USE_DEEPSPEED", "True", "asks for DeepSpeed .*torchrun"),
        ("ACCELERATE_USE_MEGATRON_LM", "true", "asks for Megatron-LM"),
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "true", "asks for a parallelism config"),
        ("ACCELERATE_MIXED_PRECISION", "bf16", "MIXED_PRECISION=bf16, but trainer.mixed_precision is no"),
        ("ACCELERATE_MIXED_PRECISION", "fp16", r"MIXED_PRECISION=fp16.*set it here \(no, bf16\)"),
        ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR", "DYNAMO_BACKEND=INDUCTOR.* set trainer.compile=true"),
    ],
)
def test_what_would_go_wrong_in_silence_is_refused(variable: str, value: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        check_launcher(TrainerConfig(), {variable: value})
    assert "\n" not in str(caught.value) and caught.value.exit_code == 2


def test_the_command_refuses_it_before_it_starts(tmp_path) -> None:
    """As `accelerate launch --use_fsdp` starts it; DeepSpeed would otherwise end in an import error's traceback."""
    for variable in ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"):
        done = run_forked("train", "+recipe=lora", "run_dir=run", cwd=tmp_path, **{variable: "true"})
        check_refused(done, 2, variable, "trainer.parallel=fsdp2")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("+recipe=full_finetune",), "shares out the frozen base, and here the base trains; set trainer.parallel=ddp"),
        (("+recipe=lora", "model.quantization=nf4"), "packed weights of model.quantization=nf4 cannot be shared out"),
        (("+recipe=lora", "trainer.compile=true"), "set trainer.compile=false or trainer.parallel=ddp"),
    ],
)
def test_what_cannot_be_shared_out_is_refused(overrides: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        settle(composed(*overrides, "trainer.parallel=fsdp2"), check_files=False)
    settle(composed(*overrides), check_files=False)  # it is that key which does not go with them
