"""Everything about a wish for benchmarks that can be refused before a model is loaded: fast, no torch, no lm-eval."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from loramoe_train.errors import ConfigError, MissingFileError
from loramoe_train.evaluation import sandbox
from loramoe_train.evaluation.rows import IN_PACKAGE, data_folder, find_file, read_rows
from loramoe_train.evaluation.tasks import Benchmark, load_benchmark
from loramoe_train.schema.evaluation import EvalConfig

NO_CODE = "runs model-written code; allow that with eval.allow_code_execution=true"


@dataclass(frozen=True)
class Planned:
    """A benchmark with its rows found and its numbers settled."""

    benchmark: Benchmark
    files: dict[str, Path] | None  # split -> file, only the splits that are needed; None: the hub
    num_fewshot: int
    new_tokens: int  # longest generation; 0 where only likelihoods are compared


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
        names: benchmarks; repeated names count once.
        data_root: folder of local files (`package://...` inside this package), or None for the hub.
        max_positions: longest sequence in tokens that the model holds; None if unlimited or unknown.

    Raises:
        ConfigError: unknown benchmark, few-shot number larger than the pool, a length that the model cannot hold,
            or code execution asked for on a machine that cannot contain it.
        MissingFileError: a file is not there, or the hub is needed while offline.
        DataError: the first row of a file is malformed.
    """
    length = _max_length(config, max_positions)
    planned, skipped = [], {}
    for name in dict.fromkeys(names):
        benchmark = load_benchmark(name)
        if benchmark.executes_code and not config.allow_code_execution:
            skipped[name] = NO_CODE
            continue
        num_fewshot = benchmark.num_fewshot(config.num_fewshot)
        new_tokens = benchmark.new_tokens(config.max_new_tokens)
        _check_length(name, new_tokens, length)
        files = _find_files(benchmark, data_root, num_fewshot)
        if files is not None:
            _check_files(benchmark, files, num_fewshot)
        if benchmark.executes_code:
            sandbox.detect()
        planned.append(Planned(benchmark, files, num_fewshot, new_tokens))
    return Selection(tuple(planned), skipped)


def _max_length(config: EvalConfig, max_positions: int | None) -> int | None:
    if config.max_length and max_positions and config.max_length > max_positions:
        raise ConfigError(f"eval.max_length={config.max_length} is more than the model's {max_positions} positions")
    return config.max_length or max_positions


def _check_length(name: str, new_tokens: int, length: int | None) -> None:
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
            raise MissingFileError(
                f"{benchmark.name}: {folder / benchmark.files[split]} is not there; {_cure(benchmark)}"
            )
        files[split] = path
    return files


def _splits(benchmark: Benchmark, num_fewshot: int) -> list[str]:
    """The splits whose rows are needed. Without examples the pool is not: some local sets have no training file."""
    needed = [benchmark.split]
    if num_fewshot and benchmark.fewshot_split not in (None, benchmark.split):
        needed.append(str(benchmark.fewshot_split))
    return needed


def _cure(benchmark: Benchmark) -> str:
    if benchmark.embedded:
        return f"it ships with the package: data.root={IN_PACKAGE}{benchmark.embedded}"
    return (
        f"put the rows of {benchmark.hub} there as JSON lines ({', '.join(benchmark.columns)}), "
        f"or set data.root=null and run: {download_command(benchmark)}"
    )


def download_command(benchmark: Benchmark) -> str:
    """The shell command that puts the hub's data set into the local cache."""
    return f"hf download --repo-type dataset {benchmark.hub}"


def _check_hub(benchmark: Benchmark) -> None:
    if is_offline() and not _in_cache(str(benchmark.hub)):
        raise MissingFileError(
            f"{benchmark.name} needs the data set {benchmark.hub}; this run is offline and the cache has no copy; "
            f"set data.root to local files, or run where there is a network: {download_command(benchmark)}"
        )


def is_offline() -> bool:
    """Whether the hub libraries were told to fetch nothing."""
    switches = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")
    return any(os.environ.get(name, "").upper() in {"1", "ON", "YES", "TRUE"} for name in switches)


def _in_cache(hub: str) -> bool:
    """Whether a copy of the data set lies in the caches of huggingface_hub or datasets (their documented places)."""
    home = Path(
        os.environ.get("HF_HOME", Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "huggingface")
    ).expanduser()
    hub_cache = Path(os.environ.get("HF_HUB_CACHE", home / "hub")).expanduser()
    datasets_cache = Path(os.environ.get("HF_DATASETS_CACHE", home / "datasets")).expanduser()
    places = (hub_cache / f"datasets--{hub.replace('/', '--')}", datasets_cache / hub.replace("/", "___"))
    return any(place.is_dir() for place in places)


def _check_files(benchmark: Benchmark, files: dict[str, Path], num_fewshot: int) -> None:
    for path in files.values():
        read_rows(path, benchmark.columns, limit=1)
    if num_fewshot:
        pool = files[str(benchmark.fewshot_split)]
        needed = num_fewshot + int(benchmark.spares_document)
        found = len(read_rows(pool, benchmark.columns, limit=needed))
        if found < needed:
            raise ConfigError(
                f"eval.num_fewshot={num_fewshot} is more than {benchmark.name} can draw: {pool} has {found} rows"
                + (" and the document itself is left out" if benchmark.spares_document else "")
            )
