"""The twins of baselines that put another weight in the place of each linear's: DoRA, PiSSA, full fine-tuning.

Legend: D in, O out, r rank.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.func import functional_call

from tests.twins import Case
from tests.twins.per_linear import ATTENTION, MIXER, replace_linear

Whole = Callable[[Tensor, Mapping[str, Tensor], float], Tensor]  # W (O, D), what the linear stores, alpha / r -> W'


@dataclass(frozen=True)
class Adapted:
    """y = W' x + b at the linears of attention or mixer, token by token."""

    whole: Whole
    trains: Sequence[set[str]] = ({"experts"},)
    rates: Mapping[str, float] = field(default_factory=dict)

    def __call__(self, case: Case) -> tuple[Tensor, float]:
        sites = [name for name, _ in case.model.named_modules() if name.rpartition(".")[2] in (*ATTENTION, *MIXER)]
        for site in sites:
            prefix = f"{site}.bank."
            stored = {name.removeprefix(prefix): t for name, t in case.tensors.items() if name.startswith(prefix)}
            assert len(stored["down"]) == len(stored["up"]) == case.rank
            weight_OD = case.model.get_submodule(site).weight
            more_OD = self.whole(weight_OD, stored, case.alpha / case.rank) - weight_OD
            replace_linear(case.model, site, lambda x_D, row, position, more_OD=more_OD: more_OD @ x_D)
        return case.model(case.ids_BS, attention_mask=case.valid_BS.long(), use_cache=False).logits, 0.0


def dora(weight_OD: Tensor, stored: Mapping[str, Tensor], scale: float) -> Tensor:
    """2402.09353: every row of W + s up down, made as long as its magnitude; its own length counts as a constant."""
    (magnitude_O,) = stored["magnitude"]
    rows = []
    for o, row_D in enumerate(weight_OD):
        adapted_D = row_D + scale * (stored["up"][:, o] @ stored["down"])
        rows.append(magnitude_O[o] * adapted_D / adapted_D.detach().square().sum().sqrt())
    return torch.stack(rows)


def pissa(weight_OD: Tensor, stored: Mapping[str, Tensor], scale: float) -> Tensor:
    """2404.02948: what is left of W without its r leading directions, plus s up down, which started as those.

    The start is stored, for it is found by iterations; here it is held against the exact one.
    """
    start_OD = scale * stored["start_up"].T @ stored["start_down"]
    u, s, v = torch.linalg.svd(weight_OD.detach(), full_matrices=False)
    leading_OD = sum(s[i] * torch.outer(u[:, i], v[i]) for i in range(len(stored["down"])))
    assert (start_OD - leading_OD).norm() < 0.02 * leading_OD.norm()
    return weight_OD - start_OD.detach() + scale * stored["up"].T @ stored["down"]


@dataclass(frozen=True)
class FullFineTuning:
    """The model itself, with every weight of its own in the place of the base's."""

    trains: Sequence[set[str]] = ({"base"},)
    rates: Mapping[str, float] = field(default_factory=dict)

    def __call__(self, case: Case) -> tuple[Tensor, float]:
        assert {name for name, _ in case.model.named_parameters()} == case.tensors.keys()
        inputs = {"attention_mask": case.valid_BS.long(), "use_cache": False}
        return functional_call(case.model, dict(case.tensors), (case.ids_BS,), inputs).logits, 0.0


TWINS = {"dora": Adapted(dora), "pissa": Adapted(pissa), "full_finetune": FullFineTuning()}
