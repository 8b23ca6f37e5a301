"""For every recipe a slow twin: its method written once more from the paper's equations, in float64, with Python loops.

`tests/test_twins.py` finds the recipes by globbing and compares each with its twin on tiny models of several
architectures, in every stage and in evaluation: logits, auxiliary loss, and the gradient of every trained tensor. A
twin reads neither the recipe nor its config. What a paper fixes stands in it as numbers: which linears have experts,
how many, how a token weighs them, the loss with its coefficient. So a recipe that says something else fails.

To write one, give it a place in the dict `TWINS` of a module of this package, under the name of the recipe:

    TWINS = {"my_recipe": MyTwin(...)}

Every module is searched, so a new file needs no other edit. A twin has two attributes and is called:

- `trains`: for each stage, in order, the groups that it trains, such as `({"experts"}, {"routers"})`;
- `rates`: ends of parameter names -> their learning rate over that of the stage, where a method has several (else {});
- `twin(case)` returns the logits (B, S, V) and the weighted auxiliary loss (0.0 for none) of stage number
  `case.stage`, or of evaluation where that is None. `case.model` is a fresh copy of the frozen base in which the twin
  replaces what it needs to; `case.tensors` are the tensors that an adapter stores, by name, and must be what the
  result is computed from, for their gradients are compared.

A method that adds experts beside single linear layers, routed token by token, is a value of `PerLinear` in
`per_linear.py`: say which linears, how many experts, how a token weighs them (`Weigh`), and the loss of the decisions.
`token_routed.py` has examples. Others (experts that are whole blocks, one decision for the whole model, ...) are
classes of their own; `per_linear.replace_linear` and `SlowLinear` may help there, too.
"""

import importlib
import pkgutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from loramoe_train.experts.peft_folder import LoraFactors


@dataclass(frozen=True)
class Case:
    """What a twin is asked. Legend: B rows, S positions."""

    model: nn.Module  # the frozen base in float64
    tensors: Mapping[str, Tensor]  # what an adapter stores, by full name: float64 leaves that collect gradients
    ids_BS: Tensor
    valid_BS: Tensor  # bool; padding is on the right
    domains: Sequence[int]  # the number of each row's domain
    tasks: Sequence[int]  # and of its task; a run has as many tasks as domains here
    prompts: Sequence[int]  # how many of each row's first tokens are no answer
    num_domains: int
    rank: int  # of a fresh expert in this run, with its alpha: tests make both small
    alpha: float
    adapters: Sequence[Mapping[str, LoraFactors]]  # modules of downloaded adapters, where the recipe starts from some
    stage: int | None  # None: evaluation


class Twin(Protocol):
    """See the module's docstring."""

    trains: Sequence[set[str]]
    rates: Mapping[str, float]

    def __call__(self, case: Case) -> tuple[Tensor, Tensor | float]: ...


def all_twins() -> dict[str, Twin]:
    """By recipe, from every module of this package."""
    found: dict[str, Twin] = {}
    for module in pkgutil.iter_modules(__path__):
        own = getattr(importlib.import_module(f"{__name__}.{module.name}"), "TWINS", {})
        assert not found.keys() & own.keys(), f"two twins for {sorted(found.keys() & own.keys())}"
        found.update(own)
    return found
