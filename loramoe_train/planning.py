"""`loramoe-plan`: what a run would be, from shapes alone: sites, parameters, memory, steps, and the files it needs."""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from loramoe_train import footprint
from loramoe_train.build import RoutedModel, attach, build_aux
from loramoe_train.errors import LoramoeError
from loramoe_train.experts.plan import ExpertSpec
from loramoe_train.models import files_needed, meta_model
from loramoe_train.routing.context import RoutingContext
from loramoe_train.schema.run import RunConfig
from loramoe_train.screen import quiet_libraries, screen
from loramoe_train.settle import benchmark_names, settle
from loramoe_train.site_plan import plan_sites, read_adapters
from loramoe_train.training.stages import StagePlan, plan_stages
from loramoe_train.validation import domains_of, trains_base

MEASURED_ROWS = 100  # per task, to estimate tokens


@dataclass(frozen=True)
class Counts:
    """Parameters by kind, in scalars."""

    base: int
    experts: int
    routers: int
    trained: int  # by at least one stage, the base's included
    active: int  # of experts and routers, that a token goes through
    experts_by_kind: Mapping[str, int]

    @property
    def total(self) -> int:
        return self.base + self.experts + self.routers


def count_parameters(config: RunConfig, routed: RoutedModel, base: int) -> Counts:
    """Count what was attached. A token's active part is its top_k experts where selection is sparse, else all."""
    routers = footprint.count(routed.groups["routers"].values())
    experts, active, by_kind = 0, routers, {}
    for site, spec in routed.plan.items():
        bank = routed.layers[site].bank
        own = footprint.count(bank.parameters())
        experts, by_kind[spec.site.kind] = experts + own, by_kind.get(spec.site.kind, 0) + own
        active += bank.active_parameters(spec.top_k or spec.num_experts)
    trains = {kind for stage in config.trainer.stages.values() for kind in stage.train}
    trained = (experts if "experts" in trains else 0) + (routers if "routers" in trains else 0)
    trained += base if "base" in trains else 0
    return Counts(base, experts, routers, trained, active, by_kind)


def make_counts(config: RunConfig) -> tuple[Counts, dict[str, ExpertSpec], nn.Module, int]:
    """(counts, plan, routed model on the meta device, bytes of its base)."""
    model = meta_model(config.model)
    base, bytes_of_base = (
        footprint.count(model.parameters()),
        footprint.base_bytes(model, config.model.dtype, config.model.quantization),
    )
    domains = domains_of(config)
    adapters = read_adapters(config)
    plan = plan_sites(config, model, domains, adapters)
    routed = attach(config, model, plan, num_domains=len(domains))
    build_aux(config, plan)  # a loss that does not fit the plan is told here, too
    return count_parameters(config, routed, base), plan, model, bytes_of_base


def print_plan(
    config: RunConfig,
    *,
    batch: int | None = None,
    sequence: int | None = None,
    tokens_per_second: float | None = None,
) -> None:
    """Print the plan on stdout. `batch` and `sequence` default to the run's micro-batch and maximal length.

    `tokens_per_second`: of all processes together, as a run logs it; then the time is estimated too.
    """
    settled = settle(config, check_files=False)
    counts, plan, model, bytes_of_base = make_counts(config)
    quiet_libraries()
    console = screen()
    if plan:
        _print_sites(console, config, plan)
    _print_counts(console, counts)
    _print_memory(console, config, counts, model, bytes_of_base, batch, sequence)
    _print_steps(console, config, settled.max_positions, tokens_per_second)
    _print_files(console, config, settled.max_positions)


