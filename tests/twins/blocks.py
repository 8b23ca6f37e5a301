"""Mixtures that decide once for a feed-forward block, token by token: MixLoRA, MixDoRA, LLaVA-MoLE.

Attention has plain LoRA. Padding is computed and seen by no real token. Legend: B rows, S positions, D in, E experts, V
words.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from tests.twins import Case
from tests.twins.per_linear import ATTENTION, best, softmax

Block = Callable[[nn.Module, str, Tensor], tuple[Tensor, Tensor]]  # mlp, its name, one token -> output, probabilities


class Loops:
    """A frozen base whose layers are followed by loops. `leaves`: name -> parameter, as an adapter stores them; `rank`,
    `scale` of every pair; `lengths`: whether every row of an adapted weight learns its length."""

    def __init__(
        self, base: nn.Module, leaves: Mapping[str, Tensor], *, rank: int, scale: float, lengths: bool = False
    ) -> None:
        self.base, self.leaves, self.rank, self.scale, self.lengths = base, leaves, rank, scale, lengths
        self.probabilities: dict[str, Tensor] = {}  # block -> (N, E)

    def pair(self, site: str, expert: int, x_D: Tensor) -> Tensor:
        """s B A x."""
        own = slice(expert * self.rank, (expert + 1) * self.rank)
        a_RD, b_OR = self.leaves[f"{site}.bank.down"][own], self.leaves[f"{site}.bank.up"][own].T
        return self.scale * (b_OR @ (a_RD @ x_D))

    def adapted(self, layer: nn.Module, site: str, expert: int, x_D: Tensor) -> Tensor:
        """(W + s B A) x; of DoRA with every row o of that matrix m[o] long, the length it has by itself a constant."""
        if not self.lengths:
            return layer.weight @ x_D + self.pair(site, expert, x_D)
        columns = [self.pair(site, expert, unit_D) for unit_D in torch.eye(len(x_D), dtype=x_D.dtype)]
        whole_OD = layer.weight + torch.stack(columns, dim=1)
        length_O = torch.stack([row_D.detach().norm() for row_D in whole_OD])
        return self.leaves[f"{site}.bank.magnitude"][expert] * (whole_OD @ x_D) / length_O

    def linear(self, block: nn.Module, name: str, part: str, expert: int, x_D: Tensor) -> Tensor:
        """One projection of a block with one expert."""
        return self.adapted(getattr(block, part), f"{name}.{part}", expert, x_D)

    def run(self, ids: Tensor, mask: Tensor, block: Block) -> Tensor:
        """(B, S, V): the base with `block` in place of every mlp, and plain LoRA on attention."""
        hooks = []
        for name, module in self.base.named_modules():
            end = name.rpartition(".")[2]
            if end in ATTENTION:
                hooks.append(module.register_forward_hook(lambda m, x, y, n=name: self._beside(m, n, x[0], y)))
            elif end == "mlp":
                hooks.append(module.register_forward_hook(lambda m, x, y, n=name: self._instead(m, n, x[0], block)))
        try:
            return self.base(ids, attention_mask=mask.long(), use_cache=False).logits
        finally:
            for hook in hooks:
                hook.remove()

    def _beside(self, layer: nn.Module, site: str, x: Tensor, y: Tensor) -> Tensor:
        rows = [self.adapted(layer, site, 0, token) for token in x.reshape(-1, x.shape[-1])]
        return torch.stack(rows).view(y.shape)

    def _instead(self, mlp: nn.Module, name: str, x: Tensor, block: Block) -> Tensor:
        rows = [block(mlp, name, token) for token in x.reshape(-1, x.shape[-1])]
        self.probabilities[name] = torch.stack([p for _, p in rows])
        return torch.stack([y for y, _ in rows]).view(x.shape)

    def copy(self, mlp: nn.Module, name: str, expert: int, x_D: Tensor) -> Tensor:
        """E_e(x): the block with one expert in all three projections."""
        gate = mlp.act_fn(self.linear(mlp, name, "gate_proj", expert, x_D))
        return self.linear(mlp, name, "down_proj", expert, gate * self.linear(mlp, name, "up_proj", expert, x_D))


@dataclass(frozen=True)
class DecidingBlocks:
    """The twin of a method that is fixed by these answers."""

    experts: int
    chosen: int  # the best so many
    weighed: bool  # by p over the sum of the chosen; else 1 each
    bias: bool  # of the router
    loss: Callable[
        [Mapping[str, Tensor], Tensor], Tensor
    ]  # (probabilities by block, valid_BS); its coefficient included
    lengths: bool = False
    trains = ({"experts", "routers"},)
    rates: Mapping[str, float] = field(default_factory=dict)

    def __call__(self, case: Case) -> tuple[Tensor, Tensor | float]:
        loops = Loops(case.model, case.tensors, rank=case.rank, scale=case.alpha / case.rank, lengths=self.lengths)

        def block(mlp: nn.Module, name: str, x_D: Tensor) -> tuple[Tensor, Tensor]:
            """sum_e w_e E_e(x), the whole block once for each expert. Of one with weight 1 this is one expert in all
            three projections."""
            p = self.probabilities(case, name, x_D)
            own = best(p, self.chosen)
            total = sum(p[e] for e in own)
            return sum((p[e] / total if self.weighed else 1) * loops.copy(mlp, name, e, x_D) for e in own), torch.stack(
                p
            )

        logits_BSV = loops.run(case.ids_BS, case.valid_BS, block)
        return logits_BSV, 0.0 if case.stage is None else self.loss(loops.probabilities, case.valid_BS)

    def probabilities(self, case: Case, name: str, x_D: Tensor) -> list[Tensor]:
        """softmax(W x), or softmax(W x + b), of the block's input."""
        weight_ED = case.tensors[f"{name}.router.score.weight"]
        assert len(weight_ED) == self.experts
        z = [weight_D @ x_D for weight_D in weight_ED]
        if self.bias:
            bias_E = case.tensors[f"{name}.router.score.bias"]
            z = [value + bias_E[e] for e, value in enumerate(z)]
        return softmax(z)


