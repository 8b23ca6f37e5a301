"""What the training loop is handed. It receives callables and tensors; it never learns what a router or a method is."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from torch import Tensor, nn

from loramoe_train.data.batch import MixedBatch
from loramoe_train.routing.context import RoutingContext
from loramoe_train.routing.types import Routing, Tokens

Records = Mapping[str, Routing]  # site name -> what was decided there


class AuxLoss(Protocol):
    """An unweighted function of the routing records, made so that it is exact over ranks and micro-batches.

    First `statistics` of every micro-batch and rank are added up; then each micro-batch contributes `__call__` with the
    sum, and the contributions of all ranks and micro-batches add up to the loss of their union, gradient included.
    """

    def statistics(self, records: Records, tokens: Tokens) -> Tensor:
        """(K,) float32 without gradient: sums over the valid tokens, so that they can be added."""
        ...

    def __call__(self, records: Records, tokens: Tokens, statistics: Tensor) -> Tensor:
        """Scalar float32 with gradient: this micro-batch's share of the loss, given everybody's statistics."""
        ...


@dataclass(frozen=True)
class AuxTerm:
    """`weight * loss`, with statistics over the whole optimizer step or over one micro-batch (of all ranks)."""

    name: str
    weight: float
    scope: Literal["step", "micro_batch"]
    loss: AuxLoss

    @property
    def balanced(self) -> float | None:
        """The unweighted value at perfectly even use of the experts; None where the loss names none."""
        return getattr(self.loss, "balanced", None)


class StageData(Protocol):
    """The batches of one stage; step `s` is computable without the ones before it."""

    def steps(self, *, start: int, stop: int, rank: int, world_size: int) -> Iterator[list[MixedBatch]]:
        """For each optimizer step of [start, stop), this rank's micro-batches.

        Every rank gets the same number of micro-batches in a step; all ranks' together hold the step's examples.
        """
        ...


@dataclass(frozen=True)
class TrainingParts:
    """A routed model and everything that the loop needs around it."""

    model: nn.Module  # the base with its routed layers; nothing but the groups below may require gradient
    context: RoutingContext
    groups: Mapping[
        str, Mapping[str, nn.Parameter]
    ]  # "experts" | "routers" | "base" -> full parameter name -> parameter
    sites: tuple[str, ...]  # names of all planned sites: each must be called in the first step
    aux: Mapping[str, AuxTerm]
    stage_data: Callable[[str], StageData]  # by stage name
    validation: Mapping[str, list[MixedBatch]]  # task -> batches for the evaluation loss
    task_names: tuple[str, ...]
    adapter_tensors: Callable[[], Mapping[str, Tensor]]  # what an adapter stores: the model's own storage, not copies
    save_adapter: Callable[[Path, Mapping[str, Tensor]], None]  # writes them and a manifest into a folder; any thread
    load_adapter: Callable[[Path], None]  # reads them back into the model
    layers: tuple[nn.Module, ...] = ()  # the decoder layers, which `trainer.parallel=fsdp2` shares out
