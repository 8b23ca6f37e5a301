"""Slow twins of the auxiliary losses: loops over sites, tokens and experts, written from the papers' equations."""

import math

import torch

# Everywhere: `p[site][n]` is a list of differentiable probabilities, `used[site][n]` a list of how often (or how much)
# token n uses each expert, `tokens` the numbers of the tokens that count.


def balance(p, used, tokens, *, experts, per_pick, factor):
    """factor * sum_e f_e P_e over the pooled sites."""
    pairs = [(site, n) for site in p for n in tokens]
    picks = sum(float(used[site][n][e]) for site, n in pairs for e in range(experts)) if per_pick else len(pairs)
    total = 0.0
    for e in range(experts):
        f_e = sum(used[site][n][e] for site, n in pairs) / picks
        p_e = sum(p[site][n][e] for site, n in pairs) / len(pairs)
        total = total + f_e * p_e
    return factor * total


def top_k_used(p, k):
    """1 for each of the k largest probabilities."""
    rows = []
    for row in p:
        values = [value.item() for value in row]
        best = sorted(range(len(values)), key=lambda e, values=values: -values[e])[:k]
        rows.append([float(e in best) for e in range(len(values))])
    return rows


def localized(p, samples, groups, *, experts, delta):
    """Var(Z) / Mean(Z)^2 of one site; `samples[m]` are the tokens of example m, `groups[m]` its group of two."""
    z = []
    for tokens, group in zip(samples, groups, strict=True):
        for e in range(experts):
            first_half = 2 * e < experts  # the middle one belongs to it
            matches = first_half == (group == 0)
            importance = 1 + delta if matches else 1 - delta
            z.append(importance * sum(p[n][e] for n in tokens) / len(tokens))
    mean = sum(z) / len(z)
    variance = sum((value - mean) ** 2 for value in z) / (len(z) - 1)
    return variance / mean**2


def tsallis(p, q):
    """Normalised: over its value at uniform p."""
    if q == 1:
        return sum(-value * torch.log(value) for value in p) / math.log(len(p))
    top = (1 - sum(value**q for value in p)) / (q - 1)
    return top / ((1 - len(p) ** (1 - q)) / (q - 1))


def renyi(p, q):
    return torch.log(sum(value**q for value in p)) / (1 - q) / math.log(len(p))
