"""The plan of a run: what each stage trains, for how many optimizer steps, at which learning rates. No torch in here.

Step counts are exact arithmetic: a stage takes `ceil(examples * epochs / batch_size)` steps unless it says `steps`;
`trainer.max_steps` is the total of the run, whatever that gives, shared among the stages in proportion by largest
remainder, at least one step each; so two recipes with the same `max_steps` and batch size see equally many examples.
"""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from fractions import Fraction
from math import ceil
from typing import Any

from loramoe_train.errors import ConfigError, nearest
from loramoe_train.schema.trainer import RoutingMode, StageConfig, Trainable, TrainerConfig


@dataclass(frozen=True)
class StagePlan:
    """One stage with every default resolved."""

    name: str
    index: int  # position among the stages
    first_step: int  # global number of its first optimizer step, counted from 0
    steps: int  # optimizer steps
    examples: int  # distinct examples it draws on
    train: tuple[Trainable, ...]
    routing: RoutingMode
    lr: float  # of the experts (or the base), at the top of the schedule
    router_lr: float
    warmup_steps: int
    aux_losses: tuple[str, ...]
    anchor: float

    @property
    def end_step(self) -> int:
        """Global number of optimizer steps taken when the stage is complete."""
        return self.first_step + self.steps

    def plain(self) -> dict[str, Any]:
        """As JSON would give it back: stored in checkpoints, to tell whether a resumed stage is still the same."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}


def plan_stages(
    trainer: TrainerConfig, sizes: Mapping[str, int], *, aux_losses: Iterable[str] = ()
) -> tuple[StagePlan, ...]:
    """Resolve the stages of a run, in order.

    Args:
        trainer: the trainer group.
        sizes: stage name -> distinct examples at hand for it; a stage's own `examples` caps it.
        aux_losses: names of the configured auxiliary losses.

    Raises:
        ConfigError: a stage that could not train what it says, an unknown auxiliary loss, or too few steps.
    """
    known_aux = tuple(aux_losses)
    steps, examples = {}, {}
    for name, stage in trainer.stages.items():
        examples[name] = min(sizes[name], stage.examples or sizes[name])
        if examples[name] < 1:
            raise ConfigError(f"trainer.stages.{name}: its mixture holds no examples; give it at least one")
        steps[name] = stage.steps or _passes(examples[name], stage.epochs or trainer.epochs, trainer.batch_size)
    if trainer.max_steps is not None:
        steps = _shared(steps, trainer.max_steps)
    plans, first_step = [], 0
    for index, (name, stage) in enumerate(trainer.stages.items()):
        plans.append(
            StagePlan(
                name=name,
                index=index,
                first_step=first_step,
                steps=steps[name],
                examples=examples[name],
                train=_trained(name, stage),
                routing=stage.routing,
                lr=stage.lr or trainer.lr,
                router_lr=stage.router_lr or trainer.router_lr or stage.lr or trainer.lr,
                warmup_steps=min(ceil(Fraction(str(trainer.warmup_fraction)) * steps[name]), steps[name] - 1),
                aux_losses=_aux_losses(name, stage, known_aux),
                anchor=stage.anchor,
            )
        )
        first_step += steps[name]
    return tuple(plans)


def _passes(examples: int, epochs: float, batch_size: int) -> int:
    # Fraction of the decimal text: 0.1 of 1,000 examples is 100, not 100.00000000000001
    return ceil(Fraction(str(epochs)) * examples / batch_size)


def _shared(steps: dict[str, int], limit: int) -> dict[str, int]:
    """`limit` steps shared in proportion to `steps` by largest remainder, at least one each."""
    total = sum(steps.values())
    if limit < len(steps):
        raise ConfigError(
            f"trainer.max_steps is {limit} for {len(steps)} stages ({', '.join(steps)}); give at least {len(steps)}"
        )
    shares = {name: Fraction(count * limit, total) for name, count in steps.items()}
    shared = {name: int(share) for name, share in shares.items()}
    by_remainder = sorted(steps, key=lambda name: shared[name] - shares[name])  # stable: ties go to the earlier stage
    for name in by_remainder[: limit - sum(shared.values())]:
        shared[name] += 1
    for name in [name for name, count in shared.items() if count == 0]:
        shared[max(shared, key=shared.__getitem__)] -= 1
        shared[name] = 1
    return shared


def _trained(name: str, stage: StageConfig) -> tuple[Trainable, ...]:
    key = f"trainer.stages.{name}"
    if not stage.train:
        raise ConfigError(f"{key}.train is empty; name experts, routers or both, or base")
    if "routers" in stage.train and stage.routing != "learned":
        raise ConfigError(
            f"{key}.train names routers, but {key}.routing={stage.routing} never asks them, so they would get no "
            f"gradient; set {key}.train=[experts] or {key}.routing=learned"
        )
    if stage.anchor > 0 and "experts" not in stage.train:
        raise ConfigError(f"{key}.anchor is {stage.anchor} but the stage does not train the experts; set it to 0")
    return tuple(dict.fromkeys(stage.train))


def _aux_losses(name: str, stage: StageConfig, known: tuple[str, ...]) -> tuple[str, ...]:
    """The stage's terms. Under fixed routing nothing is scored, so `null` means none there."""
    if stage.aux_loss is None:
        return known if stage.routing == "learned" else ()
    for entry in stage.aux_loss:
        if entry not in known:
            raise ConfigError(f"trainer.stages.{name}.aux_loss names '{entry}'{nearest(entry, known)}")
    if stage.aux_loss and stage.routing != "learned":
        raise ConfigError(
            f"trainer.stages.{name}.aux_loss is {stage.aux_loss}, but under routing={stage.routing} no router scores "
            f"anything; set it to [] or use routing=learned"
        )
    return tuple(dict.fromkeys(stage.aux_loss))