def _print_sites(console: Any, config: RunConfig, plan: Mapping[str, ExpertSpec]) -> None:
    from rich.table import Table

    router = "none" if config.router.make is None else str(config.router.make["_target_"]).rpartition(".")[2]
    first = config.router.make or {}
    score = first.get("score")
    if isinstance(score, Mapping):
        router += f" ({str(score['_target_']).rpartition('.')[2]})"
    table = Table(title=f"{config.model.name}: {len(plan)} sites", title_justify="left")
    for name in ("layers", "module", "kind", "in", "out", "experts", "rank", "top-k", "router"):
        text = name in ("layers", "module", "kind", "router")
        table.add_column(
            name, justify="left" if text else "right", no_wrap=name == "module", min_width=8 if text else 0
        )

    def shape(spec: ExpertSpec) -> tuple[Any, ...]:
        tail = spec.site.name.split(f".{spec.site.layer}.", 1)[-1]
        ranks = str(spec.ranks[0]) if len(set(spec.ranks)) == 1 else "/".join(map(str, spec.ranks))
        site = spec.site
        sizes = site.in_features, site.out_features, spec.num_experts, ranks, spec.top_k or "all"
        return tail, site.kind, *sizes, router if spec.routed else "none"

    ordered = sorted(plan.values(), key=lambda spec: (shape(spec)[0], spec.site.layer))
    for key, run in itertools.groupby(ordered, key=shape):
        layers = [spec.site.layer for spec in run]
        table.add_row(_ranges(layers), *[str(v) for v in key])
    console.print(table)


def _ranges(numbers: list[int]) -> str:
    """[0, 1, 2, 5] -> "0-2, 5"."""
    parts = []
    for _, run in itertools.groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0]):
        group = [number for _, number in run]
        parts.append(str(group[0]) if len(group) == 1 else f"{group[0]}-{group[-1]}")
    return ", ".join(parts)


def _print_counts(console: Any, counts: Counts) -> None:
    share = 100 * counts.trained / counts.base
    console.print("\nParameters")
    rows = [
        (f"base ({'frozen' if counts.experts else 'trained'})", counts.base, ""),
        ("experts", counts.experts, ""),
        *((f"  {kind}", number, "") for kind, number in counts.experts_by_kind.items()),
        ("routers", counts.routers, ""),
        ("trainable", counts.trained, f"{share:.3f} % of the base"),
        ("active per token", counts.active, "experts and routers that one token goes through in evaluation"),
        ("total", counts.total, ""),
    ]
    for label, number, note in rows:
        console.print(f"  {label:<18}{number:>18,}  {note}".rstrip())


def _print_memory(
    console: Any,
    config: RunConfig,
    counts: Counts,
    model: nn.Module,
    base: int,
    batch: int | None,
    sequence: int | None,
) -> None:
    rows = run_memory(config, counts, model, base, batch, sequence).rows()
    batch, sequence = batch or config.trainer.micro_batch_size, sequence or config.data.max_length
    console.print(f"\nMemory per process for {batch} x {sequence} tokens, every position filled")
    for label, size in rows:
        console.print(f"  {label:<36}{'not measurable here' if size is None else f'{size / 2**20:>14,.1f} MiB'}")


def run_memory(
    config: RunConfig, counts: Counts, model: nn.Module, base: int, batch: int | None, sequence: int | None
) -> footprint.Memory:
    """Of one process. `base`: bytes of the base model; `batch` and `sequence` as for `print_plan`."""
    batch, sequence = batch or config.trainer.micro_batch_size, sequence or config.data.max_length
    text = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    return footprint.memory(
        base,
        counts.trained,
        counts.experts + counts.routers,
        config.trainer.optimizer,
        _activations(config, batch, sequence),
        # a head that trains is not run in chunks (training/loss.py)
        rows=batch * sequence if trains_base(config) else min(batch * sequence, footprint.LOSS_CHUNK_ROWS),
        vocabulary=text.vocab_size,
    )


def _activations(config: RunConfig, batch: int, sequence: int) -> int | None:
    """Run the routed model on fake tensors in the configured precision."""
    domains, adapters = domains_of(config), read_adapters(config)

    def make() -> tuple[nn.Module, RoutingContext]:
        model = meta_model(config.model, device="cpu")
        routed = attach(config, model, plan_sites(config, model, domains, adapters), num_domains=len(domains))
        for parameter in routed.groups.get("base", {}).values():
            parameter.requires_grad_(True)
        return model.train(), routed.context

    checkpointed = config.model.gradient_checkpointing
    return footprint.saved_activations(make, batch=batch, sequence=sequence, checkpointed=checkpointed)


@dataclass(frozen=True)
class StageWork:
    """What a stage takes from each task. `tokens` is empty where the tokenizer is not here."""

    plan: StagePlan
    examples: Mapping[str, int]
    sizes: Mapping[str, int]  # examples that there are
    tokens: Mapping[str, float]  # estimated


