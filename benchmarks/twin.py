"""Before anything is timed: every mixture computes the loss and all gradients of a slow, obvious twin in float64.

The twin is a copy of the base in float64 in which every adapted layer computes, expert by expert and without any
shortcut, `y = W x + sum_e w_e s up_e^T (down_e x)` with w the renormalised top-k of softmax(router x), and is
differentiated by autograd. A candidate whose numbers are others is not timed.

In bfloat16 the hidden states themselves are rounded, which moves some tokens to another expert; the tolerance is what
that does to any implementation. The same code is checked tightly in float32.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.candidates import Candidate, Factors, factors_of, sites_of
from benchmarks.shapes import Mixture

# relative error of the loss, and of the gradients over all sites together
TOLERANCE = {torch.float32: (1e-5, 1e-4), torch.bfloat16: (2e-2, 0.35)}


class TwinLinear(nn.Module):
    def __init__(self, base: nn.Module, factors: Factors, mixture: Mixture) -> None:
        super().__init__()
        self.base, self.top_k, self.scale = base, mixture.top_k, mixture.scale
        self.factors = nn.ParameterList(nn.Parameter(part.double()) for part in factors.parts())

    def forward(self, x: Tensor) -> Tensor:
        down_ERD, up_ERO, router_ED = self.factors
        p = (x @ router_ED.T).softmax(dim=-1)
        kept = torch.zeros_like(p).scatter(-1, p.topk(self.top_k, dim=-1).indices, 1.0)
        w = p * kept / (p * kept).sum(dim=-1, keepdim=True)
        y = self.base(x)
        for expert in range(len(down_ERD)):
            y = y + w[..., expert, None] * self.scale * (x @ down_ERD[expert].T @ up_ERO[expert])
        return y


def twin_result(base: nn.Module, mixture: Mixture, ids: Tensor) -> tuple[float, dict[str, Factors]]:
    """(loss, gradients by site) in float64, on the CPU."""
    model = copy.deepcopy(base).cpu().double()
    layers = {}
    for site, linear in sites_of(model).items():
        parent, _, attribute = site.rpartition(".")
        layers[site] = TwinLinear(linear, factors_of(site, linear, mixture), mixture)
        setattr(model.get_submodule(parent), attribute, layers[site])
    ids = ids.cpu()
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    return loss.item(), {site: Factors(*(part.grad for part in layer.factors)) for site, layer in layers.items()}


def errors(candidate: Candidate, ids: Tensor, twin: tuple[float, dict[str, Factors]]) -> dict[str, float]:
    """Relative errors of the loss and of the gradients of downs, ups and routers, over all sites together."""
    for parameter in candidate.trained:
        parameter.grad = None
    with candidate.opened(ids):
        loss = candidate.loss(ids)
        loss.backward()
    expected, wanted = twin
    found: dict[str, float] = {"loss": abs(loss.item() - expected) / abs(expected)}
    assert candidate.gradients is not None
    own = candidate.gradients()
    for part in ("down_ERD", "up_ERO", "router_ED"):
        pairs = [(getattr(own[site], part).double().cpu(), getattr(wanted[site], part)) for site in wanted]
        off = sum(float((a - b).square().sum()) for a, b in pairs)
        found[part.partition("_")[0]] = (off / sum(float(b.square().sum()) for _, b in pairs)) ** 0.5
    for parameter in candidate.trained:
        parameter.grad = None
    return found


def check(candidates: list[Candidate], base: nn.Module, mixture: Mixture, ids: Tensor) -> dict[str, Any]:
    """candidate -> errors, of those that are mixtures. Raises SystemExit where one computes something else."""
    mixtures = [candidate for candidate in candidates if candidate.gradients is not None]
    if not mixtures:
        return {}
    twin = twin_result(base, mixture, ids)
    of_loss, of_gradients = TOLERANCE[next(base.parameters()).dtype]
    found = {candidate.name: errors(candidate, ids, twin) for candidate in mixtures}
    for name, off in found.items():
        worst = max(value for key, value in off.items() if key != "loss")
        if not (off["loss"] <= of_loss and worst <= of_gradients):
            raise SystemExit(f"{name} does not compute what the twin computes, so it is not timed: {off}")
    return found
