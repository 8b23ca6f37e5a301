"""Gate supervision of MeteoRA (arXiv 2405.13053): routers learn to name the domain of the example that a token is from.

    L = mean over sites and masked tokens t of cross-entropy(logits of t, domain of t)

Expert e stands for domain e, so there are as many experts as domains. The authors' code shifts the labels by one as for
a language model, which leaves out each row's last position; ours takes all masked tokens.

Legend: M sites, N tokens, E experts.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from loramoe_train.aux_losses.additive import AdditiveLoss
from loramoe_train.aux_losses.sums import Mask, grouped, one_of, token_mask
from loramoe_train.routing.types import Routing, Tokens


class GateSupervision(AdditiveLoss):
    """Cross-entropy of the routers' softmax on the domain."""

    def __init__(
        self, *, num_domains: int, tokens: Mask = "valid", num_experts: Mapping[str, int] | None = None
    ) -> None:
        """Raises ValueError where a site has another number of experts than there are domains."""
        for site, experts in (num_experts or {}).items():
            if experts != num_domains:
                raise ValueError(
                    f"{site} has {experts} experts for {num_domains} domains, and each expert stands for one; use"
                    " experts.layout=per_domain, or as many experts.adapters as domains"
                )
        self.mask = one_of("tokens", tokens, "valid", "supervised")

    def sums(self, records: Mapping[str, Routing], tokens: Tokens) -> Tensor:
        mask_N, total = token_mask(tokens, self.mask, records), []
        for group in grouped(records):
            logp_MNE = group.logits_MNE.log_softmax(dim=-1)
            own_MN1 = tokens.domain_N.clamp(min=0).view(1, -1, 1).expand(len(group.sites), -1, 1)
            total.append(-(logp_MNE.gather(-1, own_MN1).squeeze(-1) * mask_N).sum())
        return torch.stack(total).sum().view(1)

    def value(self, counts: Tensor, sums: Tensor, records: Mapping[str, Routing]) -> Tensor:
        return sums[0] / (counts[-1].clamp(min=1.0) * len(records))
