"""A run on one page: settle, build, train, save, evaluate, write results."""

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, parse_flag_from_env
from rich.console import Console

from loramoe_train.build import RoutedModel, attach, build_aux, check_fit
from loramoe_train.data.build import build_mixture, build_validation
from loramoe_train.data.mixture import Mixture
from loramoe_train.data.sampling import drawable
from loramoe_train.data.stage import MixtureStage, check_batch_size
from loramoe_train.errors import ConfigError
from loramoe_train.evaluation.results import commit, config_hash, versions
from loramoe_train.evaluation.types import Side
from loramoe_train.evaluation.units import Facts, facts_sha256
from loramoe_train.experts import adapters as adapter_files
from loramoe_train.experts.compiled import compile_layers
from loramoe_train.experts.mixed_block import try_blocks
from loramoe_train.files import write_errors
from loramoe_train.models import (
    base_identity,
    check_same_base,
    check_sites,
    load_model,
    load_tokenizer,
    meta_model,
    original_weights,
)
from loramoe_train.run_lock import alone_in
from loramoe_train.rundir import PLACES, claim, default_run_dir, newest_checkpoint, released_on_failure
from loramoe_train.schema.run import RunConfig
from loramoe_train.scoring import base_facts, finish, score
from loramoe_train.screen import quiet_libraries, screen
from loramoe_train.serving import Served, check_same_origins, served_by
from loramoe_train.settle import Settled, benchmark_names, settle
from loramoe_train.site_plan import feed_forwards, plan_sites, read_adapters
from loramoe_train.training.accelerator import make_accelerator, start_trackers
from loramoe_train.training.loop import fit
from loramoe_train.training.memory import memory_errors
from loramoe_train.training.parts import TrainingParts
from loramoe_train.training.sharding import is_shared_out, shares
from loramoe_train.training.stages import StagePlan, plan_stages


@dataclass(frozen=True)
class Prepared:
    """A run, ready to train: model, data and stages."""

    routed: RoutedModel
    tokenizer: Any
    mixture: Mixture
    parts: TrainingParts
    stages: tuple[StagePlan, ...]
    notes: tuple[str, ...]  # how the data was taken


def train_run(config: RunConfig, settled: Settled) -> None:
    """Train as configured, then score base and tuned model. Raises LoramoeError with its exit code."""
    started = time.perf_counter()
    quiet_libraries()
    state = PartialState(cpu=on_cpu())
    run_dir = Path(_agreed(config.run_dir or default_run_dir()))
    with _alone(run_dir, state) as note:
        _train_in(run_dir, config, settled, state, note, started)


@contextmanager
def _alone(run_dir: Path, state: PartialState) -> Iterator[str | None]:
    """`alone_in` for the main process; its refusal comes out on every rank, or the others would wait for ever."""
    note = refusal = None
    with ExitStack() as stack:
        if state.is_main_process:
            try:
                note = stack.enter_context(alone_in(run_dir))
            except ConfigError as error:
                refusal = str(error)
        refusal = _agreed(refusal)
        if refusal is not None:
            raise ConfigError(refusal)
        yield note


