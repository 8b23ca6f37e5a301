"""The runs that a table asks for: every method on every base and data set, for every seed. No torch in here."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from loramoe_train.choices import check_choices
from loramoe_train.composition import chosen_losses, define_tasks, normalised, register, with_hydra_errors
from loramoe_train.errors import ConfigError, LoramoeError, nearest
from loramoe_train.paths import CONFIGS
from loramoe_train.reproduce.schema import PaperTable, Scale
from loramoe_train.schema.run import RunConfig
from loramoe_train.schema.trainer import StageConfig, TrainerConfig
from loramoe_train.trust import refuse_untyped
from loramoe_train.validation import validate

PLACES = ("run_dir", "resume", "launcher")
LR_FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0)


@dataclass(frozen=True)
class Wanted:
    """One run. `variant` sets apart the runs of a method among which the best is chosen (a learning rate)."""

    base: str
    method: str
    train: str
    seed: int
    variant: str
    recipe: str
    config: RunConfig
    given: tuple[str, ...]  # the table's and the user's overrides
    composed: RunConfig  # what they alone make; the rest was decided here (rates, ranks, the order of examples)

    @property
    def folder(self) -> str:
        return "/".join(filter(None, (self.base, self.method, self.train, self.variant, str(self.seed))))

    @property
    def overrides(self) -> tuple[str, ...]:
        """Those with which `loramoe-train` makes the same run."""
        differing = same_run(self.composed, self.config, PLACES)
        changed = [key for key in ("eval.base", *differing) if key != "seed"]
        values = flatten_values(self.config.plain())
        keys = [key for key in dict.fromkeys(changed) if not key.startswith("trainer.stages.")]
        told = [f"{key}={in_hydras_words(values[key])}" for key in keys]
        if any(key.startswith("trainer.stages.") for key in changed):
            stages = {name: stage.model_dump(mode="json", exclude_unset=True) for name, stage in self.stages.items()}
            told.append(f"trainer.stages={in_hydras_words(stages)}")
        return (*self.given, *told, f"seed={self.seed}")

    @property
    def stages(self) -> dict[str, StageConfig]:
        return self.config.trainer.stages


def scale_of(table: PaperTable, name: str) -> Scale:
    """Raises ConfigError for a scale that the table does not have."""
    found = {str(key): scale for key, scale in table.scales.items()}
    if name not in found:
        raise ConfigError(f"scale={name}: this table has no such scale{nearest(name, found)}")
    return found[name]


def chosen(what: str, wished: Sequence[str] | None, known: Mapping[str, Any]) -> list[str]:
    """`known` in its own order, or those of it that were wished for. Raises ConfigError for another."""
    for name in wished or ():
        if name not in known:
            raise ConfigError(f"{what}={name}: the table has no such row{nearest(name, known)}")
    return [name for name in known if not wished or name in wished]


def pairs(table: PaperTable, scale: Scale, methods: Sequence[str], bases: Sequence[str]) -> Iterator[tuple[str, str]]:
    """(base, method) of everything that can be run."""
    for base in bases:
        for method in methods:
            if table.methods[method].recipe is not None and method not in scale.bases[base].without:
                yield base, method


def wanted(
    table: PaperTable,
    scale_name: str,
    *,
    typed: Sequence[str] = (),
    seeds: Sequence[int] | None = None,
    methods: Sequence[str] | None = None,
    bases: Sequence[str] | None = None,
    root: str | None = None,
) -> list[Wanted]:
    """The runs, each with its checked config. `typed`: further overrides, for every run.

    Raises ConfigError naming method and base.
    """
    scale = scale_of(table, scale_name)
    found = []
    for base, method in pairs(
        table, scale, chosen("methods", methods, table.methods), chosen("bases", bases, scale.bases)
    ):
        row = table.methods[method]
        for train in dict.fromkeys(place.train for place in scale.columns.values()):
            given = [*table.overrides(scale_name, base, method, train), *typed]
            try:
                composed = compose_run(given, typed)
            except LoramoeError as error:
                raise type(error)(f"{method} on {base}: {error}") from error
            config = composed.model_copy(update={"run_dir": root, "trainer": same_order(composed.trainer)})
            for seed in seeds or scale.seeds:
                # the untuned base has no seed: one run scores it
                with_base = method == _scores_base(table, scale, base) and seed == (seeds or scale.seeds)[0]
                scored = config.eval.model_copy(update={"base": with_base})
                seeded = config.model_copy(update={"seed": seed, "eval": scored})
                found.append(Wanted(base, method, train, seed, "", str(row.recipe), seeded, tuple(given), composed))
    if not found:
        raise ConfigError("no row of this choice can be run here; loramoe-reproduce NAME run=false says why")
    return found


def _scores_base(table: PaperTable, scale: Scale, base: str) -> str | None:
    """The method of which a run scores the untuned base too; it does not depend on the choice of rows."""
    if not any(row.base for row in table.methods.values()):
        return None
    able = [method for _, method in pairs(table, scale, list(table.methods), [base])]
    return table.reference if table.reference in able else next(iter(able), None)


_registered: list[bool] = []


def compose_run(overrides: Sequence[str], typed: Sequence[str]) -> RunConfig:
    """The checked config of `loramoe-train OVERRIDES`. Raises LoramoeError as the command does."""
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    if not _registered:
        register()
        _registered.append(True)
    check_choices(overrides)
    values: dict[str, Any] = {}

    def job() -> None:
        GlobalHydra.instance().clear()
        with initialize_config_dir(str(CONFIGS), version_base="1.3"):
            values.update(
                OmegaConf.to_container(  # type: ignore[arg-type]
                    compose("train", normalised(overrides)), resolve=True, throw_on_missing=True
                )
            )

    try:
        with_hydra_errors(job)
    except OmegaConfBaseException as error:
        raise ConfigError(str(error).splitlines()[0]) from error
    refuse_untyped(values, typed)
    values["aux_loss"] = chosen_losses(values["aux_loss"], overrides)
    define_tasks(values["data"], [CONFIGS / "data" / "task"])
    return validate(values)


def same_order(trainer: TrainerConfig) -> TrainerConfig:
    """The trainer with its first stage named `train`: the order of examples comes from the seed and the stage's name,
    so every method sees the same examples in the same order.
    """
    (first, stage), *rest = trainer.stages.items()
    if first == "train":
        return trainer
    return trainer.model_copy(update={"stages": {"train": stage, **dict(rest)}})


def with_learning_rates(runs: Sequence[Wanted], factors: Sequence[float] = LR_FACTORS) -> list[Wanted]:
    """Every run at every rate of a grid around its own; the routers' rates go with it. One of them scores the base.

    Raises ConfigError for runs without a validation loss, by which the best is chosen.
    """
    if not all(run.config.data.validation_examples for run in runs):
        raise ConfigError("sweep=lr chooses rates by validation loss, and data.validation_examples=0 leaves none")
    found = []
    for run in runs:
        for factor in factors:
            trainer = _scaled(run.config.trainer, factor)
            with_base = run.config.eval.base and factor == factors[0]
            scored = run.config.eval.model_copy(update={"base": with_base})
            config = run.config.model_copy(update={"trainer": trainer, "eval": scored})
            found.append(replace(run, config=config, variant=f"lr-{trainer.lr:.3g}"))
    return found


def _scaled(trainer: TrainerConfig, factor: float) -> TrainerConfig:
    def rates(part: Any) -> dict[str, float]:
        names = ("lr", "router_lr")
        return {name: float(f"{getattr(part, name) * factor:.6g}") for name in names if getattr(part, name) is not None}

    stages = {name: stage.model_copy(update=rates(stage)) for name, stage in trainer.stages.items()}
    return trainer.model_copy(update={**rates(trainer), "stages": stages})


def same_run(one: RunConfig, other: RunConfig, free: Sequence[str]) -> list[str]:
    """The keys in which two configs differ, but for those below `free`."""
    first, second = flatten_values(one.plain()), flatten_values(other.plain())
    differing = (key for key in sorted(first.keys() | second.keys()) if first.get(key) != second.get(key))
    return [key for key in differing if not any(key == name or key.startswith(f"{name}.") for name in free)]


def flatten_values(values: Any, prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}; lists stay whole."""
    if not isinstance(values, Mapping) or not values:
        return {prefix: list(values) if isinstance(values, tuple) else values}
    parts = (flatten_values(value, f"{prefix}.{key}" if prefix else str(key)) for key, value in values.items())
    return {key: value for part in parts for key, value in part.items()}


def in_hydras_words(value: Any) -> str:
    """A plain value as an override has it."""
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{key}:{in_hydras_words(entry)}" for key, entry in value.items()) + "}"
    if isinstance(value, list | tuple):
        return f"[{','.join(map(in_hydras_words, value))}]"
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)
