"""The commands. Hydra composes, `validation.py` checks, then one function of the program gets a typed `RunConfig`.

Nothing heavy is imported here: `--help` and `--cfg job` answer at once. Every LoramoeError becomes one line on stderr
and its exit code (errors.py); a traceback means a defect.
"""

import os
import re
import select
import signal
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from loramoe_train.errors import (
    ConfigError,
    Interrupted,
    LoramoeError,
    OutOfMemoryError,
    SavedOnSignal,
    nearest,
)
from loramoe_train.paths import CONFIGS, recipe_files
from loramoe_train.schema.run import RunConfig
from loramoe_train.training.signals import Terminated, end_on_signals, ignore_signals
from loramoe_train.trust import guard_config_files, refuse_untyped

EVAL_HELP = """loramoe-eval PATH [KEY=VALUE ...]
    PATH: a run folder, a checkpoint or an adapter folder: its benchmarks, base and tuned; results go into that folder
          a LoRA folder of PEFT (adapter_config.json): base and tuned; model.name= or model.path= for another base
          a model folder, or a hub name OWNER/NAME: one column of scores
    the last two need eval.tasks=[a,b]; their results go to outputs/eval/NAME-HASH, always the same for the same PATH
    run_dir=DIR         results.json and samples/ go there
    eval.limit=N        the first N examples of every benchmark
    data.root=DIR       local files; without it the hub, or what ships with the package
    eval.again=true     score once more what is finished; without it the same command goes on where it was interrupted
    every other key of the groups eval and model, and for a run all that it stored"""
COMPARE_HELP = """loramoe-compare RUN_A RUN_B [format=text|markdown|json] [metrics=headline|all]
    two folders that a run or loramoe-eval wrote, benchmark by benchmark on the same documents: difference, 95 per cent
    interval, p-value, the same corrected for the number of benchmarks (Holm), and whether it is within noise
loramoe-compare RUN [...]
    the base of a run and its tuned model"""

Command = Callable[[RunConfig, dict[str, Any]], None]


def train() -> None:
    """`loramoe-train`: train, evaluate, write the run folder."""

    _main(_train, sweep=partial(_start_sweep, wait=True))


def _train(config: RunConfig, extra: dict[str, Any]) -> None:
    if config.launcher.name == "slurm":
        raise ConfigError(
            "launcher=slurm starts the runs of a sweep; add --multirun, for one run too, or leave it out to train here"
        )
    from loramoe_train.rundir import check_places
    from loramoe_train.settle import settle

    check_places(config)  # both before torch is imported
    settled = settle(config)
    from loramoe_train.run import train_run

    train_run(config, settled)


def _start_sweep(runs: list[Any], hydras: dict[str, Any], *, wait: bool) -> None:
    from loramoe_train.sweeps.start import start

    start(runs, hydras, wait=wait, say=lambda line: print(line, file=sys.stderr, flush=True))


def plan() -> None:
    """`loramoe-plan`: sites, parameters, memory, steps and files of a run, without reading a weight; of a whole sweep,
    with --multirun, what it costs."""

    def job(config: RunConfig, extra: dict[str, Any]) -> None:
        from loramoe_train.planning import print_plan

        print_plan(config, **extra.get("plan", {}))

    def sweep(runs: list[Any], hydras: dict[str, Any]) -> None:
        from loramoe_train.sweeps.cost import print_cost

        print_cost(runs, **runs[0].extra.get("plan", {}))

    _main(job, extras={"plan": ("batch", "sequence", "tokens_per_second")}, sweep=sweep)


def data() -> None:
    """`loramoe-data`: processed examples of each task, with the supervised part coloured, and length statistics."""

    def job(config: RunConfig, extra: dict[str, Any]) -> None:
        from loramoe_train.run import show_data

        show_data(config, **extra.get("show", {}))

    _main(job, extras={"show": ("n", "ids")})


def evaluate() -> None:
    """`loramoe-eval PATH [KEY=VALUE ...]`: benchmarks of a run, a checkpoint, an adapter (PEFT's too) or a model."""

    def job() -> None:
        arguments = sys.argv[1:]
        if not arguments or arguments[0] in ("-h", "--help"):
            print(EVAL_HELP)
            return
        if "=" in arguments[0]:
            raise ConfigError(f"loramoe-eval wants a run, adapter or model folder first, got '{arguments[0]}'")
        from loramoe_train.evaluating import evaluate_path

        evaluate_path(arguments[0], arguments[1:])

    _guard(job, cure="the same command goes on")


def compare() -> None:
    """`loramoe-compare RUN_A [RUN_B]`: two evaluations document by document, with significance."""

    def job() -> None:
        if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
            print(COMPARE_HELP)
            return
        from loramoe_train.evaluation.compare_runs import show

        show(sys.argv[1:])

    _guard(job)


