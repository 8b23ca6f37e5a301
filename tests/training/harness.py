"""A whole tiny run for the trainer's tests: random Llama, real experts and routers, made-up tasks, exact arithmetic.

Sample i is a function of i. A step of `batch_size` samples is cut into micro-batches of `micro` rows over all ranks, of
which each rank gets its part; so the same step comes in any number of pieces.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from loramoe_train.aux_losses.load_balance import LoadBalance
from loramoe_train.aux_losses.routing_specialization import RoutingSpecialization
from loramoe_train.data.batch import IGNORE, MixedBatch
from loramoe_train.experts.bank import ExpertBank
from loramoe_train.experts.inject import inject, trainable_groups
from loramoe_train.experts.plan import ExpertSpec
from loramoe_train.experts.sites import Site
from loramoe_train.models.loading import checkpoint_activations
from loramoe_train.routers.router import Policy, Router
from loramoe_train.routers.scores import LinearScore
from loramoe_train.routing.context import RoutingContext
from loramoe_train.routing.types import Routing
from loramoe_train.schema.trainer import TrainerConfig
from loramoe_train.training.accelerator import make_accelerator
from loramoe_train.training.loop import fit
from loramoe_train.training.loss import LossHead
from loramoe_train.training.optim import build_optimizer
from loramoe_train.training.parts import AuxTerm, TrainingParts
from loramoe_train.training.routing_stats import RoutingStats
from loramoe_train.training.stages import plan_stages
from loramoe_train.training.step import TrainingStep
from loramoe_train.training.summary import TrainingSummary
from tests.conftest import make_llama

VOCABULARY, LENGTH, TASKS, EXPERTS = 64, 12, ("adding", "naming", "sorting"), 3
SITES = tuple(f"model.layers.{layer}.self_attn.{name}" for layer in (0, 1) for name in ("q_proj", "o_proj"))


def make_sample(index: int) -> tuple[Tensor, Tensor, int]:
    """(ids, labels) of a made-up example of 6 to 12 tokens, and its task."""
    generator = torch.Generator().manual_seed(1000 + index)
    length = int(torch.randint(6, LENGTH + 1, (), generator=generator))
    ids = torch.randint(1, VOCABULARY, (length,), generator=generator)
    labels = ids.clone()
    labels[: int(torch.randint(1, 4, (), generator=generator))] = IGNORE
    return ids, labels, index % len(TASKS)


def make_batch(samples: Sequence[int], *, length: int = LENGTH) -> MixedBatch:
    """One sample a row, padded on the right to `length`."""
    shape = (len(samples), length)
    fields = {name: torch.full(shape, -1) for name in ("task_ids", "domain_ids", "segment_ids")}
    fields |= {"input_ids": torch.zeros(shape, dtype=torch.long), "labels": torch.full(shape, IGNORE)}
    fields |= {"valid": torch.zeros(shape, dtype=torch.bool), "position_ids": torch.zeros(shape, dtype=torch.long)}
    for row, index in enumerate(samples):
        ids, labels, task = make_sample(index)
        own = (row, slice(0, len(ids)))
        fields["input_ids"][own], fields["labels"][own], fields["valid"][own] = ids, labels, True
        fields["task_ids"][own], fields["domain_ids"][own], fields["segment_ids"][own] = task, task, 0
        fields["position_ids"][own] = torch.arange(len(ids))
    return MixedBatch(**fields, example_ids=tuple(f"{TASKS[i % len(TASKS)]}:train:{i}" for i in samples))


class MadeUpData:
    """`StageData`: step s holds samples [s * batch, (s + 1) * batch).

    With `tasks`, the next samples of the first so many tasks alone, sorted by task within a step.
    """

    def __init__(self, batch: int, micro: int, *, offset: int = 0, tasks: int | None = None) -> None:
        self.batch, self.micro, self.offset, self.tasks = batch, micro, offset, tasks

    def steps(self, *, start: int, stop: int, rank: int, world_size: int) -> Iterator[list[MixedBatch]]:
        for step in range(start, stop):
            first = self.offset + step * self.batch
            rows = list(range(first, first + self.batch))
            if self.tasks is not None:
                taken = [row // self.tasks * len(TASKS) + row % self.tasks for row in rows]
                rows = sorted(taken, key=lambda sample: sample % len(TASKS))
            pieces = [rows[i : i + self.micro * world_size] for i in range(0, self.batch, self.micro * world_size)]
            yield [make_batch(piece[rank * self.micro : (rank + 1) * self.micro]) for piece in pieces]


def make_router(spec: ExpertSpec, device: torch.device) -> nn.Module:
    generator = torch.Generator().manual_seed(len(spec.site.name) + spec.site.layer)
    score = LinearScore(
        spec.site.in_features, spec.num_experts, init="normal", std=0.5, device=device, generator=generator
    )
    keep_all = Policy(lambda p_NE: torch.ones_like(p_NE, dtype=torch.bool))
    return Router(score=score, train=keep_all, evaluate=keep_all)


def make_bank(spec: ExpertSpec, device: torch.device, *, dropout: float, fresh: bool) -> ExpertBank:
    generator = torch.Generator().manual_seed(7 + len(spec.site.name) + spec.site.layer)
    size = (spec.site.in_features, spec.site.out_features)
    bank = ExpertBank(*size, ranks=spec.ranks, scales=spec.scales, dropout=dropout, device=device, generator=generator)
    if not fresh:
        with torch.no_grad():
            bank.up.normal_(0.0, 0.1, generator=generator)
    return bank


def make_parts(
    *,
    batch: int = 8,
    micro: int = 8,
    dropout: float = 0.0,
    fresh: bool = False,
    aux: dict[str, AuxTerm] | None = None,
    dtype: torch.dtype = torch.float32,
    validation: bool = True,
    router: Any = make_router,
    ranks: tuple[int, ...] = (2,) * EXPERTS,
    tasks: int | None = None,
    checkpointing: bool = False,
    **model_changes: Any,
) -> TrainingParts:
    """The parts of a run whose numbers depend on nothing but the arguments."""
    model = make_llama(vocab_size=VOCABULARY, seed=3, **model_changes).to(dtype)
    context = RoutingContext(num_domains=EXPERTS)
    plan = {}
    for name in SITES:
        layer = model.get_submodule(name)
        site = Site(name, int(name.split(".")[2]), "attn", layer.in_features, layer.out_features, False)
        plan[name] = ExpertSpec(site, ranks, (1.0,) * len(ranks))
    bank = partial(make_bank, dropout=dropout, fresh=fresh)
    layers = inject(model, plan, make_bank=bank, make_router=router, context=context)
    model.to(dtype)
    if checkpointing:
        checkpoint_activations(model)
    groups = trainable_groups(layers)
    named = groups["experts"] | groups["routers"]

    def save_adapter(folder: Path, tensors: Mapping[str, Tensor]) -> None:
        save_file(dict(tensors), folder / "adapter.safetensors")

    def load_adapter(folder: Path) -> None:
        stored = load_file(folder / "adapter.safetensors")
        with torch.no_grad():
            for name, parameter in named.items():
                parameter.copy_(stored[name])

    return TrainingParts(
        model=model,
        context=context,
        groups=groups,
        sites=SITES,
        aux=both_scopes() if aux is None else aux,
        stage_data=lambda name: MadeUpData(batch, micro, offset=0 if name == "first" else 500, tasks=tasks),
        validation={task: [make_batch([900 + i, 903 + i])] for i, task in enumerate(TASKS)} if validation else {},
        task_names=TASKS,
        adapter_tensors=lambda: {name: p.detach() for name, p in named.items()},
        save_adapter=save_adapter,
        load_adapter=load_adapter,
        layers=tuple(model.model.layers),
    )


def both_scopes() -> dict[str, AuxTerm]:
    return {
        "balance": AuxTerm("balance", 0.1, "step", LoadBalance(top_k=1)),
        "special": AuxTerm("special", 0.3, "micro_batch", RoutingSpecialization(top_k=2, balance_coef=1.0)),
    }


TWO_STAGES = {
    "first": {"train": ["experts"], "routing": "by_domain", "steps": 3},
    "second": {"train": ["experts", "routers"], "steps": 3, "anchor": 0.05},
}


def make_trainer(**changes: Any) -> TrainerConfig:
    settings = {"batch_size": 8, "lr": 5e-3, "log_every": 2, "stages": TWO_STAGES, "warmup_fraction": 0.2}
    return TrainerConfig(**{**settings, **changes})


def train(parts: TrainingParts, trainer: TrainerConfig, run_dir: Path, **options: Any) -> TrainingSummary:
    """`fit` on the CPU with plans and accelerator made as a real run makes them."""
    stages = plan_stages(trainer, dict.fromkeys(trainer.stages, 1000), aux_losses=parts.aux)
    accelerator = make_accelerator(trainer, run_dir, cpu=True)
    return fit(parts, accelerator, trainer, stages, run_dir=run_dir, seed=options.pop("seed", 5), **options)


def weights(parts: TrainingParts) -> dict[str, Tensor]:
    return {name: p.detach().clone() for members in parts.groups.values() for name, p in members.items()}


class PlainRouter(nn.Module):
    """Softmax of W x in the dtype of x: unlike the package's router it also runs in float64."""

    def __init__(self, d_in: int, num_experts: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, d_in))
        with torch.no_grad():
            self.weight.normal_(0.0, 0.5, generator=torch.Generator().manual_seed(d_in))

    def forward(self, x_ND: Tensor, context: RoutingContext) -> Routing:
        logits_NE = x_ND @ self.weight.T
        return Routing(logits_NE.softmax(dim=-1), logits_NE)


