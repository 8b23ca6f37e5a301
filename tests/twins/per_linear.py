"""Experts beside single linear layers, token by token: y = W x + b + sum_e w_e(x) s up_e down_e x.

Legend: B rows, S positions, D in, O out, E experts, r rank.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tests.twins import Case

ATTENTION, FFN = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
MIXER = ("in_proj", "x_proj", "dt_proj", "out_proj")  # of a state-space model


@dataclass(frozen=True)
class Token:
    """One token at one linear."""

    x_D: Tensor
    router: Mapping[str, Tensor]  # the linear's own, by the names that they have in it
    experts: int
    domain: int
    task: int
    row: int
    site: str
    layer: int


@dataclass(frozen=True)
class Decided:
    """What became of a token."""

    token: Token
    weights: list[Any]  # one for each expert: numbers, or scalars with gradient
    p: list[Any] | None  # what losses take for the probabilities


Weigh = Callable[[Token], tuple[list[Any], list[Any] | None]]  # weights, probabilities
Loss = Callable[[Sequence[Decided]], Tensor]  # of all valid tokens at all linears; its coefficient included


@dataclass(frozen=True)
class PerLinear:
    """The twin of a method that is fixed by these answers."""

    linears: Sequence[str]  # last names of the modules, for all architectures together
    count: Callable[[int, int, Case], int]  # (layer, layers, case) -> experts there
    stages: Sequence[tuple[set[str], Weigh, Loss | None]]  # groups that train, how tokens weigh experts, loss
    evaluate: Weigh
    scale: Callable[[float, int], float] = lambda alpha, rank: alpha / rank
    one_down: bool = False  # all experts of a linear share their down factor
    rates: Mapping[str, float] = field(default_factory=dict)

    @property
    def trains(self) -> list[set[str]]:
        return [groups for groups, _, _ in self.stages]

    def __call__(self, case: Case) -> tuple[Tensor, Tensor | float]:
        _, weigh, loss = (None, self.evaluate, None) if case.stage is None else self.stages[case.stage]
        places = {name: _layer(name) for name, module in case.model.named_modules() if self._carries(name, module)}
        layers, decided = 1 + max(places.values()), []
        for site, layer in places.items():
            experts = self._experts(site, self.count(layer, layers, case), case)
            if experts:
                add = _adder(site, layer, experts, weigh, case, decided)
                replace_linear(case.model, site, add)
        mask_BS = case.valid_BS.long()
        logits_BSV = case.model(case.ids_BS, attention_mask=mask_BS, use_cache=False).logits
        return logits_BSV, 0.0 if loss is None else loss(decided)

    def _carries(self, name: str, module: nn.Module) -> bool:
        return isinstance(module, nn.Linear) and name.rpartition(".")[2] in self.linears and _layer(name) is not None

    def _experts(self, site: str, count: int, case: Case) -> list[tuple[Tensor, Tensor, float] | None]:
        """(down (r, D), up (O, r), factor) of each; None where an adapter has nothing for this linear."""
        if case.adapters:
            own = [adapter.get(site) for adapter in case.adapters]
            found = [None if pair is None else (pair.down.double(), pair.up.double(), 1.0) for pair in own]
            return found if any(own) else []
        down, up = case.tensors[f"{site}.bank.down"], case.tensors[f"{site}.bank.up"]
        rank, factor = case.rank, self.scale(case.alpha, case.rank)
        assert down.shape[0] == (rank if self.one_down else count * rank) and up.shape[0] == count * rank
        rows = [slice(e * rank, (e + 1) * rank) for e in range(count)]
        return [(down if self.one_down else down[own], up[own].T, factor) for own in rows]


def _layer(name: str) -> int | None:
    found = re.search(r"\.layers\.(\d+)\.", f".{name}")
    return int(found.group(1)) if found else None


def _adder(
    site: str, layer: int, experts: list[Any], weigh: Weigh, case: Case, decided: list[Decided]
) -> Callable[[Tensor, int, int], Tensor | float]:
    prefix = f"{site}.router."
    router = {name.removeprefix(prefix): t for name, t in case.tensors.items() if name.startswith(prefix)}

    def add(x_D: Tensor, row: int, position: int) -> Tensor | float:
        """What the experts give to one token; nothing to padding, which no real token can see."""
        if not case.valid_BS[row, position]:
            return 0.0
        token = Token(x_D, router, len(experts), case.domains[row], case.tasks[row], row, site, layer)
        weights, p = weigh(token)
        decided.append(Decided(token, weights, p))
        total: Tensor | float = 0.0
        for expert, weight in zip(experts, weights, strict=True):
            if expert is not None:
                down, up, factor = expert
                total = total + weight * factor * (up @ (down @ x_D))
        return total

    return add


def replace_linear(model: nn.Module, site: str, add: Callable[[Tensor, int, int], Tensor | float]) -> None:
    """Put a `SlowLinear` in the place of a linear layer of the model."""
    parent, _, own = site.rpartition(".")
    setattr(model.get_submodule(parent), own, SlowLinear(model.get_submodule(site), add))


class SlowLinear(nn.Module):
    """y = W x + b + add(x, row, position), one token after the other."""

    def __init__(self, base: nn.Linear, add: Callable[[Tensor, int, int], Tensor | float]) -> None:
        super().__init__()
        self.base, self.add = base, add

    def forward(self, x_BSD: Tensor) -> Tensor:
        y_BSO = self @ x_BSD.transpose(1, 2)
        return y_BSO.transpose(1, 2) + (0.0 if self.bias is None else self.bias)

    # a state-space mixer asks its time step projection for `weight @ t` and `bias` instead of calling it

    @property
    def weight(self) -> "SlowLinear":
        return self

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias

    def __matmul__(self, x_BDS: Tensor) -> Tensor:
        rows = []
        for row, x_DS in enumerate(x_BDS):
            tokens = [self.base.weight @ x_D + self.add(x_D, row, position) for position, x_D in enumerate(x_DS.T)]
            rows.append(torch.stack(tokens, dim=1))
        return torch.stack(rows)


# -- what tokens do with probabilities ---------------------------------------------------------------------------------


def softmax(logits: Sequence[Tensor]) -> list[Tensor]:
    largest = max(z.item() for z in logits)
    powers = [torch.exp(z - largest) for z in logits]
    return [power / sum(powers) for power in powers]


def linear_softmax(token: Token) -> list[Tensor]:
    """p = softmax(W x), the row of each expert by itself."""
    weight_ED = token.router["score.weight"]
    return softmax([weight_ED[e] @ token.x_D for e in range(token.experts)])


def best(p: Sequence[Tensor], k: int) -> list[int]:
    """The k most probable experts."""
    return sorted(range(len(p)), key=lambda e: -p[e].item())[:k]


def kept(p: Sequence[Tensor], chosen: Sequence[int], *, renormalise: bool) -> list[Any]:
    """p on the chosen experts, over its sum there if asked for, and 0 on the others."""
    total = sum(p[e] for e in chosen) if renormalise else 1.0
    return [p[e] / total if e in chosen else 0.0 for e in range(len(p))]


def by_key(decided: Sequence[Decided], key: Callable[[Token], Any]) -> dict[Any, list[Decided]]:
    found: dict[Any, list[Decided]] = {}
    for entry in decided:
        found.setdefault(key(entry.token), []).append(entry)
    return found
