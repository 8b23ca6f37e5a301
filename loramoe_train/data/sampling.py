"""Which row of which task is sample i of a stage: exact counts, any i at once, the same on every machine (numpy only).

Shares are integers w_t (sum W). The first n samples hold c_t(n) samples of task t, the Webster (Sainte-Lague)
apportionment of n: put the k-th sample of task t at time (k - 1/2) / w_t and take the n earliest. It has what a mixture
needs: the counts add up to n, they never fall when n grows (largest remainders alone do not have this), the rounding
error does not accumulate, n * w_t / W is met exactly wherever these are integers, and c(n) needs no loop over samples.
Block b of `block` samples holds c(end) - c(begin) samples per task, in a seeded order; the k-th sample of a task is
its k-th row in a fresh seeded order for every pass over the task.

A plan over a limited number of distinct samples, and a proportional plan, repeat a *pass* that holds each of its
samples once; blocks begin anew with each pass. Other plans have no passes: each task repeats at its own pace.
"""

import hashlib
import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from functools import lru_cache

import numpy as np

from loramoe_train.errors import ConfigError, nearest
from loramoe_train.schema.data import SamplingConfig

Counts = list[int]


def apportion(n: int, weights: Sequence[int]) -> Counts:
    """Webster's apportionment of n >= 0 samples by integer weights (ties to the first task); sums to n exactly."""
    total = sum(weights)
    counts = [(2 * n * weight + total) // (2 * total) for weight in weights]  # n * w / W, rounded
    tasks = [task for task, weight in enumerate(weights) if weight]
    # Rounding misses n by at most half the number of tasks; add the earliest samples left out or drop the latest.
    while (missing := n - sum(counts)) != 0:
        if missing > 0:
            counts[min(tasks, key=lambda t: (Fraction(2 * counts[t] + 1, weights[t]), t))] += 1
        else:
            taken = [task for task in tasks if counts[task]]
            counts[max(taken, key=lambda t: (Fraction(2 * counts[t] - 1, weights[t]), t))] -= 1
    return counts


def shares(sampling: SamplingConfig, sizes: Mapping[str, int]) -> list[tuple[Fraction, list[int]]]:
    """The integer weights of the tasks: one (1, weights), or for a schedule one (until, weights) per piece.

    Raises ConfigError for weights that do not fit the tasks.
    """
    names = list(sizes)
    if sampling.strategy == "schedule":
        return _schedule(sampling, names)
    match sampling.strategy:
        case "proportional":
            weights = list(sizes.values())
        case "equal":
            weights = [1] * len(names)
        case "capped":
            weights = [min(size, sampling.cap) for size in sizes.values()]
        case "temperature":
            # rounded to 9 digits: the last bits of a power differ between machines
            powers = [size ** (1.0 / sampling.temperature) for size in sizes.values()]
            weights = [max(1, round(1e9 * power / max(powers))) for power in powers]
        case "weights":
            weights = _integers(sampling.weights, names, "data.sampling.weights")
    return [(Fraction(1), weights)]


def _schedule(sampling: SamplingConfig, names: list[str]) -> list[tuple[Fraction, list[int]]]:
    key = "data.sampling.schedule"
    if not sampling.schedule:
        raise ConfigError(f"{key} is empty; give pieces such as {{until: 0.5, weights: {{{names[0]}: 1}}}}")
    pieces, before = [], Fraction(0)
    for index, piece in enumerate(sampling.schedule):
        for name in piece:
            if name not in ("until", "weights"):
                raise ConfigError(f"{key}[{index}].{name}: unknown key{nearest(name, ('until', 'weights'))}")
        for name, kind in (("until", int | float), ("weights", Mapping)):
            if not isinstance(piece.get(name), kind) or isinstance(piece.get(name), bool):
                what = "a fraction of the stage" if name == "until" else "a weight per task"
                raise ConfigError(f"{key}[{index}].{name}={piece.get(name)!r}; give {what}")
        until = _fraction(piece["until"], f"{key}[{index}].until")
        if not before < until <= 1:
            raise ConfigError(f"{key}[{index}].until={piece['until']} must be above {float(before)} and at most 1")
        pieces.append((until, _integers(piece["weights"], names, f"{key}[{index}].weights")))
        before = until
    if before != 1:
        raise ConfigError(f"{key}: the last piece has until={float(before)}; it must be 1.0")
    return pieces


def _integers(weights: Mapping[str, object], names: list[str], key: str) -> list[int]:
    """Weights as written in decimals, as integers in the same proportion."""
    for name in weights:
        if name not in names:
            raise ConfigError(f"{key}.{name}: the mixture has no such task{nearest(name, names)}")
    missing = [name for name in names if name not in weights]
    if missing:
        raise ConfigError(f"{key} has no weight for task {missing[0]}; give every task one (0 leaves it out)")
    exact = [_fraction(weights[name], f"{key}.{name}") for name in names]
    if not any(exact):
        raise ConfigError(f"{key}: all weights are 0; give at least one task a positive weight")
    scale = math.lcm(*(fraction.denominator for fraction in exact))
    return [int(fraction * scale) for fraction in exact]


def _fraction(value: object, key: str) -> Fraction:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
        raise ConfigError(f"{key}={value!r} must be a number of at least 0")
    return Fraction(repr(value))


def drawable(sampling: SamplingConfig, sizes: Mapping[str, int]) -> int:
    """Rows of the tasks that are drawn at all: one pass over the mixture."""
    drawn = [any(weights[task] for _, weights in shares(sampling, sizes)) for task in range(len(sizes))]
    return sum(size for size, used in zip(sizes.values(), drawn, strict=True) if used)


def seeded_order(n: int, *key: object) -> np.ndarray:
    """A permutation of range(n) that depends on the key alone, (n,) int64.

    Sorting the raw output of PCG64 is stable across numpy versions, which `Generator.permutation` does not promise.
    """
    digest = hashlib.blake2b("\x1f".join(map(str, key)).encode(), digest_size=16).digest()
    raw = np.random.PCG64(int.from_bytes(digest, "little")).random_raw(n)
    return np.argsort(np.asarray(raw, dtype=np.uint64), kind="stable")


class SamplePlan:
    """`plan[i] -> (task, row)` for any i >= 0; tasks and rows are indices.

    Args:
        sizes: task name -> number of rows, in the mixture's order.
        sampling: strategy and block length.
        seed, stage: enter every order, together with the task's name.
        total: samples of the whole stage; needed by the strategy `schedule`, beyond it the last piece goes on.
        examples: draw only the first so many distinct samples, over and over; as many as there are is no limit.

    Raises ConfigError for weights that do not fit the tasks, or a schedule without `total`.
    """

    def __init__(
        self,
        sizes: Mapping[str, int],
        sampling: SamplingConfig,
        *,
        seed: int,
        stage: str = "train",
        total: int | None = None,
        examples: int | None = None,
    ) -> None:
        empty = [name for name, size in sizes.items() if size < 1]
        if empty:
            raise ConfigError(f"data.tasks: task {empty[0]} has no rows to draw from")
        self.names = tuple(sizes)
        self._key = (seed, stage)
        self._block = sampling.block
        self._rows = list(sizes.values())  # what a task has
        self._available = list(self._rows)  # what the plan uses of it
        self._cyclic = sampling.strategy == "proportional"
        pieces = shares(sampling, sizes)
        if examples is not None and examples < sum(self._rows):
            # the limited plan takes a schedule's pieces from the samples that it picks
            self._available = self._first_distinct(pieces, examples)
            self._cyclic = True
        if self._cyclic:
            self._weights, self._starts = [self._available], [0]
        else:
            if len(pieces) > 1 and total is None:
                raise ConfigError("data.sampling.strategy=schedule needs the length of the stage; set steps or epochs")
            ends = [0, *(round(until * (total or 0)) for until, _ in pieces[:-1])]
            self._weights, self._starts = [weights for _, weights in pieces], ends
        self._order = lru_cache(maxsize=4 * len(self.names))(self._make_order)
        self._samples = lru_cache(maxsize=16)(self._make_block)

    @property
    def num_distinct(self) -> int:
        """Distinct samples that the plan can draw."""
        return sum(size for task, size in enumerate(self._available) if any(w[task] for w in self._weights))

    def __getitem__(self, index: int) -> tuple[int, int]:
        return self.slice(index, index + 1)[0]

    def slice(self, start: int, stop: int) -> list[tuple[int, int]]:
        """Samples start, ..., stop - 1 as (task, row)."""
        if start < 0:
            raise IndexError(f"sample {start}: a plan begins at 0")
        samples: list[tuple[int, int]] = []
        while start < stop:
            piece, turn, local = self._locate(start)
            offset = local % self._block
            tasks, rows = self._samples(piece, turn, local // self._block)
            taken = min(stop - start, len(tasks) - offset)
            span = slice(offset, offset + taken)
            samples += zip(tasks[span].tolist(), rows[span].tolist(), strict=True)
            start += taken
        return samples

    def counts(self, n: int) -> dict[str, int]:
        """How many of the first n samples each task has."""
        return dict(zip(self.names, self._drawn(n), strict=True))

    def repeats(self, n: int) -> dict[str, float]:
        """How often the first n samples pass over (the used rows of) each task."""
        pairs = zip(self._drawn(n), self._available, strict=True)
        return dict(zip(self.names, (drawn / size if size else 0.0 for drawn, size in pairs), strict=True))

    def _locate(self, index: int) -> tuple[int, int, int]:
        """(piece of the schedule, pass, position inside it) of a sample."""
        if self._cyclic:
            turn, local = divmod(index, sum(self._available))
            return 0, turn, local
        piece = max(p for p, start in enumerate(self._starts) if start <= index)
        return piece, 0, index - self._starts[piece]

    def _piece_length(self, piece: int) -> int | None:
        if self._cyclic:
            return sum(self._available)
        return self._starts[piece + 1] - self._starts[piece] if piece + 1 < len(self._starts) else None

    def _drawn_before(self, piece: int) -> Counts:
        """Per task, the samples of the earlier pieces of a schedule."""
        drawn = [0] * len(self.names)
        for earlier in range(piece):
            counts = apportion(self._piece_length(earlier) or 0, self._weights[earlier])
            drawn = [a + b for a, b in zip(drawn, counts, strict=True)]
        return drawn

    def _drawn(self, n: int) -> Counts:
        if n <= 0:
            return [0] * len(self.names)
        piece, turn, local = self._locate(n - 1)
        start = local - local % self._block
        before = self._drawn_before(piece)
        base = apportion(start, self._weights[piece])
        tasks, _ = self._samples(piece, turn, local // self._block)
        inside = np.bincount(tasks[: local - start + 1], minlength=len(self.names)).tolist()
        passes = [turn * size if self._cyclic else 0 for size in self._available]
        return [sum(parts) for parts in zip(passes, before, base, inside, strict=True)]

    def _make_block(self, piece: int, turn: int, block: int) -> tuple[np.ndarray, np.ndarray]:
        """Tasks and rows of one block, (length,) int64 each."""
        start, length = block * self._block, self._piece_length(piece)
        stop = start + self._block if length is None else min(start + self._block, length)
        weights = self._weights[piece]
        first = apportion(start, weights)
        counts = np.subtract(apportion(stop, weights), first)
        before = self._drawn_before(piece)
        tasks = np.repeat(np.arange(len(counts)), counts)
        tasks = tasks[seeded_order(len(tasks), *self._key, "block", piece, turn, block)]
        rows = np.empty_like(tasks)
        for task in np.flatnonzero(counts):
            draws = np.arange(counts[task]) + first[task] + before[task]
            rows[tasks == task] = self._rows_of(int(task), turn, draws)
        return tasks, rows

    def _rows_of(self, task: int, turn: int, draws: np.ndarray) -> np.ndarray:
        """The rows of the given draws of a task (of this pass, where the plan has passes)."""
        epochs, places = np.divmod(draws, self._available[task])
        return np.concatenate([self._order(task, turn + e)[places[epochs == e]] for e in np.unique(epochs).tolist()])

    def _make_order(self, task: int, epoch: int) -> np.ndarray:
        used, size, key = self._available[task], self._rows[task], (*self._key, self.names[task])
        if used == size:
            return seeded_order(size, *key, epoch).astype(np.int32)
        picked = seeded_order(size, *key, 0)[:used]
        return picked[seeded_order(used, *key, "limited", epoch)].astype(np.int32)

    def _first_distinct(self, pieces: list[tuple[Fraction, list[int]]], examples: int) -> Counts:
        """Rows per task among the first `examples` distinct samples; each is the start of the task's first order."""
        weights_of = [weights for _, weights in pieces]
        last = weights_of[-1]
        ends = [round(until * examples) for until, _ in pieces[:-1]]

        def distinct(n: int) -> Counts:
            drawn, begin = [0] * len(self._rows), 0
            for weights, end in zip(weights_of, [*ends, n], strict=True):
                counts = apportion(max(min(end, n) - begin, 0), weights)
                drawn = [a + b for a, b in zip(drawn, counts, strict=True)]
                begin = max(end, begin)
            return [min(count, size) for count, size in zip(drawn, self._rows, strict=True)]

        # by then every task of the last piece has been drawn whole
        high = max([1, *ends]) + max((s + 1) * sum(last) // w + 1 for s, w in zip(self._rows, last, strict=True) if w)
        wanted = min(examples, sum(distinct(high)))
        low = 0
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if sum(distinct(middle)) < wanted else (low, middle)
        return distinct(high)