def _train_in(
    run_dir: Path, config: RunConfig, settled: Settled, state: PartialState, note: str | None, started: float
) -> None:
    fresh = claim(run_dir, config) if state.is_main_process else False
    state.wait_for_everyone()
    console = screen(stderr=True) if state.is_main_process else None
    if note is not None:
        _say(console, f"note: {note}")
    resume = _agreed(newest_checkpoint(run_dir, config, lambda line: _say(console, line)))
    accelerator = make_accelerator(config.trainer, run_dir, cpu=on_cpu())
    _say(console, f"run folder {run_dir}" + (f", continuing {resume.name}" if resume else ""))

    if config.trainer.parallel == "fsdp2" and state.num_processes == 1:
        _say(console, "note: trainer.parallel=fsdp2 shares nothing out, for this is the only process")
    with released_on_failure(run_dir, fresh=fresh), memory_errors("loading the model"):
        check_batch_size(config.trainer.batch_size, config.trainer.micro_batch_size, state.num_processes)
        shared = shares(accelerator, config.trainer)  # a base that is shared out never is on a device as a whole
        ready = prepare(config, settled, device=torch.device("cpu") if shared else accelerator.device)
    _describe(console, ready)
    start_trackers(accelerator, config.trainer, run_dir, config.plain())
    summary = fit(
        ready.parts,
        accelerator,
        config.trainer,
        ready.stages,
        run_dir=run_dir,
        seed=config.seed,
        resume=resume,
        changed=bool(config.resume_changes),
        made_with=_made_with(config),
        console=console,
    )
    for task, cut in ready.mixture.truncated.items():
        if cut:
            _say(console, f"note: {cut} examples of {task} were cut to data.max_length={config.data.max_length} tokens")
    if state.is_main_process:
        with _written(run_dir):
            ready.parts.save_adapter(run_dir, ready.parts.adapter_tensors())
    mixture = {"tasks": ready.mixture.task_names, "domains": ready.mixture.domain_names}
    served = served_by(config, benchmark_names(config), **mixture) if config.eval.enabled else {}
    benchmarks = {"served": served, "adapter": run_dir}
    outcome = evaluate_routed(config, ready.routed, ready.tokenizer, run_dir, accelerator, console, **benchmarks)
    if state.is_main_process:
        extra = {"training": summary.plain(), "run_dir": str(run_dir), "command": sys.argv, **_recipe()}
        with _written(run_dir):
            finish(config, run_dir, outcome, time.perf_counter() - started, extra)
    accelerator.end_training()  # last: it also takes the processes apart, and evaluation is shared among them


def prepare(config: RunConfig, settled: Settled, *, device: Any) -> Prepared:
    """Load base and data, put experts beside the base's linears, resolve the stages."""
    tokenizer = load_tokenizer(config.model)
    mixture = build_mixture(config.data, tokenizer, seed=config.seed, max_positions=settled.max_positions)
    examples = drawable(config.data.sampling, mixture.sizes)
    stages = plan_stages(config.trainer, dict.fromkeys(config.trainer.stages, examples), aux_losses=config.aux_loss)
    routed = build_routed(config, list(mixture.domain_names), device=device)
    if config.trainer.compile:
        deciding = (*routed.layers.values(), *routed.blocks.values())
        compile_layers(routed.model.get_submodule(config.model.layers), deciding)
    identity = base_identity(config.model)
    facts = _manifest_facts(config, mixture, identity)

    def stage_data(name: str) -> MixtureStage:
        (stage,) = [s for s in stages if s.name == name]
        trainer = config.trainer
        plan = mixture.plan(
            config.data.sampling, stage=name, total=stage.steps * trainer.batch_size, examples=stage.examples
        )
        return MixtureStage(
            mixture,
            plan,
            batch_size=trainer.batch_size,
            micro_batch_size=trainer.micro_batch_size,
            packing=config.data.packing,
            max_length=config.data.max_length,
            num_workers=trainer.num_workers,
        )

    validation, notes = build_validation(config.data, tokenizer, mixture, batch_size=config.trainer.micro_batch_size)
    parts = TrainingParts(
        model=routed.model,
        context=routed.context,
        groups=routed.groups,
        sites=tuple(routed.recorded),
        aux=build_aux(config, routed.plan),
        stage_data=stage_data,
        validation=validation,
        task_names=mixture.task_names,
        adapter_tensors=routed.tensors,
        save_adapter=lambda folder, tensors: adapter_files.save_adapter(folder, tensors, routed.plan, facts),
        load_adapter=lambda folder: load_adapter(folder, routed, identity, key="resume"),
        layers=tuple(routed.model.get_submodule(config.model.layers)),
    )
    if config.init_from is not None:
        folder = adapter_files.find_adapter(config.init_from, "init_from")
        mixed = {"tasks": mixture.task_names, "domains": mixture.domain_names}
        check_same_origins(config, adapter_files.read_manifest(folder), f"init_from={config.init_from}", **mixed)
        load_adapter(folder, routed, identity, key="init_from")
    return Prepared(routed, tokenizer, mixture, parts, stages, (*mixture.notes, *notes))


