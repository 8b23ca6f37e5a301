"""`loramoe-plan --multirun`: what a whole sweep would cost, before it is submitted."""

import json
from collections.abc import Sequence
from dataclasses import dataclass

from loramoe_train.errors import LoramoeError
from loramoe_train.planning import make_counts, run_memory, stage_work
from loramoe_train.schema.run import RunConfig
from loramoe_train.screen import quiet_libraries, screen
from loramoe_train.settle import settle
from loramoe_train.sweeps.sweep import Composed, Sweep, counted, runs_of
from loramoe_train.validation import trains_base

GIB, MIB = 2**30, 2**20
# what changes none of these numbers, or (the seed) only by which examples are drawn
FREE = ("seed", "run_dir", "resume", "launcher", "eval", "trainer.lr", "trainer.router_lr")


@dataclass(frozen=True)
class Cost:
    """Of one run. Steps and tokens are None where the data or the tokenizer is not here."""

    steps: int | None
    tokens: float | None
    memory: int  # bytes, per process
    checkpoint: int  # bytes of one, in the middle of a stage
    on_disk: int  # bytes, at most: what rotation keeps, each stage's last, and the adapter itself


def cost_of(config: RunConfig, *, batch: int | None = None, sequence: int | None = None) -> Cost:
    """Count without reading a weight. Raises LoramoeError as `loramoe-plan` does."""
    settled = settle(config, check_files=False)
    counts, _, model, base = make_counts(config)
    memory = run_memory(config, counts, model, base, batch, sequence)
    steps = tokens = None
    try:
        stages = stage_work(config, settled.max_positions)
    except LoramoeError:
        pass
    else:
        steps = sum(work.plan.steps for work in stages)
        if all(work.tokens.keys() == work.examples.keys() for work in stages):
            tokens = sum(sum(work.tokens.values()) for work in stages)
    weights = 4 * (counts.base if trains_base(config) else counts.experts + counts.routers)
    checkpoint = weights + memory.optimizer
    kept = config.trainer.keep + 1  # and the best
    on_disk = kept * checkpoint + (len(config.trainer.stages) + 1) * weights
    return Cost(steps, tokens, memory.rows()[-1][1] or 0, checkpoint, on_disk)


def print_cost(
    composed: Sequence[Composed],
    *,
    batch: int | None = None,
    sequence: int | None = None,
    tokens_per_second: float | None = None,
) -> None:
    """A row for each run and the sum of them, on stdout. Runs that differ in nothing that costs are counted once."""
    from rich.table import Table

    quiet_libraries()
    sweep: Sweep = runs_of(composed)
    known: dict[str, Cost] = {}
    costs = []
    for number, run in enumerate(composed):
        key = _key(run.config)
        if key not in known:
            try:
                known[key] = cost_of(run.config, batch=batch, sequence=sequence)
            except LoramoeError as error:
                raise type(error)(f"{sweep.label(sweep.runs[number])}: {error}") from error
        costs.append(known[key])
    varying, launcher = sweep.varying(), composed[0].config.launcher
    table = Table(title=counted(composed), title_justify="left", show_footer=True)
    for heading in ("run", *varying):
        table.add_column(heading, footer="all" if heading == "run" else "")
    steps, tokens = _sum([cost.steps for cost in costs]), _sum([cost.tokens for cost in costs])
    disk = sum(cost.on_disk for cost in costs)
    footers = (_count(steps), _count(tokens), f"{max(cost.memory for cost in costs) / GIB:,.2f}", "")
    headings = ("steps", "tokens", "GiB a process", "MiB a checkpoint")
    for heading, footer in zip(headings, footers, strict=True):
        table.add_column(heading, footer=footer, justify="right")
    table.add_column("MiB on disk", footer=f"{disk / MIB:,.1f}", justify="right")
    if tokens_per_second:
        table.add_column("hours", footer=_hours(tokens, tokens_per_second), justify="right")
    for run, cost in zip(sweep.runs, costs, strict=True):
        values = sweep.values(run)
        cells = [str(run.number), *(values.get(key, "").replace("[", r"\[") for key in varying)]
        cells += [_count(cost.steps), _count(cost.tokens), f"{cost.memory / GIB:,.2f}"]
        cells += [f"{cost.checkpoint / MIB:,.1f}", f"{cost.on_disk / MIB:,.1f}"]
        cells += [_hours(cost.tokens, tokens_per_second)] if tokens_per_second else []
        table.add_row(*cells)
    console = screen()
    console.print(table)
    processes = launcher.processes * launcher.nodes
    console.print(
        f"{processes} process{'es' * (processes > 1)} a run; steps are optimizer steps, tokens estimates of what is"
        f" trained on, memory a lower bound (loramoe-plan of one run shows its parts), disk at most"
    )
    if tokens is None:
        console.print("unknown: the data or the tokenizer is not here; loramoe-plan of one run says which")
    if tokens_per_second:
        console.print(f"hours of training at {tokens_per_second:,.0f} tokens/s a run, evaluation not counted")


def _key(config: RunConfig) -> str:
    """The same for two runs that cost the same."""
    values = config.plain()
    for name in FREE:
        *parents, last = name.split(".")
        place = values
        for parent in parents:
            place = place[parent]
        del place[last]
    return json.dumps(values, sort_keys=True)


def _sum(numbers: Sequence[float | None]) -> float | None:
    return None if any(number is None for number in numbers) else sum(numbers)  # type: ignore[arg-type]


def _count(number: float | None) -> str:
    return "unknown" if number is None else f"{number:,.0f}"


def _hours(tokens: float | None, tokens_per_second: float) -> str:
    return "unknown" if tokens is None else f"{tokens / tokens_per_second / 3600:,.2f}"
