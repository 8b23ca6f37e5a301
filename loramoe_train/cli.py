"""The commands. Hydra composes, `validation.py` checks, then one function of the program gets a typed `RunConfig`.

Nothing heavy is imported here: `--help` and `--cfg job` answer at once. `composition.py` turns Hydra's values into the
config, `guard.py` errors into one line and an exit code.
"""

import os
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

from loramoe_train.choices import check_choices, check_options
from loramoe_train.composition import Extras, is_sweep, normalised, ordered, register, typed_run, with_hydra_errors
from loramoe_train.errors import ConfigError, LoramoeError
from loramoe_train.guard import guard
from loramoe_train.paths import CONFIGS
from loramoe_train.schema.run import RunConfig
from loramoe_train.trust import guard_config_files

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

        if any(run.extra != runs[0].extra for run in runs):
            raise ConfigError("the keys of plan cannot be swept: they are of the whole table; give each once")
        print_cost(runs, **runs[0].extra.get("plan", {}))

    _main(job, extras={"plan": {"batch": int, "sequence": int, "tokens_per_second": float}}, sweep=sweep)


def data() -> None:
    """`loramoe-data`: processed examples of each task, with the supervised part coloured, and length statistics."""

    def job(config: RunConfig, extra: dict[str, Any]) -> None:
        from loramoe_train.run import show_data

        show_data(config, **extra.get("show", {}))

    _main(job, extras={"show": {"n": int, "ids": bool}})


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

    guard(job, cure="the same command goes on")


def compare() -> None:
    """`loramoe-compare RUN_A [RUN_B]`: two evaluations document by document, with significance."""

    def job() -> None:
        if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
            print(COMPARE_HELP)
            return
        from loramoe_train.evaluation.compare_runs import show

        show(sys.argv[1:])

    guard(job)


def export() -> None:
    """`loramoe-export PATH NEW_FOLDER route=...`: a static route of a routed adapter as a PEFT LoRA folder."""

    def job() -> None:
        if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
            print("loramoe-export RUN_OR_ADAPTER NEW_FOLDER route=uniform|all|expert:NUMBER|domain:NAME|task:NAME")
            return
        from loramoe_train.export import export

        print(export(sys.argv[1:]))

    guard(job)


def sweep() -> None:
    """`loramoe-sweep submit|status|table|retry-failed`: many runs, without waiting for them."""
    if sys.argv[1:2] == ["submit"]:
        sys.argv[1] = "--multirun"
        return _main(_train, sweep=partial(_start_sweep, wait=False))

    def job() -> None:
        from loramoe_train.sweeps.command import run

        run(sys.argv[1:])

    guard(job)


def reproduce() -> None:
    """`loramoe-reproduce NAME`: a paper's table, what was measured here beside what is printed there."""

    def job() -> None:
        from loramoe_train.reproduce.command import run

        run(sys.argv[1:])

    guard(job, cure="the same command goes on")


def _main(command: Command, extras: Extras | None = None, sweep: Callable[..., None] | None = None) -> None:
    """Compose with Hydra from the command line and hand a validated config to `command`.

    `extras` are keys which belong to the command and not to the run (`+plan.batch=8`), with their types. `sweep` gets
    all runs of a --multirun at once (sweeps/sweeper.py); without it, `command` gets them one after another.
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
            command(*typed_run(composed, extras or {}, numbered=is_sweep()))
        except LoramoeError as error:
            if is_sweep():
                raise
            refused.append(error)  # Hydra would print a line of its own before ours

    def run() -> None:
        check_options(sys.argv[1:])
        check_choices(sys.argv[1:])
        if sweep is not None and ({"-m", "--multirun"} & set(sys.argv) or "hydra.mode=MULTIRUN" in sys.argv):
            from loramoe_train.sweeps.sweeper import take_over

            take_over(partial(typed_run, extras=extras or {}), sweep)
        with_hydra_errors(job)
        if refused:
            raise refused[0]

    guard(run)
