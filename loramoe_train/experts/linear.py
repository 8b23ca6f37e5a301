"""A frozen linear layer with routed experts beside it: y = W x + sum_e w_e(x) s_e up_e down_e x.

The wrapper has no `.weight`: a fused kernel that reads the raw weight fails instead of ignoring the experts unnoticed.
"""

import torch
from torch import Tensor, nn

from loramoe_train.experts.bank import ExpertBank
from loramoe_train.routing.context import RoutingContext
from loramoe_train.routing.fixed import domain_weights, uniform_weights
from loramoe_train.routing.types import Routing


class ExpertLinear(nn.Module):
    """Serves one site: asks for a routing decision, records it, adds the weighted experts to the base's output."""

    def __init__(
        self, base: nn.Module, bank: ExpertBank, router: nn.Module | None, *, site: str, context: RoutingContext
    ) -> None:
        super().__init__()
        self.base, self.bank, self.router = base, bank, router
        self.site, self.context = site, context

    @property
    def in_features(self) -> int:
        return self.bank.d_in

    @property
    def out_features(self) -> int:
        return self.bank.d_out

    def forward(self, x: Tensor) -> Tensor:
        result = self.base(x)
        if self.context.mode == "off":
            return result
        if self.training and not self.context.is_open:
            raise RuntimeError(f"{self.site}: training forward outside `with context.open(tokens):`")
        x_ND = x.reshape(-1, x.shape[-1])
        routing = self.decide(x_ND)
        self.context.record(self.site, routing)
        weights_NE = routing.weights_NE
        delta_NO = self.bank(x_ND, weights_NE)
        return result + delta_NO.view(*x.shape[:-1], -1).to(result.dtype)

    def decide(self, x_ND: Tensor) -> Routing:
        """The routing of the mode in force: learned, by domain, or uniform."""
        experts = self.bank.num_experts
        if self.context.mode == "by_domain":
            tokens = self.context.tokens
            return Routing(domain_weights(tokens.domain_N, self.context.num_domains, experts))
        if self.context.mode == "uniform":
            return Routing(uniform_weights(x_ND, experts))
        if self.router is None:
            return Routing(torch.ones(x_ND.shape[0], experts, dtype=torch.float32, device=x_ND.device))
        return self.router(x_ND, self.context)
