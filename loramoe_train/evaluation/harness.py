"""Scores a model that is already in memory on benchmarks, through lm-eval, which only this and `model.py` import.

`evaluate` scores one model; `compare` scores it tuned and, with its adapter switched off, as the base it grew from.
Both refuse what cannot work before they touch the model, and give it back as they found it (`state.preserved`).
"""

import gc
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import lm_eval.api.task
import lm_eval.tasks
import torch
from lm_eval.evaluator import evaluate as run_lm_eval
from torch import nn

from loramoe_train.errors import ConfigError, MissingFileError, OutOfMemoryError
from loramoe_train.evaluation import definitions
from loramoe_train.evaluation.batches import is_out_of_memory
from loramoe_train.evaluation.check import Planned, Selection, check_benchmarks, check_length, fetch_command
from loramoe_train.evaluation.comparison import paired_score
from loramoe_train.evaluation.model import InMemoryModel, Reading
from loramoe_train.evaluation.samples import tidy_samples
from loramoe_train.evaluation.state import max_positions, preserved, seed_all
from loramoe_train.evaluation.statistics import standard_error
from loramoe_train.evaluation.types import BenchmarkResult, Progress, Side
from loramoe_train.schema.evaluation import EvalConfig

log = logging.getLogger(__name__)

# lm-eval's default. Fixed, not the run's seed: every run, and lm-eval's own command line, sees the same examples
FEWSHOT_SEED = 1234

BaseMode = Callable[[], AbstractContextManager[Any]]
Serving = Callable[[str], AbstractContextManager[Any]]
Finished = Callable[[str, Side], BenchmarkResult | None]


def evaluate(
    model: nn.Module,
    tokenizer: Any,
    benchmarks: Sequence[str],
    *,
    config: EvalConfig,
    data_root: str | None,
    seed: int,
    progress: Progress | None = None,
    accelerator: Any = None,
) -> dict[str, BenchmarkResult]:
    """Score one model. Benchmarks that this config skips (see `check_benchmarks`) are left out of the result.

    Args:
        model: a transformers causal language model, routed or not, on the device it shall run on.
        tokenizer: its tokenizer, with an end-of-sequence token.
        data_root: folder of the local files, or None for the hub's data sets with lm-eval's stock tasks.
        seed: of Python, numpy and torch while it runs; few-shot examples depend on `FEWSHOT_SEED` instead.
        progress: called after each finished request, on the first process.
        accelerator: with several processes, requests are split over them and every process gets all results.

    Raises:
        ConfigError, MissingFileError, DataError: see `check_benchmarks`; also a missing chat template.
        OutOfMemoryError: the batch size is too large for the device.
    """
    with _session(model, tokenizer, benchmarks, config, data_root, seed, progress, accelerator) as session:
        return {planned.benchmark.name: session.run(planned, "tuned") for planned in session.selection.planned}


def compare(
    model: nn.Module,
    tokenizer: Any,
    benchmarks: Sequence[str],
    *,
    config: EvalConfig,
    data_root: str | None,
    seed: int,
    base_mode: BaseMode | None,
    serving: Serving = lambda benchmark: nullcontext(),
    reading: Reading | None = None,
    progress: Progress | None = None,
    accelerator: Any = None,
    on_result: Callable[[Side, BenchmarkResult], None] | None = None,
    on_program: Callable[[str, Side, dict[str, Any]], None] | None = None,
    finished: Finished = lambda benchmark, side: None,
    tuned: bool = True,
) -> dict[str, Any]:
    """Score a model as it is and, inside `base_mode()`, as its base: one loaded model, the same prompts.

    Args:
        base_mode: makes a context manager in which the model behaves as its base; None: no base scores.
        serving: makes one, from a benchmark's name, in which the tuned model knows whose examples it answers.
        reading: makes one, from what is known of a batch, in which the model scores given answers: for routing that
            must not look at those. None: nothing needs to be known.
        on_result: gets each result as soon as it is there, on every process; for example to store its samples.
        on_program: gets benchmark, side, code and outcome of each program of the model's when it has been run, on the
            process that ran it.
        finished: gives a result that is known already, the same on every process, which then is not asked for again.
        tuned: False: the model is a base, and nothing else is scored.

    Returns:
        `{"scores": {NAME: entry}, "skipped": {NAME: reason}}`, with the entries of `comparison.paired_score`; their
        base parts are None without `base_mode` or with `config.base` false, their tuned ones with `tuned` false.
    """
    tell = on_result or (lambda side, result: None)
    with _session(model, tokenizer, benchmarks, config, data_root, seed, progress, accelerator) as session:
        session.lm.reading, session.on_program = reading, on_program
        scores = {}
        for planned in session.selection.planned:
            name, results = planned.benchmark.name, {}
            modes: dict[Side, Callable[[], AbstractContextManager[Any]]] = {}
            if tuned:
                modes["tuned"] = lambda name=name: serving(name)
            if base_mode is not None and (config.base or not tuned):
                modes["base"] = base_mode
            for side, mode in modes.items():
                results[side] = finished(name, side)
                if results[side] is None:
                    seed_all(seed)  # the same result whatever was scored before
                    with mode():
                        results[side] = session.run(planned, side)
                    tell(side, results[side])
            scores[name] = paired_score(results.get("tuned"), results.get("base"))
        return {"scores": scores, "skipped": session.selection.skipped}


