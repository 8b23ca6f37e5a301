"""Per-layer lists from short notations: one number, MoLA's group codes, or the list itself.

A group code gives one expert count per group of consecutive layers: 2468 puts 2, 4, 6 and 8 experts into the four
quarters of the model (MoLA, arXiv 2402.08562, section 5.1; `10-2-2-2` writes counts above nine). When the layers do not
divide evenly, the groups that get one layer more are chosen so that the total stays as near as possible to
mean(code) * layers; ties go to the middle groups, then to the higher ones. What a checkpoint stores is always the list.
"""

import re
from collections.abc import Sequence
from itertools import combinations

PER_DOMAIN, PER_TASK = "per_domain", "per_task"


def group_code(layout: int | str) -> tuple[int, ...] | None:
    """The digits of a group code, or None when `layout` is a plain count. 2468, "2468" and "2-4-6-8" are the same."""
    text = str(layout).strip()
    if re.fullmatch(r"\d{4}", text):
        return tuple(int(digit) for digit in text)
    if re.fullmatch(r"\d+(-\d+)+", text):
        return tuple(int(part) for part in text.split("-"))
    return None


def expand_code(code: Sequence[int], num_layers: int) -> list[int]:
    """One count per layer from one count per group. Raises ValueError with more groups than layers."""
    groups = len(code)
    if groups > num_layers:
        raise ValueError(f"{groups} groups for {num_layers} layers; give at most one group per layer")
    size, extra = divmod(num_layers, groups)
    centre, target = (groups - 1) / 2, sum(code) / groups * num_layers

    def misfit(chosen: tuple[int, ...]) -> tuple[float, float, int]:
        total = size * sum(code) + sum(code[g] for g in chosen)
        return round(abs(total - target), 9), sum(abs(g - centre) for g in chosen), -sum(chosen)

    longer = min(combinations(range(groups), extra), key=misfit)
    return [count for g, count in enumerate(code) for _ in range(size + (g in longer))]


def expand_layout(
    layout: int | str | Sequence[int], num_layers: int, *, num_domains: int | None = None, num_tasks: int | None = None
) -> list[int]:
    """Experts per layer. Raises ValueError (to be prefixed with the key) when the notation does not fit the model.

    A count of zero leaves a layer without experts.
    """
    if isinstance(layout, int | str):
        if layout in (PER_DOMAIN, PER_TASK):
            count = num_domains if layout == PER_DOMAIN else num_tasks
            if count is None:
                raise ValueError(f"{layout} needs a mixture of tasks")
            return [count] * num_layers
        code = group_code(layout)
        if code is not None:
            counts = expand_code(code, num_layers)
        elif re.fullmatch(r"\d+", str(layout)):
            counts = [int(layout)] * num_layers
        else:
            raise ValueError(
                f"'{layout}' is no layout; give a count (8), a group code (2468 or 10-2-2-2), one count per layer"
                f" ([2,2,4,...]), {PER_DOMAIN} or {PER_TASK}"
            )
    else:
        counts = per_layer(layout, num_layers)
    if min(counts) < 0 or max(counts) == 0:
        raise ValueError("gives no layer an expert" if max(counts) == 0 else "holds a negative count")
    return counts


def per_layer(value: int | Sequence[int], num_layers: int) -> list[int]:
    """One number for every layer, or a list of exactly `num_layers`. Raises ValueError otherwise."""
    if isinstance(value, int):
        return [value] * num_layers
    if len(value) != num_layers:
        raise ValueError(f"has {len(value)} entries for {num_layers} layers; give one number, or {num_layers} of them")
    return [int(entry) for entry in value]
