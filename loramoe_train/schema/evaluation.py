"""Group `eval`."""

from pydantic import Field

from loramoe_train.schema.base import Strict


class EvalConfig(Strict):
    """Benchmarks through lm-eval, for the base model and the tuned one."""

    enabled: bool = True  # at the end of training
    tasks: list[str] | None = None  # benchmark names; null: those of the mixture's tasks
    # benchmark -> task whose experts answer it, where routing depends on the task and no one task's lm_eval says so
    serve_as: dict[str, str] = Field(default_factory=dict)
    base: bool = True  # score the untuned base too
    limit: int | None = Field(default=None, gt=0)  # examples per benchmark; null: all
    num_fewshot: int | None = Field(default=None, ge=0)  # null: the benchmark's own number
    batch_size: int = Field(default=16, gt=0)  # likelihood requests
    generation_batch_size: int = Field(default=16, gt=0)
    max_new_tokens: int | None = Field(default=None, gt=0)  # null: the benchmark's own number
    max_length: int | None = Field(default=None, gt=1)  # tokens; null: the model's positions
    chat_template: bool = False
    save_samples: bool = True
    allow_code_execution: bool = False  # HumanEval runs what the model wrote, in a restricted child process
