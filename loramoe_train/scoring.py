"""Scores a loaded model into a folder: unit by unit (see `evaluation/units.py`), so that a second start goes on."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from rich.console import Console

from loramoe_train.evaluation.check import check_benchmarks
from loramoe_train.evaluation.harness import BaseMode, Reading, Serving, compare
from loramoe_train.evaluation.outcomes import OutcomeFiles
from loramoe_train.evaluation.results import commit, render_table, write_results
from loramoe_train.evaluation.state import max_positions
from loramoe_train.evaluation.types import BenchmarkResult, Side
from loramoe_train.evaluation.units import (
    SAMPLES,
    Facts,
    Unit,
    facts_of,
    facts_sha256,
    reusable,
    task_facts,
    write_unit,
)
from loramoe_train.files import write_errors
from loramoe_train.models import base_identity
from loramoe_train.rundir import RESULTS
from loramoe_train.schema.model import ModelConfig
from loramoe_train.schema.run import RunConfig, ScoringConfig
from loramoe_train.screen import screen
from loramoe_train.trust import value_at

Config = RunConfig | ScoringConfig
CURE = "nothing that was trained or scored is lost; make room, and start the same command again (training: resume=auto)"


def score(
    config: Config,
    model: Any,
    tokenizer: Any,
    names: Sequence[str],
    folder: Path,
    *,
    facts: Callable[[str, Side], Facts],
    accelerator: Any,
    shared: bool = True,
    console: Console | None,
    base_mode: BaseMode | None,
    serving: Serving = lambda benchmark: nullcontext(),
    reading: Reading | None = None,
    tuned: bool = True,
) -> dict[str, Any]:
    """`harness.compare`, with every unit written into `folder` as it comes, and those that are there already reused.

    Args:
        facts: what identifies the model that a side of a benchmark is answered by; asked on the main process alone.
        shared: requests are split over the processes; False: every process answers all of them.

    Each entry of `scores` also says what it was `made_with`: the facts of its units, and the commit of each.
    """
    selection = check_benchmarks(names, config.eval, config.data.root, max_positions(model))
    made_with: dict[tuple[str, Side], Facts] = {}
    box: list[dict[tuple[str, Side], Unit]] = [{}]
    if accelerator.is_main_process:
        sides: tuple[Side, ...] = ("tuned", "base") if tuned else ("base",)
        for planned in selection.planned:
            for side in sides:
                unit = planned.benchmark.name, side
                made_with[unit] = facts_of(task_facts(planned, config.eval), facts(*unit), config.seed)
        if not config.eval.again:
            box = [_finished(folder / SAMPLES, made_with, config.eval.save_samples)]
    broadcast_object_list(box)  # every process must leave out the same
    (found,) = box

    def keep(side: Side, result: BenchmarkResult) -> None:
        if accelerator.is_main_process:
            with write_errors(str(folder / SAMPLES), CURE):
                save = config.eval.save_samples
                write_unit(folder / SAMPLES, side, result, made_with[result.name, side], save_samples=save)
        _say(console, f"  {result.name} {side}: {result.score:.4f} ({result.seconds:.1f} s)")

    outcomes = OutcomeFiles(folder / SAMPLES, accelerator.process_index)

    def keep_program(name: str, side: Side, program: dict[str, Any]) -> None:
        if config.eval.save_samples:
            with write_errors(str(folder / SAMPLES), CURE):
                outcomes(name, side, program)

    def finished(name: str, side: Side) -> BenchmarkResult | None:
        unit = found.get((name, side))
        if unit is None:
            return None
        _say(console, f"  {name} {side}: {unit.result.score:.4f} (finished before; eval.again=true scores it again)")
        return unit.result

    _say(console, f"evaluating {', '.join(names)}")
    outcome = compare(
        model,
        tokenizer,
        names,
        config=config.eval,
        data_root=config.data.root,
        seed=config.seed,
        base_mode=base_mode,
        serving=serving,
        reading=reading,
        accelerator=accelerator if shared else None,
        on_result=keep,
        on_program=keep_program,
        finished=finished,
        tuned=tuned,
    )
    if accelerator.is_main_process:
        own = commit()
        for name, entry in outcome["scores"].items():
            units = {side: facts for (of, side), facts in made_with.items() if of == name and entry[side] is not None}
            entry["made_with"] = {
                **next(iter(units.values())),
                "model": {side: facts["model"] for side, facts in units.items()},
                "commit": {side: found[name, side].commit if (name, side) in found else own for side in units},
            }
    return outcome


def _finished(
    folder: Path, made_with: Mapping[tuple[str, Side], Facts], save_samples: bool
) -> dict[tuple[str, Side], Unit]:
    units = {unit: reusable(folder, *unit, facts, save_samples=save_samples) for unit, facts in made_with.items()}
    return {key: unit for key, unit in units.items() if unit is not None}


def merged(earlier: Mapping[str, Any], scores: Mapping[str, Any]) -> dict[str, Any]:
    """Scores that a folder had of other benchmarks stay beside the new ones, unless other weights made them."""
    new = {weights for entry in scores.values() for weights in _weights(entry)}
    replaced = {side for side, *_ in new}
    kept = {
        name: entry for name, entry in earlier.items() if all(w in new or w[0] not in replaced for w in _weights(entry))
    }
    return {**kept, **scores}


def _weights(entry: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Side of a score, and base and adapter that it came from; nothing where an older version wrote it."""
    models = value_at(entry, "made_with.model")
    if not isinstance(models, Mapping):
        return []
    keys = ("base.weights_sha256", "adapter_sha256")
    return [(side, str([value_at(facts, key) for key in keys])) for side, facts in models.items()]


def base_facts(config: ModelConfig, tokenizer: Any) -> Facts:
    """What decides the answers of a base model besides the question."""
    loaded = {key: getattr(config, key) for key in ("dtype", "quantization", "attention")}
    return {"base": base_identity(config), "tokenizer_sha256": _tokenizer_sha256(tokenizer), **loaded}


def _tokenizer_sha256(tokenizer: Any) -> str:
    """Of what turns text into ids, and conversations into text."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    words = backend.to_str() if backend is not None else tokenizer.get_vocab()
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items() if name != "pad_token"}
    return facts_sha256([words, special, getattr(tokenizer, "chat_template", None)])


def finish(config: Config, folder: Path, outcome: dict[str, Any], seconds: float, extra: dict[str, Any]) -> None:
    """Write results.json and show the table."""
    results = write_results(
        folder / RESULTS,
        scores=outcome["scores"],
        skipped=outcome["skipped"],
        config=config.plain(),
        seed=config.seed,
        model=config.model.name,
        wall_seconds=seconds,
        extra=extra,
    )
    render_table(results, screen())
    print(f"results: {folder / RESULTS}")


def _say(console: Console | None, text: str) -> None:
    if console is not None:
        console.print(text, highlight=False, soft_wrap=True)
