"""Static routes folded into one LoRA: where every token gets the same weights, experts are one adapter of their summed
rank, `delta = sum_e w_e s_e up_e^T down_e = (rows of up, times w s)^T (rows of down)`, exactly.

That serves what needs no router at inference: the experts of one task or domain (hard routing, or a learned gate on the
task), one expert, or the uniform average. The result is a plain PEFT folder that any program can merge or serve. Plain
LoRA beside a mixture goes along with every route. Of experts that are copies of whole blocks only one at a time is a
LoRA: an activation stands between their factors.

Legend: R sum of the ranks used, D in, O out.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from loramoe_train.errors import ConfigError, nearest
from loramoe_train.experts.peft_folder import LoraFactors
from loramoe_train.experts.plan import ExpertSpec
from loramoe_train.routing.fixed import domain_table

Route = Sequence[float]  # one weight per expert


def route_weights(route: str, *, experts: int, domains: Sequence[str]) -> list[float]:
    """The weights of a static route: `uniform`, `all` (1 each), `expert:NUMBER` or `domain:NAME` (its
    own experts, see `domain_table`).

    Raises ConfigError for another route, an expert that the layer does not have, or an unknown domain.
    """
    kind, _, value = route.partition(":")
    if kind == "uniform" and not value:
        return [1.0 / experts] * experts
    if kind == "all" and not value:
        return [1.0] * experts
    if kind == "expert" and value.isdecimal():
        if int(value) >= experts:
            raise ConfigError(f"route={route}: a layer has experts 0 to {experts - 1}")
        return [float(e == int(value)) for e in range(experts)]
    if kind == "domain" and value:
        if value not in domains:
            raise ConfigError(f"route={route}: no such domain{nearest(value, domains)}")
        return domain_table(len(domains), experts)[list(domains).index(value)].tolist()
    if kind == "task" and value:
        raise ConfigError(f"route={route}: these routers do not decide by the task; write uniform or domain:NAME")
    raise ConfigError(f"route={route}: write uniform, all, expert:NUMBER, domain:NAME or task:NAME")


def fold(
    plan: Mapping[str, ExpertSpec],
    tensors: Mapping[str, Tensor],
    route: str | Mapping[str, Route],
    *,
    domains: Sequence[str] = (),
    whole_blocks: bool = False,
) -> dict[str, LoraFactors]:
    """Site -> one pair of factors. `tensors` are those of an adapter folder: `SITE.bank.down` and `SITE.bank.up`.

    Args:
        route: see `route_weights`; or the weights by site.
        whole_blocks: experts.mixing=output; raises ConfigError for a route that gives weight to several experts then,
            and where experts with magnitudes would be mixed.
    """
    folded = {}
    for site, spec in plan.items():
        weights: Route = [1.0] * spec.num_experts
        magnitudes_EO = tensors.get(f"{site}.bank.magnitude")
        if spec.routed:
            named = isinstance(route, str)
            weights = route_weights(route, experts=spec.num_experts, domains=domains) if named else route[site]
            said = f"route={route}" if named else "the routers' own route"
            single = sorted(weights) == [0.0] * (spec.num_experts - 1) + [1.0]
            if whole_blocks and not single:
                raise ConfigError(
                    f"{said} gives weight to several experts, but they are copies of whole blocks"
                    " (experts.mixing=output), whose sum is no LoRA; name one of them, such as route=expert:0"
                )
            if magnitudes_EO is not None and not single:
                raise ConfigError(
                    f"{said}: {site} has experts with magnitudes, and a mixture of those is no LoRA; name one of"
                    " them, such as route=expert:0"
                )
        factors = [weight * scale for weight, scale in zip(weights, spec.scales, strict=True)]
        factor_R = torch.tensor([f for f, rank in zip(factors, spec.ranks, strict=True) for _ in range(rank)])
        down_RD, up_RO = tensors[f"{site}.bank.down"], tensors[f"{site}.bank.up"] * factor_R[:, None]
        if f"{site}.bank.start_down" in tensors:  # what every expert started from is subtracted
            lost, start_rD = -sum(factors), tensors[f"{site}.bank.start_down"]
            down_RD = torch.cat([down_RD, start_rD])
            up_RO = torch.cat([up_RO, tensors[f"{site}.bank.start_up"] * lost])
            factor_R = torch.cat([factor_R, torch.full((len(start_rD),), lost)])
        if len(down_RD) < len(up_RO):  # shared by all experts: their ups add up
            folded[site] = LoraFactors(down_RD, up_RO.unflatten(0, (-1, len(down_RD))).sum(dim=0).T)
        else:
            used_R = factor_R != 0
            magnitude_O = None if magnitudes_EO is None else magnitudes_EO[weights.index(1.0)]
            folded[site] = LoraFactors(down_RD[used_R], up_RO[used_R].T, magnitude_O)
    return folded
