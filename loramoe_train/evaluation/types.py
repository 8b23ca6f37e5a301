"""What an evaluation yields, and how it reports on its way."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

Side = Literal["tuned", "base"]

Progress = Callable[[str, Side, int, int], None]  # benchmark, side, requests done, requests in all


@dataclass(frozen=True)
class BenchmarkResult:
    """One benchmark on one model."""

    name: str
    metric: str  # lm-eval's "metric,filter" key of the headline
    score: float  # higher is better
    stderr: float | None  # standard error over the documents; None where there is only one
    metrics: dict[str, float]  # every metric, by "metric,filter"
    stderrs: dict[str, float | None]
    n: int  # documents
    num_fewshot: int
    fewshot_seed: int | None  # None without few-shot examples
    version: str  # of the task definition
    seconds: float
    truncated: int  # requests whose prompt lost tokens on the left
    # what was asked: split -> file, its SHA-256 and number of rows; or name and config of the hub's data set
    data: dict[str, Any] = field(default_factory=dict)
    samples: list[dict[str, Any]] = field(default_factory=list, repr=False)  # one record per document
    sandbox: str | None = None  # level of isolation in which the model's code was run; None where none was