def build_routed(config: RunConfig, domains: Sequence[str], *, device: Any) -> RoutedModel:
    """The base model on `device` with the configured experts."""
    imported = read_adapters(config)
    # a site that does not exist, or a part that does not fit its site, costs no loading
    shapes = meta_model(config.model)
    wanted = plan_sites(config, shapes, domains, imported)
    feed_forwards(config, shapes, wanted)
    check_fit(config, wanted, shapes)
    model = load_model(config.model, device=device, shapes=shapes)
    plan = plan_sites(config, model, domains, imported)
    routed = attach(config, model, plan, num_domains=len(domains), adapters=imported)
    try_blocks(routed.blocks.values())
    return routed


def rebuild(config: RunConfig, folder: Path, manifest: dict[str, Any], *, device: Any) -> RoutedModel:
    """The routed model of an adapter folder, from its manifest: no other file is needed but the base."""
    identity, plan = base_identity(config.model), adapter_files.plan_of(manifest)
    check_same_base(manifest["base"], identity, f"adapter={folder}")
    # nothing is made in a size that only the manifest claims
    adapter_files.check_stored(folder, plan)
    shapes = meta_model(config.model)
    check_sites(shapes, plan, f"{folder / adapter_files.MANIFEST}")
    model = load_model(config.model, device=device, shapes=shapes)
    mixture = {"num_domains": len(manifest["domains"]), "num_tasks": len(manifest["tasks"])}
    routed = attach(config, model, plan, **mixture)
    routed.context.mode = list(config.trainer.stages.values())[-1].routing  # as it was evaluated after training
    load_adapter(folder, routed, identity, key="adapter")
    return routed


def load_adapter(folder: Path, routed: RoutedModel, identity: dict[str, Any], *, key: str) -> None:
    """Read an adapter into a routed model; refuses one that was trained on another base."""
    manifest = adapter_files.read_manifest(folder)
    check_same_base(manifest["base"], identity, f"{key}={folder}")
    tensors = adapter_files.read_weights(folder, manifest)
    adapter_files.load_weights(routed.tensors(), tensors, f"{key}={folder}")


def evaluate_routed(
    config: RunConfig,
    routed: RoutedModel,
    tokenizer: Any,
    folder: Path,
    accelerator: Any,
    console: Console | None,
    *,
    served: Mapping[str, Served],
    adapter: Path,
) -> dict[str, Any]:
    """Benchmarks of the routed model and of its base, which is the same model with the experts switched off; where the
    base itself was trained, with the weights that it had before. What `folder` has of that already is taken from there.

    `served`: benchmark -> whose experts answer it, where that matters. `adapter`: the folder of the model's adapter.
    """
    if not config.eval.enabled:
        return {"scores": {}, "skipped": {"all": "eval.enabled=false"}}

    def as_base() -> AbstractContextManager[None]:
        return routed.context.override("off") if routed.layers else original_weights(routed.model, config.model)

    return score(
        config,
        routed.model,
        tokenizer,
        benchmark_names(config),
        folder,
        facts=_model_facts(config, tokenizer, adapter, served),
        accelerator=accelerator,
        shared=not is_shared_out(routed.model),  # requests that are split over processes make unequal numbers of passes
        console=console,
        base_mode=as_base,
        serving=lambda name: routed.context.serving(**served[name]),
        reading=routed.context.open if routed.context.reads_prompts else None,
    )


