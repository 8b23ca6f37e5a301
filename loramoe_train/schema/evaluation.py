"""Group `eval`."""

from typing import Literal

from pydantic import Field

from loramoe_train.schema.base import Strict


class CodeConfig(Strict):
    """What one program of a code benchmark may use, and how many run at a time."""

    wall_seconds: float = Field(default=10.0, gt=0, le=600)
    cpu_seconds: int = Field(default=5, gt=0, le=600)
    memory_mb: int = Field(default=512, ge=128, le=16384)  # address space; Python itself needs some 100
    workers: int | None = Field(default=None, gt=0, le=64)  # null: one per CPU, at most 8


class EvalConfig(Strict):
    """Benchmarks through lm-eval, for the base model and the tuned one."""

    enabled: bool = True  # at the end of training
    tasks: list[str] | None = None  # benchmark names, NAME@N with N examples; null: those of the mixture's tasks
    # benchmark -> task whose experts answer it, where routing depends on the task and no one task's lm_eval says so
    serve_as: dict[str, str] = Field(default_factory=dict)
    base: bool = True  # score the untuned base too
    limit: int | None = Field(default=None, gt=0)  # examples per benchmark; null: all
    # examples before the question, where a benchmark takes any; null: the benchmark's own number
    num_fewshot: int | None = Field(default=None, ge=0)
    # rows of a pass; null: as many as hold a number of tokens. Either is halved where the memory does not suffice
    batch_size: int | None = Field(default=None, gt=0)  # likelihood requests
    generation_batch_size: int | None = Field(default=None, gt=0)
    max_new_tokens: int | None = Field(default=None, gt=0)  # null: the benchmark's own number
    max_length: int | None = Field(default=None, gt=1)  # tokens; null: the model's positions
    chat_template: bool = False
    save_samples: bool = True
    again: bool = False  # score also what an evaluation that was interrupted has finished
    allow_code_execution: bool = False  # HumanEval runs what the model wrote, in a restricted child process
    # how it is contained; auto: the strongest that works, never user, in which code can read what its user can read
    sandbox: Literal["auto", "bubblewrap", "namespaces", "seccomp", "user"] = "auto"
    code: CodeConfig = Field(default_factory=CodeConfig)
