"""The twins of LoRA and its variants, and of the mixtures that route token by token at every linear for itself."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tests.twins.per_linear import (
    ATTENTION,
    FFN,
    MIXER,
    Decided,
    Loss,
    PerLinear,
    Token,
    Weigh,
    best,
    by_key,
    kept,
    linear_softmax,
)

BOTH = {"experts", "routers"}


def number(experts: int) -> Callable[..., int]:
    return lambda layer, layers, case: experts


def one_per_domain(layer: int, layers: int, case: Any) -> int:
    return len(case.adapters) or case.num_domains


# -- LoRA (2106.09685), rsLoRA (2312.03732), LoRA+ (2402.12354): one expert, always ------------------------------------


def always(token: Token) -> tuple[list[Any], None]:
    return [1.0], None


def lora(**changes: Any) -> PerLinear:
    return PerLinear((*ATTENTION, *MIXER), number(1), [({"experts"}, always, None)], always, **changes)


# -- how tokens weigh experts ------------------------------------------------------------------------------------------


def own_domain(token: Token) -> tuple[list[Any], None]:
    """Hard: the expert of the example's domain, with weight 1."""
    return [float(e == token.domain) for e in range(token.experts)], None


def soft(token: Token) -> tuple[list[Any], list[Any]]:
    p = linear_softmax(token)
    return p, p


def top(k: int) -> Weigh:
    def weigh(token: Token) -> tuple[list[Any], list[Any]]:
        p = linear_softmax(token)
        return kept(p, best(p, k), renormalise=True), p

    return weigh


def normalised_entropy(p: Sequence[Any], q: float = 1.1) -> Any:
    """Tsallis: (1 - sum p^q) / (q - 1), over its value at uniform p."""
    experts = len(p)
    return (1 - sum(value**q for value in p)) / (1 - experts ** (1 - q))


def dynmole(token: Token) -> tuple[list[Any], list[Any]]:
    """All experts above entropy 0.9; else the best two, and others while the sum of p does not exceed 0.75."""
    p = linear_softmax(token)
    chosen, total = [], 0.0
    for place, e in enumerate(best(p, token.experts)):
        total += p[e].item()
        if place < 2 or total <= 0.75:
            chosen.append(e)
    if normalised_entropy(p).item() > 0.9:
        chosen = list(range(token.experts))
    return kept(p, chosen, renormalise=False), p


def adamole(token: Token) -> tuple[list[Any], list[Any]]:
    """max(p - tau, 0) over its sum, tau = sigmoid(v x + b) / 8; losses take p - tau."""
    gate, threshold, bias = (token.router[name] for name in ("gate", "threshold", "threshold_bias"))
    height = threshold @ token.x_D + bias[0]
    tau = 1 / (1 + torch.exp(-height)) / 8
    powers = [torch.exp(gate[e] @ token.x_D) for e in range(token.experts)]
    above = [power / sum(powers) - tau for power in powers]
    positive = [torch.clamp(value, min=0.0) for value in above]
    total = sum(positive)
    return [value / total for value in positive], above  # the best p is at least 1/8, so some are above


# -- losses ------------------------------------------------------------------------------------------------------------


def balance(members: Sequence[Decided], used: Callable[[Decided, int], Any]) -> Any:
    """E * sum_e (mean of what is used of e) * (mean p_e)."""
    experts, tokens = members[0].token.experts, len(members)
    total: Any = 0.0
    for e in range(experts):
        share = sum(used(entry, e) for entry in members) / tokens
        total = total + share * sum(entry.p[e] for entry in members) / tokens
    return experts * total


def picked(entry: Decided, e: int) -> float:
    return float(entry.weights[e] > 0)


def mola_loss(decided: Sequence[Decided]) -> Any:
    """Every layer's linears together, of each token's picks half; layers add up."""
    layers = by_key(decided, lambda token: token.layer).values()
    return 0.001 * sum(balance(members, lambda entry, e: picked(entry, e) / 2) for members in layers)