class PickyRouter(PlainRouter):
    """Keeps the likelier of all experts but the last, with its probability; nothing ever goes to the last."""

    def forward(self, x_ND: Tensor, context: RoutingContext) -> Routing:
        routing = super().forward(x_ND, context)
        best_N = routing.weights_NE[:, :-1].argmax(dim=-1)
        kept_NE = nn.functional.one_hot(best_N, routing.weights_NE.shape[-1])
        return Routing(routing.weights_NE * kept_NE, routing.logits_NE)


def make_picky_router(spec: ExpertSpec, device: torch.device) -> nn.Module:
    return PickyRouter(spec.site.in_features, spec.num_experts)


def make_plain_router(spec: ExpertSpec, device: torch.device) -> nn.Module:
    return PlainRouter(spec.site.in_features, spec.num_experts)


def double_parts(**options: Any) -> TrainingParts:
    """Parts in float64 throughout, for comparisons that leave no room."""
    return make_parts(dtype=torch.float64, **{"router": make_plain_router, **options})


def make_step(parts: TrainingParts, trainer: TrainerConfig, stage: str, run_dir: Path, **options: Any) -> TrainingStep:
    """One stage's `TrainingStep`, set up as the loop does it, with the weights as they are for anchors."""
    plans = plan_stages(trainer, dict.fromkeys(trainer.stages, 1000), aux_losses=parts.aux)
    plan = next(plan for plan in plans if plan.name == stage)
    accelerator = make_accelerator(trainer, run_dir, cpu=True)
    parts.context.mode = plan.routing
    for group, members in parts.groups.items():
        for parameter in members.values():
            parameter.requires_grad_(group in plan.train)
    parts.model.train()
    with parts.context.override("off"):
        head = LossHead(parts.model)
    anchors = {n: p.detach().clone() for n, p in parts.groups["experts"].items()} if plan.anchor else {}
    optimizer = build_optimizer(trainer, plan, parts.groups)
    stats = RoutingStats(parts.task_names, accelerator)
    shared = dict(seed=5, run_dir=run_dir, anchors=anchors)
    return TrainingStep(parts, parts.model, accelerator, trainer, plan, optimizer, head, stats, **{**shared, **options})
