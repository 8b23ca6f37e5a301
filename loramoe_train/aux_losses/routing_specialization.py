"""Routing specialization loss of LoRA-Mixer (arXiv 2507.00029, v1 Figure 2, ICLR Eq. 5-6); v1 calls it SBL.

For the router of one site, over the masked tokens x:

    L = balance_coef * sum_e pbar_e fbar_e  +  sign * entropy_coef * mean_x H(p(x)),   H(p) = - sum_e p_e log p_e

pbar_e is the mean of p_e(x); fbar_e is expert e's share of the top-k assignments and has no gradient. As printed the
sign is minus, so minimising L flattens each token's routing while the first term pushes against overused experts; the
paper's prose says the opposite, hence `entropy_sign: plus`. There is no factor E as in Switch. Sites are averaged
(`reduction: sum` adds them). With T tokens and fbar fixed, the gradient through the logits is

    dL/dz_{t,e} = 1/T [ balance_coef p_e (fbar_e - sum_j p_j fbar_j) - sign entropy_coef p_e (log p_e + H(p)) ].

At uniform p the two terms are balance_coef / E and sign * entropy_coef * log E.

Legend: M sites, N tokens, E experts.
"""

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from loramoe_train.aux_losses.sums import Mask, balance_sums, count_hits, grouped, one_of, token_mask
from loramoe_train.routing.types import Routing, Tokens


class RoutingSpecialization:
    """Balance against the top-k share, minus or plus the mean token entropy."""

    def __init__(
        self,
        *,
        top_k: int | Mapping[str, int],
        balance_coef: float = 0.01,
        entropy_coef: float = 0.001,
        entropy_sign: Literal["minus", "plus"] = "minus",
        reduction: Literal["mean", "sum"] = "mean",
        tokens: Mask = "valid",
    ) -> None:
        self.top_k, self.balance_coef = top_k, balance_coef
        self.reduction = one_of("reduction", reduction, "mean", "sum")
        self.mask = one_of("tokens", tokens, "valid", "supervised")
        sign = -1.0 if one_of("entropy_sign", entropy_sign, "minus", "plus") == "minus" else 1.0
        self.entropy_coef = sign * entropy_coef

    def statistics(self, records: Mapping[str, Routing], tokens: Tokens) -> Tensor:
        """Top-k hits of every site and expert, then the number of tokens."""
        return count_hits(grouped(records), self.top_k, token_mask(tokens, self.mask, records))

    def __call__(self, records: Mapping[str, Routing], tokens: Tokens, statistics: Tensor) -> Tensor:
        mask_N, groups = token_mask(tokens, self.mask, records), grouped(records)
        logp_of = [group.logits_MNE.log_softmax(dim=-1) for group in groups]
        p_of = [logp_MNE.exp() for logp_MNE in logp_of]
        balance = sum(term_M.sum() for term_M in balance_sums(groups, statistics, p_of, mask_N))
        entropy = -sum(((p * logp).sum(dim=-1) * mask_N).sum() for p, logp in zip(p_of, logp_of, strict=True))
        sites = len(records) if self.reduction == "mean" else 1
        scale = statistics[-1].clamp(min=1.0) * sites
        return torch.as_tensor(self.balance_coef * balance + self.entropy_coef * entropy) / scale
