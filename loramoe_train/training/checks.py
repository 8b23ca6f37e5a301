"""Silent faults made loud: a site that the model bypasses, a parameter without gradient, an expert that never moves.

transformers has mixers that read a projection's weight instead of calling it, checkpointing that drops the gradient of
a side output, and routers that no loss reaches; each trains on happily with experts that do nothing.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from loramoe_train.errors import ConfigError
from loramoe_train.training.parts import TrainingParts
from loramoe_train.training.stages import StagePlan

WATCHED_STEPS = 5  # of a stage: fresh experts start at zero, so routers get their first gradient in the second step
NAMES_IN_MESSAGE = 5


def check_sites_called(sites: Sequence[str], recorded: Mapping[str, int]) -> None:
    """Every planned site must have been asked in the first step. Raises ConfigError naming those that were not."""
    bypassed = [site for site in sites if site not in recorded]
    if bypassed:
        raise ConfigError(
            f"{len(bypassed)} of {len(sites)} sites of experts.sites were never called by the model in the first step, "
            f"so their experts could not train: {_listed(bypassed)}; leave them out of experts.sites"
        )


class GradientCheck:
    """Watches the first steps of a stage for parameters that get no gradient, without waiting for the device."""

    def __init__(self, parts: TrainingParts, plan: StagePlan, *, start: int) -> None:
        """`start` is the step at which this process enters the stage (above 0 when resuming)."""
        # of a base without experts some weights may rightly be unused
        self._groups = {group: dict(parts.groups.get(group, {})) for group in plan.train if group in _MARKERS}
        self._stage = plan.name
        self._last = min(start + WATCHED_STEPS, plan.steps) - 1
        # One step is too few to judge: routers over fresh experts, whose outputs are all zero, get their first gradient
        # in the second one.
        self._judge_zeros = self._last - start >= 1
        self._reached: dict[str, Tensor] = {}

    @torch.no_grad()
    def observe(self, step: int) -> bool:
        """Look at the gradients of a step, before the optimizer uses them. True when `verdict` is due.

        Raises:
            ConfigError: a parameter has no gradient at all. Stacked experts always take part, so that is a fault even
                in the first step; data parallelism would stop on it in the second, with a message about reducers.
        """
        if step > self._last:
            return False
        absent = []
        for members in self._groups.values():
            for name, parameter in members.items():
                if parameter.grad is None:
                    absent.append(name)
                    continue
                reached = parameter.grad.ne(0).any()
                self._reached[name] = reached | self._reached.get(name, reached)
        if absent:
            raise ConfigError(
                f"stage {self._stage}: no gradient reaches {_listed(sorted(absent))}; nothing in the model uses them, "
                f"so leave them out of trainer.stages.{self._stage}.train or out of experts.sites"
            )
        return step == self._last

    def verdict(self, recorded: Mapping[str, int]) -> None:
        """Raises ConfigError naming the sites whose gradients were zero in every step so far.

        Args:
            recorded: site -> number of its experts; the router of a single expert has nothing to learn.
        """
        if not self._judge_zeros or not self._reached:
            return
        flags = dict(zip(self._reached, torch.stack(list(self._reached.values())).tolist(), strict=True))
        lonely = {site for site, experts in recorded.items() if experts == 1}
        for group, members in self._groups.items():
            units: dict[str, list[bool]] = {}
            for name in members:
                units.setdefault(unit_of(name, group), []).append(flags[name])
            idle = [unit for unit, reached in units.items() if not any(reached) and unit not in lonely]
            if idle:
                raise ConfigError(
                    f"stage {self._stage}: the gradient of the {group} of {len(idle)} of {len(units)} sites was zero "
                    f"throughout the first {self._last + 1} steps: {_listed(idle)}; {_ADVICE[group]}"
                )


_MARKERS = {"experts": ".bank.", "routers": ".router."}
_ADVICE = {
    "experts": "check that the model really uses these layers' output, or leave them out of experts.sites",
    "routers": "a router learns only if its weights change the output: use router.top_k above 1, weights that are not "
    "renormalised, or an auxiliary loss",
}


def unit_of(parameter: str, group: str) -> str:
    """The site or block that a parameter belongs to: `a.b.bank.up` -> `a.b`, `a.b.router.gate.weight` -> `a.b`."""
    site, found, _ = parameter.rpartition(_MARKERS[group])
    return site if found else parameter


def unmoved_experts(
    model: nn.Module, optimizer: torch.optim.Optimizer, experts: Mapping[str, nn.Parameter]
) -> dict[str, list[int]]:
    """Site -> experts whose every gradient of the stage was exactly zero.

    Read from AdamW's second moment of `<site>.bank.up` (sum of ranks, O), which holds the history at no cost and lives
    in checkpoints; the bank's `ranks` say which rows are whose. 8-bit states are left out.
    """
    unmoved: dict[str, list[int]] = {}
    for name, parameter in experts.items():
        bank, _, last = name.rpartition(".")
        second_moment = optimizer.state.get(parameter, {}).get("exp_avg_sq")
        ranks = getattr(model.get_submodule(bank), "ranks", ())
        if last != "up" or second_moment is None or sum(ranks) != parameter.shape[0]:
            continue
        touched_R = second_moment.ne(0).any(dim=1).tolist()
        starts = [sum(ranks[:index]) for index in range(len(ranks))]
        idle = [
            index
            for index, (start, rank) in enumerate(zip(starts, ranks, strict=True))
            if rank and not any(touched_R[start : start + rank])
        ]
        if idle:
            unmoved[bank.removesuffix(".bank")] = idle
    return unmoved


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMES_IN_MESSAGE} more" if len(names) > NAMES_IN_MESSAGE else ""
    return ", ".join(names[:NAMES_IN_MESSAGE]) + more