def mixtral_balance(probabilities: Mapping[str, Tensor], valid_BS: Tensor) -> Tensor:
    """0.001 * N sum_e F_e P_e over the real tokens of all layers; F counts both choices, over the number of tokens."""
    rows = [p_E for p_NE in probabilities.values() for p_E in p_NE[valid_BS.flatten()]]
    total = torch.zeros((), dtype=torch.float64)
    for e in range(8):
        chosen = sum(e in best(p_E, 2) for p_E in rows)
        total = total + 8 * (chosen / len(rows)) * (sum(p_E[e] for p_E in rows) / len(rows))
    return 0.001 * total


def balance_in_examples(probabilities: Mapping[str, Tensor], valid_BS: Tensor) -> Tensor:
    """0.01 * the mean over examples of sum_e F_e P_e over the real tokens of one in all layers; no factor."""
    length, terms = valid_BS.shape[1], []
    for row, reals in enumerate(valid_BS):
        places = [row * length + column for column, real in enumerate(reals) if real]
        rows = [p_NE[place] for p_NE in probabilities.values() for place in places]
        shares = [sum(best(p_E, 1) == [e] for p_E in rows) / len(rows) for e in range(3)]
        terms.append(sum(share * sum(p_E[e] for p_E in rows) / len(rows) for e, share in enumerate(shares)))
    return 0.01 * sum(terms) / len(terms)


TWINS = {
    "mixlora": DecidingBlocks(8, 2, True, False, mixtral_balance),
    "mixlora_dora": DecidingBlocks(8, 2, True, False, mixtral_balance, lengths=True),
    "llava_mole": DecidingBlocks(3, 1, False, True, balance_in_examples),
}
