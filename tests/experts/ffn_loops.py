"""Mixtures on feed-forward blocks as the papers write them, token by token in float64, on a base without experts.

Nothing here comes from a config: which layer carries what, how a router weighs, how the losses add up is written out.
Parameters are the leaves that autograd differentiates by, under the names of the adapter's tensors.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

ATTENTION, FFN = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")

Block = Callable[[nn.Module, str, Tensor], tuple[Tensor, Tensor]]  # mlp, its name, one token -> output, probabilities


class Loops:
    """A frozen base whose layers are followed by loops. `leaves`: name -> parameter; `rank`, `scale` of every pair."""

    def __init__(self, base: nn.Module, leaves: dict[str, Tensor], *, rank: int, scale: float) -> None:
        self.base, self.leaves, self.rank, self.scale = base, leaves, rank, scale
        self.probabilities: dict[str, Tensor] = {}  # block -> (N, E)

    def pair(self, site: str, expert: int, x_D: Tensor) -> Tensor:
        """s B A x."""
        own = slice(expert * self.rank, (expert + 1) * self.rank)
        a_RD, b_OR = self.leaves[f"{site}.bank.down"][own], self.leaves[f"{site}.bank.up"][own].T
        return self.scale * (b_OR @ (a_RD @ x_D))

    def adapted(self, layer: nn.Module, site: str, expert: int, x_D: Tensor) -> Tensor:
        """(W + s B A) x; of DoRA with every row o of that matrix m[o] long, the length it has by itself a constant."""
        magnitude_EO = self.leaves.get(f"{site}.bank.magnitude")
        if magnitude_EO is None:
            return layer.weight @ x_D + self.pair(site, expert, x_D)
        columns = [self.pair(site, expert, unit_D) for unit_D in torch.eye(len(x_D), dtype=x_D.dtype)]
        whole_OD = layer.weight + torch.stack(columns, dim=1)
        length_O = torch.stack([row_D.detach().norm() for row_D in whole_OD])
        return magnitude_EO[expert] * (whole_OD @ x_D) / length_O

    def linear(self, block: nn.Module, name: str, part: str, expert: int, x_D: Tensor) -> Tensor:
        """One projection of a block with one expert."""
        return self.adapted(getattr(block, part), f"{name}.{part}", expert, x_D)

    def softmax(self, name: str, x_D: Tensor) -> Tensor:
        bias = self.leaves.get(f"{name}.router.score.bias")
        z_E = self.leaves[f"{name}.router.score.weight"] @ x_D
        z_E = z_E if bias is None else z_E + bias
        return torch.exp(z_E) / torch.exp(z_E).sum()

    def run(self, ids: Tensor, mask: Tensor, block: Block) -> Tensor:
        """(B, S, V): the base with `block` in place of every mlp, and plain LoRA on attention."""
        hooks = []
        for name, module in self.base.named_modules():
            end = name.rpartition(".")[2]
            if end in ATTENTION:
                hooks.append(module.register_forward_hook(lambda m, x, y, n=name: self._beside(m, n, x[0], y)))
            if end == "mlp":
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

    # -- the papers' blocks --------------------------------------------------------------------------------------------

    def mixlora(self, mlp: nn.Module, name: str, x_D: Tensor) -> tuple[Tensor, Tensor]:
        """MixLoRA, MixDoRA: the two best copies of the whole block, weighed by p over the sum of the two."""
        p_E = self.softmax(name, x_D)
        first, second = sorted(range(len(p_E)), key=lambda e: -p_E[e].item())[:2]
        total = p_E[first] + p_E[second]
        return sum(p_E[e] / total * self.copy(mlp, name, e, x_D) for e in (first, second)), p_E

    def copy(self, mlp: nn.Module, name: str, expert: int, x_D: Tensor) -> Tensor:
        """E_e(x): the block with one expert in all three projections."""
        gate = mlp.act_fn(self.linear(mlp, name, "gate_proj", expert, x_D))
        return self.linear(mlp, name, "down_proj", expert, gate * self.linear(mlp, name, "up_proj", expert, x_D))

    def llava_mole(self, mlp: nn.Module, name: str, x_D: Tensor) -> tuple[Tensor, Tensor]:
        """LLaVA-MoLE: the best expert in all three projections, not weighed."""
        p_E = self.softmax(name, x_D)
        return self.copy(mlp, name, int(p_E.argmax()), x_D), p_E

    # -- the papers' losses --------------------------------------------------------------------------------------------

    def mixtral_balance(self, mask: Tensor) -> Tensor:
        """N sum_e F_e P_e over the real tokens of all layers; F counts both choices, over the number of tokens."""
        rows = [p_E for p_NE in self.probabilities.values() for p_E in p_NE[mask.flatten()]]
        total = torch.zeros((), dtype=torch.float64)
        experts = len(rows[0])
        for e in range(experts):
            chosen = sum(e in sorted(range(experts), key=lambda i, p=p: -p[i].item())[:2] for p in rows)
            total = total + experts * (chosen / len(rows)) * (sum(p[e] for p in rows) / len(rows))
        return total

    def llava_balance(self, mask: Tensor) -> Tensor:
        """Mean over examples of sum_e F_e P_e over the real tokens of one example in all layers; no factor."""
        length, terms = mask.shape[1], []
        for row, reals in enumerate(mask):
            places = [row * length + column for column, real in enumerate(reals) if real]
            rows = [p_NE[place] for p_NE in self.probabilities.values() for place in places]
            shares = [sum(int(p.argmax()) == e for p in rows) / len(rows) for e in range(len(rows[0]))]
            terms.append(sum(f * sum(p[e] for p in rows) / len(rows) for e, f in enumerate(shares)))
        return sum(terms) / len(terms)