@contextmanager
def _session(
    model: nn.Module,
    tokenizer: Any,
    benchmarks: Sequence[str],
    config: EvalConfig,
    data_root: str | None,
    seed: int,
    progress: Progress | None,
    accelerator: Any,
) -> Iterator["_Session"]:
    core = accelerator.unwrap_model(model) if accelerator is not None else model
    selection = check_benchmarks(benchmarks, config, data_root, max_positions(core))
    if config.chat_template and not getattr(tokenizer, "chat_template", None):
        raise ConfigError("eval.chat_template=true, but the tokenizer has no chat template")
    if tokenizer.eos_token is None:
        raise ConfigError("the tokenizer has no end-of-sequence token, so generation could not stop")
    processes = accelerator.num_processes if accelerator is not None else 1
    if config.limit is not None and config.limit < processes:
        raise ConfigError(f"eval.limit={config.limit} is fewer than the {processes} processes that share the examples")
    # no_grad, not inference_mode: tensors that a module caches here (rotary tables) must serve in training afterwards
    with preserved(core, tokenizer), torch.no_grad(), _quiet():
        seed_all(seed)
        lm = InMemoryModel(core, tokenizer, config, accelerator if processes > 1 else None, progress)
        for planned in selection.planned:  # again, for models whose config declares no positions
            check_length(planned.benchmark.name, planned.new_tokens, lm.max_length)
        yield _Session(lm, config, selection)


class _Session:
    """A model wrapped for lm-eval, and the tasks, each built once for the tuned and the base run."""

    def __init__(self, lm: InMemoryModel, config: EvalConfig, selection: Selection) -> None:
        self.lm, self.config, self.selection = lm, config, selection
        self._tasks: dict[str, Any] = {}
        self.on_program: Callable[[str, Side, dict[str, Any]], None] | None = None
        self._running: tuple[str, Side] = ("", "tuned")

    def _tell(self, program: dict[str, Any]) -> None:
        if self.on_program is not None:
            self.on_program(*self._running, program)

    def run(self, planned: Planned, side: Side) -> BenchmarkResult:
        name, started = planned.benchmark.name, time.monotonic()
        if name not in self._tasks:
            self._tasks[name] = build_task(planned, self._tell)
        self._running = name, side
        task = self._tasks[name]
        task.set_fewshot_seed(seed=FEWSHOT_SEED)  # both runs draw the same examples
        if planned.num_fewshot and self.lm.world_size > 1:
            task.sampler.sample = _draws_of_one_process(task, self.lm.rank, self.lm.world_size)
        self.lm.start(name, side)
        with _out_of_memory(name):
            raw = run_lm_eval(
                lm=self.lm,
                task_dict={"tasks": {name: task}},
                limit=self.config.limit,
                bootstrap_iters=0,  # standard errors are ours: no process pool, nothing printed
                apply_chat_template=self.config.chat_template,
                fewshot_as_multiturn=self.config.chat_template,
                confirm_run_unsafe_code=self.config.allow_code_execution,
            )
        truncated = self.lm.truncated_everywhere()
        if truncated and self.lm.rank == 0:
            cut = f"{truncated} prompts do not fit into {self.lm.max_length} tokens and lost their start"
            log.warning(f"{name} ({side}): {cut}")
        seconds = time.monotonic() - started
        result = _result(planned, raw, task.config.repeats, truncated, seconds) if raw is not None else None
        return self.lm.share(result)


