"""The twin of MoLE (2404.13628), which weighs trained LoRAs once per block and sequence by what they would put out.

Legend: B rows, S positions, D width, V vocabulary.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from tests.twins import Case


class GatedBlock(nn.Module):
    """F(x; sum_i w_i LoRA_i), with the LoRAs folded into the weights of F; rows come one at a time, without padding.

    w = softmax(W n(o) / temperature): o_i = F(x; LoRA_i) - F(x; none), the mean over the prompt, all o_i side by side
    and n their length made one.
    """

    def __init__(self, base: nn.Module, deltas: Sequence[Mapping[str, Tensor]], gate: Mapping[str, Tensor]) -> None:
        """`deltas`: of each LoRA, linear -> what it adds to the weight."""
        super().__init__()
        self.base, self.deltas, self.gate = base, deltas, gate
        self.prompt = 0  # tokens of the row that is about to come
        self.decided: list[list[Tensor]] = []  # weights of each row

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        size = range(len(self.deltas))
        (nothing_SD,), outputs = _first(self._mixed([0.0 for _ in size], args, kwargs)), []
        for own in size:
            (alone_SD,) = _first(self._mixed([float(i == own) for i in size], args, kwargs))
            added = [alone_SD[s] - nothing_SD[s] for s in range(self.prompt)]
            outputs.append(sum(added) / self.prompt)
        beside = torch.cat(outputs)
        length = beside.square().sum().sqrt()
        temperature = torch.exp(self.gate["log_temperature"])
        powers = [torch.exp(self.gate["score.weight"][i] @ beside / length / temperature) for i in size]
        self.decided.append([power / sum(powers) for power in powers])
        return self._mixed(self.decided[-1], args, kwargs)

    def _mixed(self, weights: Sequence[Any], args: Any, kwargs: Any) -> Any:
        merged = {}
        for deltas, weight in zip(self.deltas, weights, strict=True):
            for linear, delta in deltas.items():
                before = merged.get(f"{linear}.weight", self.base.get_submodule(linear).weight)
                merged[f"{linear}.weight"] = before + weight * delta
        return functional_call(self.base, merged, args, kwargs)


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


@dataclass(frozen=True)
class OutputGates:
    """All blocks that some LoRA is for; the loss is 0.5 * - sum_i log q_i, q_i the mean weight over rows and blocks."""

    trains: Sequence[set[str]] = ({"routers"},)
    rates: Mapping[str, float] = field(default_factory=dict)

    def __call__(self, case: Case) -> tuple[Tensor, Tensor]:
        gates = []
        for name in sorted({site.rpartition(".")[0] for adapter in case.adapters for site in adapter}):
            deltas = [
                {
                    site.rpartition(".")[2]: pair.up.double() @ pair.down.double()
                    for site, pair in adapter.items()
                    if site.rpartition(".")[0] == name
                }
                for adapter in case.adapters
            ]
            prefix = f"{name}.router."
            own = {key.removeprefix(prefix): t for key, t in case.tensors.items() if key.startswith(prefix)}
            gates.append(GatedBlock(case.model.get_submodule(name), deltas, own))
            parent, _, attribute = name.rpartition(".")
            setattr(case.model.get_submodule(parent), attribute, gates[-1])
        rows = []
        for ids_S, valid_S, prompt in zip(case.ids_BS, case.valid_BS, case.prompts, strict=True):
            for gate in gates:
                gate.prompt = prompt
            own_SV = case.model(ids_S[valid_S][None], use_cache=False).logits[0]
            rows.append(nn.functional.pad(own_SV, (0, 0, 0, len(ids_S) - len(own_SV))))
        decided = [weights for gate in gates for weights in gate.decided]
        q = [sum(weights[i] for weights in decided) / len(decided) for i in range(len(case.adapters))]
        return torch.stack(rows), 0.5 * -sum(torch.log(value) for value in q)


TWINS = {"mole": OutputGates()}
