"""The benchmarks: one YAML file each, lm-eval's own task keys under `task`, what we need to find its rows beside it.

Every definition has the prompts, targets, filters and metrics of the stock lm-eval 0.4.13 task of the same name (the
tests render both on the same rows), but reads JSON lines below `data.root`. `NAME@N` is a benchmark with N examples
before the question, so that one evaluation can hold `gsm8k@0` and `gsm8k@5`. Nothing here imports lm-eval, torch or
datasets, so that a misspelt benchmark is refused within milliseconds.
"""

import re
from functools import cache
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, ValidationError

from loramoe_train.errors import ConfigError, nearest
from loramoe_train.schema.base import Strict

FOLDER = Path(__file__).parent
DEFAULT_NEW_TOKENS = 256  # lm-eval's own budget for a generation that names none


class HubData(Strict):
    """A data set on the hub."""

    name: str
    config: str | None = None


class Benchmark(Strict):
    """One benchmark, as its file says. `headline` is lm-eval's "metric,filter" key of THE score; higher is better."""

    name: str  # the file's, or FILE@N
    headline: str = Field(pattern=r"^[^,]+,[^,]+$")
    files: dict[str, str]  # lm-eval's split -> file below data.root
    columns: list[str]  # that every row of the files must have
    answer: str  # the one of them that holds the answer; hidden answers are published as "", -1 or null
    task: dict[str, Any]  # lm-eval's task definition, without the data set
    hub: HubData | None = None  # the data set that lm-eval's own definition reads
    same_columns: HubData | None = None  # where that one has other columns than our files: one that has the same
    stock: str | None = None  # lm-eval's own definition, below lm_eval/tasks; null: ours serves the hub too
    mirrors: str | None = None  # without a stock definition that could be loaded as it is: the file that ours repeats
    checked_on: Literal["real rows", "inlined rows"] = "real rows"  # what the tests render ours and lm-eval's file on
    null_columns: list[str] = []  # a row with another value in one of these is no part of the benchmark
    embedded: str | None = None  # folder inside this package that takes the place of a null data.root
    # jinja template over the columns and `response`: the Python code that a response stands for. It is executed, and
    # the rendered `doc_to_target` is the tests that it must pass. null: nothing is executed
    code: str | None = None
    shots: int | None = None  # the N of NAME@N

    @property
    def executes_code(self) -> bool:
        """Whether the score comes from running what the model wrote."""
        return self.code is not None

    @property
    def split(self) -> str:
        """The split that is scored: test where the definition has one, else validation (lm-eval's rule)."""
        return str(self.task.get("test_split") or self.task["validation_split"])

    @property
    def base_name(self) -> str:
        """The name without `@N`."""
        return base_name(self.name)

    @property
    def examples(self) -> list[dict[str, Any]] | None:
        """The few-shot examples that the definition itself brings along; None where they come from a split."""
        return (self.task.get("fewshot_config") or {}).get("samples")

    @property
    def takes_examples(self) -> bool:
        """A definition that says 0 stays at 0 in lm-eval, whatever is asked for."""
        return self.task.get("num_fewshot") != 0

    @property
    def fewshot_split(self) -> str | None:
        """The split that few-shot examples come from; None where the benchmark takes none, or has them written down."""
        if not self.takes_examples or self.shots == 0 or self.examples is not None:
            return None
        return self.task.get("fewshot_split") or self.task.get("training_split") or self.split

    @property
    def spares_document(self) -> bool:
        """Whether lm-eval draws one example more than asked for, to leave out the document being scored."""
        return self.task.get("fewshot_split") == self.task.get("test_split")

    @property
    def generates(self) -> bool:
        return self.task["output_type"] == "generate_until"

    def num_fewshot(self, wanted: int | None) -> int:
        """Examples before the question: N of `NAME@N`, else what is wanted (not where none are taken), else its own."""
        if self.shots is not None:
            return self.shots
        if not self.takes_examples or wanted is None:
            return int(self.task.get("num_fewshot") or 0)
        return wanted

    def new_tokens(self, wanted: int | None) -> int:
        """Longest generation in tokens; 0 for a benchmark that only compares likelihoods."""
        if not self.generates:
            return 0
        return int(wanted or self.task["generation_kwargs"].get("max_gen_toks", DEFAULT_NEW_TOKENS))


def known_benchmarks() -> list[str]:
    """Names of all benchmarks, sorted."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def base_name(name: str) -> str:
    """`gsm8k` of `gsm8k@5`."""
    return name.partition("@")[0]


@cache
def load_benchmark(name: str) -> Benchmark:
    """The benchmark of that name, which may end in `@N`.

    Raises:
        ConfigError: there is none (with the nearest names), it takes no examples, or its file is malformed.
    """
    stem, at, number = name.partition("@")
    if stem not in known_benchmarks():
        raise ConfigError(
            f"eval.tasks: '{name}' is no known benchmark{nearest(stem, known_benchmarks())}; "
            "python -m loramoe_train.evaluation.listing prints them all"
        )
    made = _read(stem)
    if not at:
        return made
    if not re.fullmatch(r"0|[1-9][0-9]{0,3}", number):
        raise ConfigError(f"eval.tasks: '{name}': after @ comes the number of examples, as in {stem}@5")
    if not made.takes_examples:
        raise ConfigError(f"eval.tasks: {name}: {stem} takes no examples before the question; write {stem}")
    return made.model_copy(update={"name": name, "shots": int(number)})


def _read(name: str) -> Benchmark:
    path = FOLDER / f"{name}.yaml"
    try:
        made = Benchmark.model_validate({**yaml.safe_load(path.read_text(encoding="utf-8")), "name": name})
    except (yaml.YAMLError, ValidationError, TypeError) as error:
        raise ConfigError(f"{path.name} is no valid benchmark definition: {' '.join(str(error).split())}") from None
    missing = {made.split, made.fewshot_split} - {None} - made.files.keys()
    if missing:
        raise ConfigError(f"{path.name}: files lacks the split {sorted(missing)[0]!r} that the definition uses")
    return made
