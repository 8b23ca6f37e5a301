"""Everything about a wish for benchmarks that can be refused before a model is loaded: fast, no torch, no lm-eval."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from loramoe_train.errors import ConfigError, MissingFileError
from loramoe_train.evaluation.rows import IN_PACKAGE, data_folder, find_file, read_rows
from loramoe_train.evaluation.sandbox import Limits, Sandbox, detect
from loramoe_train.evaluation.tasks import Benchmark, HubData, load_benchmark
from loramoe_train.schema.evaluation import EvalConfig

NO_CODE = "runs model-written code; allow that with eval.allow_code_execution=true"


@dataclass(frozen=True)
class Planned:
    """A benchmark with its rows found and its numbers settled."""

    benchmark: Benchmark
    files: dict[str, Path] | None  # split -> file, only the splits that are needed; None: the hub
    num_fewshot: int
    new_tokens: int  # longest generation; 0 where only likelihoods are compared
    sandbox: Sandbox | None = None  # what contains the code that the model writes; None where none is run


@dataclass(frozen=True)
class Selection:
    """What will run, in the order asked for, and what will not, with the reason."""

    planned: tuple[Planned, ...]
    skipped: dict[str, str]


def check_benchmarks(
    names: Sequence[str], config: EvalConfig, data_root: str | None, max_positions: int | None = None
) -> Selection:
    """Settle what an evaluation will run, or say in one line why it cannot.

    Args:
        names: benchmarks, each once; `NAME@N` is NAME with N examples.
        data_root: folder of local files (`package://...` inside this package), or None for the hub.
        max_positions: longest sequence in tokens that the model holds; None if unlimited or unknown.

    Raises:
        ConfigError: an empty list, an unknown benchmark or one named twice, few-shot number larger than the pool, a
            length that the model cannot hold, or code execution asked for on a machine that cannot contain it.
        MissingFileError: a file is not there, or the hub is needed while offline.
        DataError: a row of a file is malformed, or its answer is hidden.
    """
    if config.tasks is not None and not names:
        raise ConfigError(
            "eval.tasks=[] names nothing to evaluate; set eval.tasks=null for the benchmarks of the mixture's tasks"
        )
    length = _max_length(config, max_positions)
    planned, skipped = [], {}
    _check_distinct(names, config)
    for name in names:
        benchmark = load_benchmark(name)
        if benchmark.executes_code and not config.allow_code_execution:
            skipped[name] = NO_CODE
            continue
        num_fewshot = benchmark.num_fewshot(config.num_fewshot)
        new_tokens = benchmark.new_tokens(config.max_new_tokens)
        check_length(name, new_tokens, length)
        _check_examples(benchmark, num_fewshot)
        files = _find_files(benchmark, data_root, num_fewshot)
        if files is not None:
            _check_files(benchmark, files, num_fewshot)
        sandbox = choose_sandbox(config) if benchmark.executes_code else None
        planned.append(Planned(benchmark, files, num_fewshot, new_tokens, sandbox))
    return Selection(tuple(planned), skipped)


def choose_sandbox(config: EvalConfig) -> Sandbox:
    """What this config and this machine run foreign code in; ConfigError where nothing can contain it."""
    code = config.code
    limits = Limits(code.wall_seconds, code.cpu_seconds, code.memory_mb << 20)
    return detect(config.sandbox, limits, code.workers)


def _check_distinct(names: Sequence[str], config: EvalConfig) -> None:
    """Two equal runs would be stored under one name, or count twice in the mean."""
    seen: dict[tuple[str, int], str] = {}
    for name in names:
        benchmark = load_benchmark(name)
        key = benchmark.base_name, benchmark.num_fewshot(config.num_fewshot)
        if key in seen:
            twice = "is named twice" if seen[key] == name else f"and {name} are the same: {key[1]} examples each"
            raise ConfigError(f"eval.tasks: {seen[key]} {twice}; leave one out")
        seen[key] = name


def _max_length(config: EvalConfig, max_positions: int | None) -> int | None:
    if config.max_length and max_positions and config.max_length > max_positions:
        raise ConfigError(f"eval.max_length={config.max_length} is more than the model's {max_positions} positions")
    return config.max_length or max_positions


def check_length(name: str, new_tokens: int, length: int | None) -> None:
    """Refuse a generation that leaves no room for a prompt. Lengths in tokens."""
    if length is not None and new_tokens >= length:
        raise ConfigError(
            f"{name} generates up to {new_tokens} tokens, but the model holds {length} with the prompt; "
            f"set eval.max_new_tokens below {length}"
        )


def _find_files(benchmark: Benchmark, data_root: str | None, num_fewshot: int) -> dict[str, Path] | None:
    root = data_root
    if root is None and benchmark.embedded:
        root = IN_PACKAGE + benchmark.embedded
    if root is None:
        _check_hub(benchmark)
        return None
    folder, files = data_folder(root), {}
    for split in _splits(benchmark, num_fewshot):
        path = find_file(folder, benchmark.files[split])
        if path is None:
            wanted = folder / benchmark.files[split]
            raise MissingFileError(f"{benchmark.name}: {wanted} is not there; {_cure(benchmark, split, wanted)}")
        files[split] = path
    return files


def _splits(benchmark: Benchmark, num_fewshot: int) -> list[str]:
    """The splits whose rows are needed. Without examples the pool is not: some local sets have no training file."""
    needed = [benchmark.split]
    if num_fewshot and benchmark.fewshot_split not in (None, benchmark.split):
        needed.append(str(benchmark.fewshot_split))
    return needed


def _cure(benchmark: Benchmark, split: str, wanted: Path) -> str:
    if benchmark.embedded:
        return f"its rows ship with the package: data.root={IN_PACKAGE}{benchmark.embedded}"
    source = benchmark.same_columns or benchmark.hub
    assert source is not None
    plain = str(wanted).removesuffix(".gz")
    keep = "".join(f".filter(lambda row: row[{column!r}] is None)" for column in benchmark.null_columns)
    command = _python(source, f", split={split!r}){keep}.to_json({plain!r})")
    return f"set data.root=null to use the hub, or fetch it with: {command}"


def fetch_command(benchmark: Benchmark) -> str:
    """The shell command that puts the data set where an offline run finds it.

    Not `hf download`: offline, datasets 5.2 looks only into its own cache of prepared data sets (as its load.py says).
    """
    assert benchmark.hub is not None
    return _python(benchmark.hub, ")")


def _python(source: HubData, rest: str) -> str:
    arguments = ", ".join(repr(value) for value in (source.name, source.config) if value)
    return f'python -c "from datasets import load_dataset; load_dataset({arguments}{rest}"'


def _check_hub(benchmark: Benchmark) -> None:
    if is_offline() and not _in_cache(benchmark):
        raise MissingFileError(
            f"{benchmark.name}: this run is offline and its data set is not in the local cache; set data.root to a "
            f"folder of local files, or run where there is a network: {fetch_command(benchmark)}"
        )


def is_offline() -> bool:
    """Whether the hub libraries were told to fetch nothing."""
    switches = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")
    return any(os.environ.get(name, "").upper() in {"1", "ON", "YES", "TRUE"} for name in switches)


def _in_cache(benchmark: Benchmark) -> bool:
    """Whether the datasets library has prepared the data set before (in the place that it documents)."""
    assert benchmark.hub is not None
    home = os.environ.get("HF_HOME", os.path.join(os.environ.get("XDG_CACHE_HOME", "~/.cache"), "huggingface"))
    prepared = Path(os.environ.get("HF_DATASETS_CACHE", os.path.join(home, "datasets"))).expanduser()
    return (prepared / benchmark.hub.name.replace("/", "___")).is_dir()


def _check_files(benchmark: Benchmark, files: dict[str, Path], num_fewshot: int) -> None:
    """Every row, not the first alone: what is found now costs seconds, what is found at the end of a run the score."""
    rows = {split: len(read_rows(path, benchmark.columns, answer=benchmark.answer)) for split, path in files.items()}
    if num_fewshot and benchmark.fewshot_split is not None:
        found = rows[benchmark.fewshot_split]
        if found < num_fewshot + int(benchmark.spares_document):
            raise ConfigError(
                f"{_asked(benchmark, num_fewshot)} is more than {benchmark.base_name} can draw:"
                f" {files[benchmark.fewshot_split]} has {found} rows"
                + (" and the document itself is left out" if benchmark.spares_document else "")
            )


def _check_examples(benchmark: Benchmark, num_fewshot: int) -> None:
    """For a benchmark that brings its examples along."""
    if benchmark.examples is not None and num_fewshot > len(benchmark.examples):
        raise ConfigError(
            f"{_asked(benchmark, num_fewshot)} is more than {benchmark.base_name} can show: its definition has"
            f" {len(benchmark.examples)} examples"
        )


def _asked(benchmark: Benchmark, num_fewshot: int) -> str:
    return benchmark.name if benchmark.shots is not None else f"eval.num_fewshot={num_fewshot}"
