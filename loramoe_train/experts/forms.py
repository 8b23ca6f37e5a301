"""Which form computes a site: one rule, overridable by `experts.form`.

With E experts of rank r of which a token has at most k, the concatenated form does (E - k) r rank columns of work per
token in vain, and the grouped form moves k rows of the site's width per token several times. Both costs are
proportional to tokens and width, so their ratio (E - k) r / k alone decides, against a constant of the device.
"""

from collections.abc import Mapping, Sequence
from typing import Literal

import torch

Form = Literal["concatenated", "grouped"]
FormChoice = Literal["auto", "concatenated", "grouped"]

FEWEST_TOKENS = 64  # below, as in decoding, sorting costs more than it saves
BREAK_EVEN = {"cpu": 50.0}  # (E - k) r / k; the forms cross there at both widths in docs/performance.md
BREAK_EVEN_ELSEWHERE = 256.0  # from arithmetic on memory traffic; on an H100 they do not cross below 248


def choose_form(
    choice: FormChoice,
    *,
    ranks: Sequence[int],
    most: int | None,
    tokens: int,
    device: torch.device,
    break_even: Mapping[str, float] = BREAK_EVEN,
) -> Form:
    """The form for one site. `most`: experts per token at most, None where any number may have a weight.

    Experts of unequal ranks and routing without a bound are always computed in the concatenated form.
    """
    possible = most is not None and most < len(ranks) and len(set(ranks)) == 1 and ranks[0] > 0
    if not possible or choice == "concatenated":
        return "concatenated"
    if choice == "grouped":
        return "grouped"
    if tokens < FEWEST_TOKENS:
        return "concatenated"
    wasted = (len(ranks) - most) * ranks[0] / most
    return "grouped" if wasted > break_even.get(device.type, BREAK_EVEN_ELSEWHERE) else "concatenated"