def stage_work(config: RunConfig, max_positions: int | None) -> list[StageWork]:
    """Steps, examples and tokens of every stage. Raises LoramoeError where the data is not here."""
    from loramoe_train.data.build import task_rows
    from loramoe_train.data.sampling import SamplePlan, drawable

    sizes = {task: len(task_rows(config.data, task, "train")[0]) for task in config.data.tasks}
    lengths = _mean_tokens(config, max_positions)
    total, found = drawable(config.data.sampling, sizes), []
    for stage in plan_stages(config.trainer, dict.fromkeys(config.trainer.stages, total), aux_losses=config.aux_loss):
        samples = stage.steps * config.trainer.batch_size
        plan = SamplePlan(
            sizes, config.data.sampling, seed=config.seed, stage=stage.name, total=samples, examples=stage.examples
        )
        drawn = plan.counts(samples)
        tokens = {task: count * lengths[task] for task, count in drawn.items() if task in lengths}
        found.append(StageWork(stage, drawn, sizes, tokens))
    return found


def _print_steps(console: Any, config: RunConfig, max_positions: int | None, tokens_per_second: float | None) -> None:
    console.print("\nSteps")
    try:
        stages = stage_work(config, max_positions)
    except LoramoeError as error:
        console.print(f"  unknown until the data is here: {error}")
        return
    for work in stages:
        stage = work.plan
        console.print(
            f"  {stage.name}: {stage.steps:,} steps x {config.trainer.batch_size} examples,"
            f" trains {' and '.join(stage.train)}, routing {stage.routing}"
        )
        for task, drawn in work.examples.items():
            tokens = f", about {work.tokens[task]:,.0f} tokens" if task in work.tokens else ""
            console.print(f"    {task:<16}{drawn:>9,} examples ({drawn / work.sizes[task]:.2f} passes){tokens}")
    if not any(work.tokens for work in stages):
        console.print("    tokens: unknown until the tokenizer is here")
    elif tokens_per_second:
        hours = sum(sum(work.tokens.values()) for work in stages) / tokens_per_second / 3600
        console.print(f"  about {hours:,.2f} hours of training at {tokens_per_second:,.0f} tokens/s")


def _mean_tokens(config: RunConfig, max_positions: int | None) -> dict[str, float]:
    """Mean tokens per example of each task, from rows at equal distances; empty without the tokenizer's files."""
    from loramoe_train.data.build import build_mixture
    from loramoe_train.models import load_tokenizer

    try:
        tokenizer = load_tokenizer(config.model)
    except LoramoeError:
        return {}
    mixture = build_mixture(config.data, tokenizer, seed=config.seed, max_positions=max_positions, check=False)
    means = {}
    for index, task in enumerate(mixture.tasks):
        count = min(len(task), MEASURED_ROWS)
        rows = [i * len(task) // count for i in range(count)]
        means[task.name] = sum(len(mixture.example(index, row)) for row in rows) / count
    return means


def _print_files(console: Any, config: RunConfig, max_positions: int | None) -> None:
    from loramoe_train.data.build import task_rows
    from loramoe_train.evaluation.check import check_benchmarks

    console.print("\nNeeded")

    def line(what: str, look: Any) -> None:
        try:
            console.print(f"  here     {what}: {look()}")
        except LoramoeError as error:
            console.print(f"  MISSING  {what}: {error}")

    for needed in files_needed(config.model):
        console.print(f"  {'here   ' if needed.present else 'MISSING'}  model: {needed.name} of {needed.source}")
    for task in config.data.tasks:
        source = config.data.definitions[task].source
        where = source.files.get("train") if config.data.root else source.hub
        line(
            f"task {task}",
            lambda task=task, where=where: f"{where}, {len(task_rows(config.data, task, 'train')[0]):,} rows",
        )
    if config.eval.enabled:
        for name in benchmark_names(config):
            line(
                f"benchmark {name}",
                lambda name=name: _benchmark_line(
                    check_benchmarks([name], config.eval, config.data.root, max_positions), name
                ),
            )


def _benchmark_line(selection: Any, name: str) -> str:
    if name in selection.skipped:
        return f"skipped: {selection.skipped[name]}"
    files = selection.planned[0].files
    return ", ".join(Path(p).name for p in files.values()) if files else "hub"