def _result(planned: Planned, raw: Mapping[str, Any], repeats: int, truncated: int, seconds: float) -> BenchmarkResult:
    name, headline = planned.benchmark.name, planned.benchmark.headline
    found = {key: value for key, value in raw["results"][name].items() if "," in key}
    metrics = {key: float(value) for key, value in found.items() if not key.split(",")[0].endswith("_stderr")}
    samples = tidy_samples(raw["samples"][name], repeats)
    errors = {key: standard_error([sample["metrics"][key] for sample in samples], key.split(",")[0]) for key in metrics}
    return BenchmarkResult(
        name=name,
        metric=headline,
        score=metrics[headline],
        stderr=errors[headline],
        metrics=metrics,
        stderrs=errors,
        n=len(samples),
        num_fewshot=planned.num_fewshot,
        fewshot_seed=FEWSHOT_SEED if planned.num_fewshot else None,
        version=str(raw["versions"].get(name)),
        seconds=seconds,
        truncated=truncated,
        data=definitions.source(planned),
        samples=samples,
        sandbox=planned.sandbox.level if planned.sandbox else None,
    )


def build_task(planned: Planned, on_program: definitions.OnProgram | None = None) -> Any:
    """lm-eval's task object: our definition on local rows, or the stock one on the hub's data set.

    Raises:
        ConfigError: more few-shot examples than the hub's data set has.
        DataError: a row is malformed (names file and line).
        MissingFileError: the hub could not be reached.
    """
    benchmark = planned.benchmark
    if planned.files is not None:
        return _load_task(definitions.local_definition(planned, on_program))
    try:
        if benchmark.stock is None:
            return _load_task(definitions.hub_definition(planned, on_program))
        # an inline group member inherits the stock definition of its name; the index covers one folder, not all tasks
        stock = Path(lm_eval.tasks.__file__).parent / benchmark.stock
        return _load_task(
            {"group": "hub", "task": [definitions.stock_definition(planned, on_program)]}, index=stock.parent
        )
    except (OSError, ValueError) as error:  # what datasets raises for a hub that is out of reach or a name not cached
        reason = " ".join(str(error).split())[:200]
        raise MissingFileError(
            f"{benchmark.name}: its data set could not be loaded ({reason}); set data.root to a folder of local files, "
            f"or run where there is a network: {fetch_command(benchmark)}"
        ) from None


def _draws_of_one_process(task: Any, rank: int, world_size: int) -> Callable[..., Any]:
    """A few-shot sampler that gives each document the examples that it would get in a single process.

    lm-eval draws from one random stream, document after document; a rank that serves every `world_size`-th document
    must therefore throw away the draws of those in between.
    """
    sample, docs, reached = type(task.sampler).sample, task.eval_docs, 0
    mine = iter(range(rank, len(docs), world_size))

    def in_step(n: int, eval_doc: Any = None, **options: Any) -> Any:
        nonlocal reached
        index = next(mine)
        for other in range(reached, index):
            sample(task.sampler, n, eval_doc=None if eval_doc is None else docs[other], **options)
        reached = index + 1
        return sample(task.sampler, n, eval_doc=eval_doc, **options)

    return in_step


def _load_task(definition: dict[str, Any], index: Path | None = None) -> Any:
    # without its defaults the manager does not read thousands of files for six seconds
    manager = lm_eval.tasks.TaskManager(include_defaults=False, include_path=str(index) if index else None)
    (task,) = manager.load([definition])["tasks"].values()
    _check_pool(task)
    return task


def _check_pool(task: Any) -> None:
    """Of the hub's rows, whose number nobody knows before; those of local files have been counted."""
    wanted, found = task.get_config("num_fewshot") or 0, len(task.sampler.df)
    spare = int(task.fewshot_cfg.split == task.config.test_split)  # then lm-eval draws one more
    if wanted and wanted + spare > found:
        raise ConfigError(f"{wanted} examples are more than {task.task_name} can draw: its pool has {found} rows")


@contextmanager
def _quiet() -> Iterator[None]:
    """No warnings about in-memory models, no progress bar per task: the caller has its own."""
    loggers = [logging.getLogger(name) for name in ("lm_eval", "transformers.generation")]
    levels = [logger.level for logger in loggers]
    bar = lm_eval.api.task.tqdm  # the one bar that has no switch
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        lm_eval.api.task.tqdm = lambda docs, **_: docs
        yield
    finally:
        lm_eval.api.task.tqdm = bar
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextmanager
def _out_of_memory(name: str) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        gc.collect()
        raise OutOfMemoryError(
            f"evaluating {name} ran out of memory; lower eval.batch_size, eval.generation_batch_size or eval.max_length"
        ) from None