def loramoe_loss(decided: Sequence[Decided]) -> Any:
    """Variance over squared mean of Z at every linear; tasks are dealt out to two groups of experts in turn."""
    total: Any = 0.0
    for members in by_key(decided, lambda token: token.site).values():
        z = []
        for example in by_key(members, lambda token: token.row).values():
            first_half_is_own = example[0].token.task % 2 == 0
            for e in range(6):
                q = sum(entry.p[e] for entry in example) / len(example)
                z.append(q * (1.1 if (e < 3) == first_half_is_own else 0.9))
        mean = sum(z) / len(z)
        total = total + sum((value - mean) ** 2 for value in z) / (len(z) - 1) / mean**2
    return 0.1 * total


def dynmole_loss(decided: Sequence[Decided]) -> Any:
    """Mean entropy, and balance of the probabilities that were kept, over all linears of the model together."""
    entropy = sum(normalised_entropy(entry.p) for entry in decided) / len(decided)
    return 0.01 * entropy + 0.001 * balance(decided, lambda entry, e: entry.weights[e])


def adamole_loss(decided: Sequence[Decided]) -> Any:
    sites = by_key(decided, lambda token: token.site).values()
    return 0.001 * sum(balance(members, picked) for members in sites)


def meteora_loss(decided: Sequence[Decided]) -> Any:
    """50 times the mean cross-entropy of the gates on the number of the task."""
    return 50.0 * sum(-torch.log(entry.p[entry.token.domain]) for entry in decided) / len(decided)


def specialization(k: int) -> Loss:
    """LoRA-Mixer: 0.01 * sum_e mean p_e * share of the top k, minus 0.001 * mean entropy; the mean over linears."""

    def loss(decided: Sequence[Decided]) -> Tensor:
        sites = by_key(decided, lambda token: token.site)
        total: Any = 0.0
        for members in sites.values():
            tokens = len(members)
            for e in range(members[0].token.experts):
                share = sum(e in best(entry.p, k) for entry in members) / (k * tokens)
                total = total + 0.01 * share * sum(entry.p[e] for entry in members) / tokens
            total = total - 0.001 * sum(-p * torch.log(p) for entry in members for p in entry.p) / tokens
        return total / len(sites)

    return loss


# -- the methods -------------------------------------------------------------------------------------------------------

TWINS = {
    "lora": lora(),
    "rslora": lora(scale=lambda alpha, rank: alpha / rank**0.5),
    "lora_plus": lora(rates={".bank.up": 20.0}),
    # 2, 4, 6 and 8 experts in the quarters of the model
    "mola": PerLinear(
        (*ATTENTION, *FFN, *MIXER),
        lambda layer, layers, case: (2, 4, 6, 8)[4 * layer // layers],
        [(BOTH, top(2), mola_loss)],
        top(2),
    ),
    "loramoe": PerLinear((*FFN, *MIXER), number(6), [(BOTH, soft, loramoe_loss)], soft),
    "dynmole": PerLinear((*FFN, *MIXER), number(6), [(BOTH, dynmole, dynmole_loss)], dynmole),
    "adamole": PerLinear((*ATTENTION, *MIXER), number(8), [(BOTH, adamole, adamole_loss)], adamole),
    "hydralora": PerLinear((*FFN, *MIXER), number(4), [(BOTH, soft, None)], soft, one_down=True),
    "meteora": PerLinear(
        (*ATTENTION, *FFN, *MIXER),
        one_per_domain,
        [({"experts"}, own_domain, None), ({"routers"}, top(2), meteora_loss)],
        top(2),
    ),
    "lora_mixer": PerLinear(
        (*ATTENTION, *MIXER),
        one_per_domain,
        [({"experts"}, own_domain, None), ({"routers"}, soft, specialization(3))],
        top(3),
    ),
    "lora_mixer_plug_and_play": PerLinear(
        (*ATTENTION, *FFN, *MIXER), one_per_domain, [({"routers"}, soft, specialization(3))], top(3)
    ),
}