def _model_facts(
    config: RunConfig, tokenizer: Any, adapter: Path, served: Mapping[str, Served]
) -> Callable[[str, Side], Facts]:
    """What decides the answers of a side to a benchmark besides the questions; read when it is first asked for."""

    @cache
    def of_base() -> Facts:
        return base_facts(config.model, tokenizer)

    @cache
    def of_adapter() -> tuple[str, list[Any]]:
        manifest, experts = adapter_files.read_manifest(adapter), config.experts.model_dump(mode="json")
        experts = {key: value for key, value in experts.items() if key not in ("form", "dropout", "adapters")}
        routing = list(config.trainer.stages.values())[-1].routing
        return manifest["weights_sha256"], [experts, config.router.model_dump(mode="json"), routing, manifest["sites"]]

    def facts(name: str, side: Side) -> Facts:
        if side == "base":
            return of_base()
        weights, mixture = of_adapter()
        return of_base() | {"adapter_sha256": weights, "experts_sha256": facts_sha256([*mixture, served[name]])}

    return facts


def show_data(config: RunConfig, *, n: int = 2, ids: bool = False) -> None:
    """`loramoe-data`: processed examples of each task and their statistics."""
    from loramoe_train.data.show import show_data as show

    settled = settle(config, check_files=False)
    tokenizer = load_tokenizer(config.model)
    show(config.data, tokenizer, n=n, ids=ids, console=screen(), seed=config.seed, max_positions=settled.max_positions)


def on_cpu() -> bool:
    """Whether the run stays on the CPU: asked for with ACCELERATE_USE_CPU, or there is nothing else.

    accelerate wants to be told: otherwise two processes on a machine without a GPU both take themselves for the only
    one, and write into one folder.
    """
    return parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()


def _agreed(value: Any) -> Any:
    """Rank 0's value on every rank: two processes may see another second, or another state of a shared disk."""
    box = [value]
    broadcast_object_list(box)
    return box[0]


def _manifest_facts(config: RunConfig, mixture: Mixture, identity: dict[str, Any]) -> dict[str, Any]:
    """What an adapter needs besides its weights and sites to be rebuilt, judged and used."""
    return {
        "base": identity,
        "tasks": list(mixture.task_names),
        "domains": list(mixture.domain_names),
        "config": _placeless(config),
        "versions": versions(),
        "commit": commit(),
    }


def _made_with(config: RunConfig) -> dict[str, Any]:
    """What every number of the log carries."""
    return {
        "config_hash": config_hash({key: value for key, value in _placeless(config).items() if key != "launcher"}),
        "seed": config.seed,
        "versions": versions(),
        "commit": commit(),
    }


def _placeless(config: RunConfig) -> dict[str, Any]:
    """The config without where the run is and what it continues."""
    return {key: value for key, value in config.plain().items() if key not in PLACES}


def _written(place: Path) -> AbstractContextManager[None]:
    return write_errors(str(place), "nothing that was trained is lost; make room, and continue with resume=auto")


def _recipe() -> dict[str, Any]:
    """The recipe's name: as Hydra composed this run or, for a run of a sweep, as its overrides name it."""
    from hydra.core.hydra_config import HydraConfig

    typed = [text.partition("=")[2] for text in sys.argv if text.lstrip("+").startswith("recipe=")]
    choices = HydraConfig.get().runtime.choices if HydraConfig.initialized() else {"recipe": (typed or [None])[-1]}
    return {"recipe": choices.get("recipe")}


def _describe(console: Console | None, ready: Prepared) -> None:
    groups = ready.routed.groups
    where = f" at {len(ready.routed.plan)} sites" if ready.routed.plan else ""
    for kind, members in groups.items():
        if members or where:
            _say(console, f"{kind}: {sum(p.numel() for p in members.values()):,} parameters{where}")
    for note in ready.notes:
        _say(console, f"note: {note}")


def _say(console: Console | None, text: str) -> None:
    if console is not None:
        console.print(text, highlight=False, soft_wrap=True)
