"""Slow, obvious twins of the fast paths: Python loops over tokens, experts and ranks, in float64."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def mixture(
    x_ND: Tensor,
    weight_OD: Tensor,
    bias_O: Tensor | None,
    experts: Sequence[tuple[Tensor, Tensor, float]],
    w_NE: Tensor,
) -> Tensor:
    """y = W x + b + sum_e w_e s_e up_e (down_e x), token by token. `experts` holds (down, up, scale)."""
    rows = []
    for n in range(x_ND.shape[0]):
        y_O = weight_OD @ x_ND[n]
        if bias_O is not None:
            y_O = y_O + bias_O
        for e, (down, up, scale) in enumerate(experts):
            y_O = y_O + w_NE[n, e] * scale * (up @ (down @ x_ND[n]))
        rows.append(y_O)
    return torch.stack(rows)


def top_k_share(logits_NE: Tensor, mask_N: Sequence[bool], top_k: int) -> list[float]:
    """Share of each expert among the top-k assignments of the masked tokens."""
    experts = logits_NE.shape[1]
    counts, tokens = [0.0] * experts, 0
    for row, used in zip(logits_NE.tolist(), mask_N, strict=True):
        if used:
            tokens += 1
            for e in sorted(range(experts), key=lambda i: -row[i])[:top_k]:
                counts[e] += 1.0 / top_k
    return [count / tokens for count in counts]


def routing_specialization(
    logits_NE: Tensor, mask_N: Sequence[bool], top_k: int, balance: float, entropy: float, sign: float
) -> Tensor:
    """balance * sum_e pbar_e fbar_e + sign * entropy * mean H, for one site; fbar is a constant."""
    share = top_k_share(logits_NE, mask_N, top_k)
    tokens = [n for n, used in enumerate(mask_N) if used]
    total = torch.zeros((), dtype=logits_NE.dtype)
    for n in tokens:
        p = torch.exp(logits_NE[n] - torch.logsumexp(logits_NE[n], 0))
        for e in range(len(share)):
            total = total + balance * share[e] * p[e] / len(tokens)
            total = total + sign * entropy * (-p[e] * torch.log(p[e])) / len(tokens)
    return total


def routing_specialization_gradient(
    logits_NE: Tensor, mask_N: Sequence[bool], top_k: int, balance: float, entropy: float, sign: float
) -> Tensor:
    """The gradient through the logits in closed form (paper note: checked by hand, not by autograd)."""
    share = top_k_share(logits_NE, mask_N, top_k)
    tokens, grad = sum(mask_N), torch.zeros_like(logits_NE)
    for n, used in enumerate(mask_N):
        if not used:
            continue
        z = [float(v) for v in logits_NE[n]]
        norm = max(z) + math.log(sum(math.exp(v - max(z)) for v in z))
        p = [math.exp(v - norm) for v in z]
        entropy_n = -sum(q * math.log(q) for q in p)
        mean_share = sum(q * f for q, f in zip(p, share, strict=True))
        for e, q in enumerate(p):
            pull = balance * q * (share[e] - mean_share)
            spread = -sign * entropy * q * (math.log(q) + entropy_n)
            grad[n, e] = (pull + spread) / tokens
    return grad
