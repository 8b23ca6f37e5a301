"""Downloaded experts that one classifier of the whole model weighs, by what the base alone makes of a token: X-LoRA.

Legend: B rows, S positions, D in, O out, E experts, r rank, V words.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from tests.twins import Case
from tests.twins.per_linear import best, kept, replace_linear, softmax

Expert = tuple[Tensor, Tensor]  # down (r, D), up (O, r) with its scale folded in


@dataclass(frozen=True)
class FirstPass:
    """The twin; the paper's is `FirstPass()`, the rest are options of the authors' code."""

    depth: int = 1  # linear layers of the classifier
    per_site: bool = False  # whether every adapted linear has weights of its own, in the order of the model
    chosen: int | None = None  # keep the largest so many, as they are
    trains = ({"routers"},)
    rates: Mapping[str, float] = field(default_factory=dict)

    def __call__(self, case: Case) -> tuple[Tensor, float]:
        experts = {}
        for site, module in case.model.named_modules():
            pairs = [adapter.get(site) for adapter in case.adapters]
            if isinstance(module, nn.Linear) and any(pairs):
                experts[site] = [None if pair is None else (pair.down.double(), pair.up.double()) for pair in pairs]
        return self.logits(case.model, case.ids_BS, case.valid_BS, case.tensors, experts), 0.0

    def logits(
        self,
        model: nn.Module,
        ids_BS: Tensor,
        valid_BS: Tensor,
        tensors: Mapping[str, Tensor],
        experts: Mapping[str, Sequence[Expert | None]],
    ) -> Tensor:
        """(B, S, V); `model` is the base and gets slow linears. `experts` of each adapted linear, by its name."""
        inputs = {"attention_mask": valid_BS.long(), "use_cache": False}
        with torch.no_grad():
            hidden_BSD = model(ids_BS, output_hidden_states=True, **inputs).hidden_states[-1]
        prefix, count = f"{model.base_model_prefix}.router.score.layers.", len(next(iter(experts.values())))
        classifier = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
        scores = [[self.score(h_D, classifier).split(count) for h_D in hidden_SD] for hidden_SD in hidden_BSD]
        for number, (site, own) in enumerate(experts.items()):
            head = number if self.per_site else 0
            weights = [[self.weights(heads[head]) for heads in row] for row in scores]

            def add(x_D: Tensor, row: int, position: int, own=own, weights=weights) -> Tensor:
                """sum_e w_e up_e down_e x."""
                pairs = zip(own, weights[row][position], strict=True)
                return sum(weight * (pair[1] @ (pair[0] @ x_D)) for pair, weight in pairs if pair is not None)

            replace_linear(model, site, add)
        return model(ids_BS, **inputs).logits

    def score(self, h_D: Tensor, classifier: Mapping[str, Tensor]) -> Tensor:
        """(heads * E,): linear layers with bias, and ReLU between them."""
        for layer in range(self.depth):
            x_D = h_D.clamp(min=0) if layer else h_D
            h_D = classifier[f"{layer}.weight"] @ x_D + classifier[f"{layer}.bias"]
        return h_D

    def weights(self, z_E: Tensor) -> list[Tensor | float]:
        p = softmax(list(z_E))
        return p if self.chosen is None else kept(p, best(p, self.chosen), renormalise=False)


TWINS = {"xlora": FirstPass()}
