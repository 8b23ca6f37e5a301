"""`results.json`, the samples beside it, and the table on the screen: base | tuned | difference, per benchmark."""

import hashlib
import json
import math
import platform
import subprocess
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from loramoe_train import __version__, paths
from loramoe_train.errors import DataError, MissingFileError
from loramoe_train.evaluation.types import Side
from loramoe_train.files import write_bytes

LIBRARIES = ("torch", "transformers", "peft", "lm_eval", "datasets", "accelerate")
SIDES = ("base", "tuned", "difference")
MAPPINGS = ("versions", "skipped")  # besides scores
SCHEMA = 1  # of results.json; raised when a reader of older files would misunderstand


def write_results(
    path: str | Path,
    *,
    scores: Mapping[str, Mapping[str, Any]],
    skipped: Mapping[str, str],
    config: Mapping[str, Any] | None,
    seed: int,
    model: str,
    wall_seconds: float,
    extra: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Write `results.json` in one piece and return its content.

    Args:
        scores, skipped: as `harness.compare` returns them.
        config: plain resolved config of the run; its hash is stored. None: no hash.
        model: name of the base model.
        extra: further top-level entries; must not repeat a name.

    Raises:
        ValueError: an entry of `extra` repeats a name.
    """
    content: dict[str, Any] = {
        "schema": SCHEMA,
        "scores": scores,
        "skipped": skipped,
        "config_hash": config_hash(config) if config is not None else None,
        "seed": seed,
        "model": model,
        "versions": versions(),
        "commit": commit(),
        "wall_seconds": round(wall_seconds, 3),
    }
    repeated = content.keys() & (extra or {}).keys()
    if repeated:
        raise ValueError(f"results.json has {sorted(repeated)[0]!r} already")
    content = finite({**content, **(extra or {})})
    _write_aside(Path(path), json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    return content


def write_samples(folder: str | Path, name: str, side: Side, samples: Iterable[Mapping[str, Any]]) -> Path:
    """`FOLDER/NAME.SIDE.jsonl`, one document a line, written in one piece."""
    path = Path(folder) / f"{name}.{side}.jsonl"
    lines = (json.dumps(finite(sample), ensure_ascii=False, allow_nan=False) + "\n" for sample in samples)
    _write_aside(path, "".join(lines))
    return path


def read_results(path: str | Path) -> dict[str, Any]:
    """The content of a `results.json`, or of the one in a folder.

    Raises:
        MissingFileError: there is none.
        DataError: it is cut short, no JSON, or lacks what every results file has.
    """
    path = Path(path)
    path = path / "results.json" if path.is_dir() else path
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise MissingFileError(f"{path} is not there; a finished run or loramoe-eval writes it") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise DataError(f"{path} is not a readable results file ({error}); evaluate again") from None
    if not isinstance(content, dict) or not isinstance(content.get("scores"), dict):
        raise DataError(f"{path} is not a results file: it has no 'scores'; evaluate again")
    for name, score in content["scores"].items():
        if not isinstance(score, dict) or not any(isinstance(score.get(s), int | float) for s in ("tuned", "base")):
            raise DataError(f"{path}: scores.{name} has no number 'tuned' or 'base'; evaluate again")
        wrong = next((s for s in SIDES if not _is_number_or_none(score.get(s))), None)
        if wrong is not None:
            raise DataError(f"{path}: scores.{name}.{wrong} is no number; evaluate again")
    training = content.get("training") or {}
    stages = training.get("stages") or [] if isinstance(training, dict) else None
    whole = isinstance(stages, list) and all(
        isinstance(stage, dict) and _is_number_or_none(stage.get("eval_loss")) for stage in stages
    )
    for name, fits in {
        "training": whole,
        **{key: isinstance(content.get(key) or {}, dict) for key in MAPPINGS},
    }.items():
        if not fits:
            raise DataError(f"{path} is not a results file: its '{name}' is not what a run writes; evaluate again")
    return content


def _is_number_or_none(value: Any) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


def render_table(results: Mapping[str, Any], console: Console) -> None:
    """Print scores in per cent with their standard errors, the mean over benchmarks, and what was skipped and why.

    `p` is that of the difference of a benchmark for itself. Where nothing was tuned there is one column of scores.
    """
    scores = results["scores"]
    compared = any(score.get("tuned") is not None for score in scores.values())
    sides = ("base", "tuned") if compared else ("base",)
    table = Table(title="Benchmarks, per cent", title_justify="left")
    for heading in ("benchmark", "metric"):
        table.add_column(heading)
    for heading in ("n", "shots", *sides, *(("difference", "p") if compared else ())):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, score in scores.items():
        cells = [_cell(score.get(key), score.get(f"{key}_stderr")) for key in sides]
        if compared:
            cells.append(_cell(score.get("difference"), score.get("difference_stderr"), signed=True))
            cells.append(p_cell(score.get("p_value")))
        shots, metric = score.get("num_fewshot"), str(score.get("metric", "")).removesuffix(",none")
        table.add_row(name, metric, str(score.get("n", "")), "" if shots is None else str(shots), *cells)
    if len(scores) > 1:
        table.add_section()
        means = [_cell(_mean(scores, key)) for key in sides]
        means += [_cell(_mean(scores, "difference"), signed=True)] if compared else []
        table.add_row("mean", "", "", "", *means, style="bold")
    if scores:
        console.print(table)
    for name, reason in results.get("skipped", {}).items():
        console.print(f"{name} skipped: {reason}", markup=False, highlight=False)


def _mean(scores: Mapping[str, Mapping[str, Any]], key: str) -> float | None:
    """Over all benchmarks, or None if one of them lacks the number: a mean over a part would mislead."""
    values = [score.get(key) for score in scores.values()]
    return None if any(value is None for value in values) else sum(values) / len(values)  # type: ignore[arg-type]


def p_cell(value: float | None) -> str:
    """A p-value for a table."""
    if value is None:
        return "-"
    return f"{value:.3f}" if value >= 0.001 else "<0.001"


def _cell(value: float | None, error: float | None = None, *, signed: bool = False) -> str:
    if value is None:
        return "-"
    text = f"{100 * value:+.1f}" if signed else f"{100 * value:.1f}"
    return text if error is None else f"{text} ± {100 * error:.1f}"


def config_hash(config: Mapping[str, Any]) -> str:
    """SHA-256 of the plain config as canonical JSON: equal for equal settings, whatever their order."""
    text = json.dumps(config, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def versions() -> dict[str, str | None]:
    """Versions of what scores depend on; None for a library that is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version(), "loramoe_train": __version__}
    for name in LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def commit() -> str | None:
    """The git commit of the checkout that this package runs from, with "+changes" if files differ; None outside one."""
    checkout = paths.PACKAGE.parent
    if not (checkout / ".git").exists():
        return None
    git = ["git", "-C", str(checkout)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=True)
        changes = subprocess.run(
            [*git, "status", "--porcelain"], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return head.stdout.strip() + ("+changes" if changes.stdout.strip() else "")


def finite(value: Any) -> Any:
    """JSON has no NaN or infinity; a number that is none becomes null."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [finite(entry) for entry in value]
    return value


def _write_aside(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, text.encode("utf-8"))