def export() -> None:
    """`loramoe-export PATH NEW_FOLDER route=...`: a static route of a routed adapter as a PEFT LoRA folder."""

    def job() -> None:
        if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
            print("loramoe-export RUN_OR_ADAPTER NEW_FOLDER route=uniform|all|expert:NUMBER|domain:NAME|task:NAME")
            return
        from loramoe_train.export import export

        print(export(sys.argv[1:]))

    _guard(job)


def sweep() -> None:
    """`loramoe-sweep submit|status|table|retry-failed`: many runs, without waiting for them."""
    if sys.argv[1:2] == ["submit"]:
        sys.argv[1] = "--multirun"
        return _main(_train, sweep=partial(_start_sweep, wait=False))

    def job() -> None:
        from loramoe_train.sweeps.command import run

        run(sys.argv[1:])

    _guard(job)


def reproduce() -> None:
    """`loramoe-reproduce NAME`: a paper's table, what was measured here beside what is printed there."""

    def job() -> None:
        from loramoe_train.reproduce.command import run

        run(sys.argv[1:])

    _guard(job, cure="the same command goes on")


def _guard(job: Callable[[], None], cure: str = "the same command with resume=auto goes on") -> None:
    """Run `job`; one line and the right exit code for everything that a user can cause. `cure`: after a signal."""
    # Threads of torch that wait by spinning starve each other where cores are shared: two runs on two cores took 15
    # times as long. Read once, when torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    end_on_signals()  # the training loop has handlers of its own meanwhile; submitit's for SIGUSR2 stays
    try:
        job()
        sys.stdout.flush()
    except LoramoeError as error:
        _fail(str(error), error.exit_code)
    except BrokenPipeError:
        if not _reader_left():
            raise
        sys.exit(128 + signal.SIGPIPE)
    except KeyboardInterrupt:
        _fail("interrupted", Interrupted.exit_code)
    except Terminated as stop:
        _fail(f"stopped by {stop}; {cure}", SavedOnSignal.exit_code)
    except MemoryError:
        _fail("out of memory; lower trainer.micro_batch_size or data.max_length", OutOfMemoryError.exit_code)


def _reader_left() -> bool:
    """Whether nobody reads what we print any more, as behind `| head`; what is left of it then goes nowhere."""
    watch = select.poll()
    watch.register(sys.stdout.fileno(), 0)
    if not watch.poll(0):  # it is another pipe that broke
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return True


