"""Group `data`: tasks, their text, and how a mixture samples them."""

from typing import Any, Literal

from pydantic import Field, model_validator

from loramoe_train.errors import nearest
from loramoe_train.schema.base import Strict

Split = Literal["train", "validation", "test"]


class SourceConfig(Strict):
    """Where the rows of a task come from: files below `data.root` when that is set, else the hub."""

    hub: str | None = None  # data set name on the hub
    config: str | None = None  # its configuration
    splits: dict[Split, str] = Field(default_factory=dict)  # our split -> the hub's split name
    files: dict[Split, str] = Field(default_factory=dict)  # our split -> json/jsonl/jsonl.gz/parquet below data.root
    keep: str | None = None  # jinja expression over the columns; rows for which it is false are left out


class TaskConfig(Strict):
    """One task: its rows, how a row becomes prompt and answer, its domain and its benchmark."""

    source: SourceConfig
    format: Literal["prompt_answer", "messages", "alpaca", "text"] = "prompt_answer"
    prompt: str | None = None  # jinja template over the columns (prompt_answer)
    answer: str | None = None  # jinja template; carries the loss. A space goes between prompt and answer by hand
    columns: dict[str, str] = Field(default_factory=dict)  # messages / alpaca / text: role -> column name
    domain: str | None = None  # which expert hard routing gives it to; default: the task's own name
    lm_eval: str | None = None  # the benchmark that measures it


class SamplingConfig(Strict):
    """How often each task is drawn. Every block of `block` samples holds exactly the planned counts."""

    strategy: Literal["proportional", "equal", "temperature", "capped", "weights", "schedule"] = "proportional"
    temperature: float = Field(default=2.0, gt=0)  # p ~ size ** (1 / temperature)
    cap: int = Field(default=10_000, gt=0)  # p ~ min(size, cap), in examples
    weights: dict[str, float] = Field(default_factory=dict)  # task -> relative weight (strategies weights, schedule)
    schedule: list[dict[str, Any]] = Field(default_factory=list)  # [{until: fraction of the stage, weights: {...}}]
    block: int = Field(default=64, gt=0)  # samples


class DataConfig(Strict):
    """A mixture of tasks and what happens to their text."""

    root: str | None = None  # folder of local files; null: hub
    tasks: list[str]  # names of configs/data/task/NAME.yaml, of a --config-dir, or of `definitions`
    definitions: dict[str, TaskConfig] = Field(default_factory=dict)  # filled from the task files; or given inline
    sampling: SamplingConfig = Field(default_factory=SamplingConfig)
    max_length: int = Field(default=1024, gt=1)  # tokens per example
    max_examples: int | dict[str, int] | None = None  # per split of every task, or of the named ones; null: all
    validation_examples: int = Field(default=64, ge=0)  # per task, for the evaluation loss during training
    supervise: Literal["answer", "all"] = "answer"  # which tokens carry loss
    packing: bool = False  # several examples in one row, isolated from each other
    # folder of tokenised examples; auto: loramoe/tokens below $XDG_CACHE_HOME or ~/.cache; null: none
    cache_dir: str | None = "auto"

    @model_validator(mode="after")
    def _tasks_are_named_once(self) -> "DataConfig":
        if not self.tasks:
            raise ValueError("is empty; name at least one task")
        caps = self.max_examples if isinstance(self.max_examples, dict) else {"": self.max_examples}
        if any(cap is not None and cap < 1 for cap in caps.values()):
            raise ValueError(f"max_examples={self.max_examples}: at least 1")
        for name in caps:
            if name and name not in self.tasks:
                raise ValueError(
                    f"max_examples names '{name}', which is not among the tasks{nearest(name, self.tasks)}"
                )
        twice = {name for name in self.tasks if self.tasks.count(name) > 1}
        if twice:
            raise ValueError(f"tasks names {sorted(twice)} more than once")
        return self