def _fail(message: str, code: int) -> None:
    ignore_signals()
    print(f"loramoe: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(code)


def _main(
    command: Command, extras: dict[str, tuple[str, ...]] | None = None, sweep: Callable[..., None] | None = None
) -> None:
    """Compose with Hydra from the command line and hand a validated config to `command`.

    `extras` are groups of keys which belong to the command and not to the run (`+plan.batch=8`). `sweep` gets all runs
    of a --multirun at once (sweeps/sweeper.py); without it, `command` gets them one after another.
    """
    import hydra
    from omegaconf import DictConfig

    # Hydra would print its own, longer message and always exit with 1.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    sys.argv[1:] = ordered(normalised(sys.argv[1:]))
    register()
    guard_config_files()
    refused: list[LoramoeError] = []

    @hydra.main(config_path=str(CONFIGS), config_name="train", version_base="1.3")
    def job(composed: DictConfig) -> None:
        try:
            command(*_typed(composed, extras or {}, numbered=_is_sweep()))
        except LoramoeError as error:
            if _is_sweep():
                raise
            refused.append(error)  # Hydra would print a line of its own before ours

    def run() -> None:
        if sweep is not None and ({"-m", "--multirun"} & set(sys.argv) or "hydra.mode=MULTIRUN" in sys.argv):
            from loramoe_train.sweeps.sweeper import take_over

            take_over(partial(_typed, extras=extras or {}), sweep)
        _with_hydra_errors(job)
        if refused:
            raise refused[0]

    _guard(run)


def _is_sweep() -> bool:
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    return HydraConfig.get().mode == RunMode.MULTIRUN


def normalised(arguments: Sequence[str]) -> list[str]:
    """The arguments with Hydra's `+` where it is a formality: before `recipe=`, and before keys below a free mapping
    (`trainer.stages.mine.steps=5`, `data.sampling.weights.gsm8k=2`), which the schema cannot list.

    A free mapping that is given whole (`trainer.stages={...}`) replaces the recipe's, where Hydra would merge the two.
    """
    from loramoe_train.schema.run import free_mappings

    free = tuple(free_mappings())
    found: list[str] = []
    for argument in arguments:
        key, equals, value = argument.partition("=")
        whole = key in free and "." in key
        if key == "recipe":
            found.append(f"+{argument}")
        elif whole and value.startswith("{"):
            found += [f"~{key}", f"++{argument}"]
        elif equals and (whole or any(key.startswith(f"{name}.") for name in free)):
            found.append(f"++{argument}")
        else:
            found.append(argument)
    return found


def chosen_losses(terms: dict[str, Any] | None, overrides: Sequence[str]) -> dict[str, Any]:
    """The terms of `aux_loss` without what a recipe sets of a loss that is not chosen: after `aux_loss=none` nothing is
    left of its coefficients. What an override itself sets stays, and is refused later: its loss must have been meant.
    """

    def is_chosen(term: Any) -> bool:
        return not isinstance(term, dict) or "_target_" in (term.get("make") or {})

    keys = [text.lstrip("+~").partition("=")[0].split(".") for text in overrides]
    named = {key[1] for key in keys if key[0] == "aux_loss" and len(key) > 1}
    return {name: term for name, term in (terms or {}).items() if name in named or is_chosen(term)}


def ordered(arguments: Sequence[str]) -> list[str]:
    """Options such as `--multirun` before the overrides: Hydra's parser cannot take one in their midst."""

    def is_override(argument: str) -> bool:
        return not argument.startswith("-") and ("=" in argument or argument.startswith("~"))

    return sorted(arguments, key=is_override)


def register() -> None:
    """Tell Hydra the schema's keys and defaults, and every recipe as an option of `recipe` over the whole config."""
    import yaml
    from hydra.core.config_store import ConfigStore

    from loramoe_train.schema.run import defaults

    ConfigStore.instance().store(name="schema", node=defaults())
    for name, path in recipe_files().items():
        group, _, leaf = f"recipe/{name}".rpartition("/")
        ConfigStore.instance().store(
            group=group, name=leaf, node=yaml.safe_load(path.read_text(encoding="utf-8")), package="_global_"
        )


def _typed(
    composed: Any, extras: dict[str, tuple[str, ...]], *, numbered: bool = False
) -> tuple[RunConfig, dict[str, Any]]:
    """The run's config with the tasks' definitions filled in, and the command's own keys.

    `numbered`: its folder is below the one given, as Hydra's own sweeps have it.
    """
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    from loramoe_train.data.definitions import load_definitions
    from loramoe_train.validation import validate

    try:
        values: dict[str, Any] = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)  # type: ignore[assignment]
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None) or "the config"
        raise ConfigError(f"{key}: {str(error).splitlines()[0]}") from error
    own = {}
    for group, names in extras.items():
        own[group] = values.pop(group, {})
        for name in own[group]:
            if name not in names:
                raise ConfigError(f"unknown key {group}.{name}{nearest(name, names)}")
    hydra_config = HydraConfig.get()
    overrides = list(hydra_config.overrides.task)
    refuse_untyped(values, overrides)
    folders = [Path(s.path) / "data" / "task" for s in hydra_config.runtime.config_sources if s.schema == "file"]
    values["aux_loss"] = chosen_losses(values["aux_loss"], overrides)
    tasks, definitions = values["data"].get("tasks"), values["data"].get("definitions") or {}
    if isinstance(tasks, list):
        values["data"]["definitions"] = load_definitions([str(t) for t in tasks if t not in definitions], folders)
        values["data"]["definitions"].update(definitions)
    if numbered:
        parent = values.get("run_dir")
        values["run_dir"] = f"{parent}/{hydra_config.job.num}" if parent else hydra_config.runtime.output_dir
    return validate(values), own


def _with_hydra_errors(job: Callable[[], None]) -> None:
    """Run a Hydra job; turn what Hydra says about the command line into our one line."""
    from hydra.errors import HydraException, MissingConfigException
    from omegaconf.errors import OmegaConfBaseException

    try:
        job()
    except MissingConfigException as error:
        wanted = str(error.missing_cfg_file or "")
        if wanted.startswith("hydra/launcher/submitit"):
            raise ConfigError("launcher=slurm needs hydra-submitit-launcher; install loramoe-train[slurm]") from error
        group, _, name = wanted.rpartition("/")
        options = [str(o) for o in error.options or []]
        shown = f"{group}={name}" if group else wanted
        raise ConfigError(f"unknown option {shown}{nearest(name, options)}") from error
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(_override_error(str(error))) from error


def _override_error(text: str) -> str:
    """One line for a refused override, with the nearest key or group that exists."""
    unknown = re.search(r"Could not override '([^']+)'", text) or re.search(r"Key '([^']+)' is not in struct", text)
    if unknown:
        key = unknown.group(1)
        known = _known_keys()
        return f"unknown key or group '{key}'{nearest(key, known).split('; known')[0]}"
    return " ".join(line.strip() for line in text.splitlines()[:3])


def _known_keys() -> list[str]:
    """Every key of the composed defaults, dotted, and every group."""
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from omegaconf import OmegaConf

    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        values = OmegaConf.to_container(compose("train"))
    found = [path.name for path in CONFIGS.iterdir() if path.is_dir()] + ["recipe"]

    def walk(value: Any, prefix: str) -> None:
        if isinstance(value, dict):
            for name, entry in value.items():
                found.append(f"{prefix}{name}")
                walk(entry, f"{prefix}{name}.")

    walk(values, "")
    return found
