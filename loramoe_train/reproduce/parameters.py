"""Parameter counts: a paper's own, checked on a model without weights, and ranks that give methods the same budget."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from loramoe_train.errors import ConfigError
from loramoe_train.planning import Counts, make_counts
from loramoe_train.reproduce.folder import Found
from loramoe_train.reproduce.runs import Wanted, compose_run, pairs
from loramoe_train.reproduce.schema import Figure, PaperTable
from loramoe_train.schema.run import RunConfig

BUDGETS = ("none", "equal", "active")
MAX_RANK = 4096
TOLERANCE = 0.1  # of the reference's budget: a rank is a whole number, so most budgets are only nearly met


@dataclass(frozen=True)
class Checked:
    """A figure of the paper and what we count."""

    figure: Figure
    ours: int
    of: int  # what a per cent is a part of

    @property
    def per_cent(self) -> float:
        return 100 * self.ours / self.of

    @property
    def matches(self) -> bool:
        """A count must be the same; per cent must be the same as printed."""
        if self.figure.count is not None:
            return self.ours == self.figure.count
        if self.figure.millions is not None:
            return f"{self.ours / 1e6:.{self.figure.digits}f}" == f"{self.figure.millions:.{self.figure.digits}f}"
        return f"{self.per_cent:.{self.figure.digits}f}" == f"{self.figure.per_cent:.{self.figure.digits}f}"

    def line(self, table: PaperTable) -> str:
        figure = self.figure
        part = {"trained": "trained parameters", "routers": "parameters of routers", "base": "parameters"}[figure.part]
        whole = {"base": "of the base", "sum": "of the base and what is added"}[figure.of]
        if figure.beside is not None:
            whole = f"of {table.methods[figure.beside].title}'s"
        counted = f"{self.ours:,}"
        if figure.per_cent is not None:
            printed = f"{figure.per_cent:g} % {whole}"
            counted += f", {self.per_cent:.{figure.digits + 1}f} %"
        else:
            printed = f"{figure.count:,}" if figure.count is not None else f"{figure.millions:g} million"
        verdict = "the same" if self.matches else f"not matched{f': {figure.note}' if figure.note else ''}"
        return (
            f"{table.methods[figure.method].title} on {table.scales['paper'].bases[figure.base].title}: {part} here"
            f" {counted}; paper {printed} ({figure.source}) [{figure.mark}]: {verdict}"
        )


class Counted:
    """Counts of a table's methods on the bases of its scale `paper`, each made once, on a model without weights."""

    def __init__(self, table: PaperTable) -> None:
        self.table, self._known = table, dict[tuple[str, str], Counts]()

    def of(self, base: str, method: str) -> Counts:
        """Raises LoramoeError as a run of it would."""
        if (base, method) not in self._known:
            train = next(iter(self.table.scales["paper"].train))  # data changes no count
            given = self.table.overrides("paper", base, method, train)
            self._known[base, method] = make_counts(compose_run(given, ()))[0]
        return self._known[base, method]

    def check_figures(self) -> list[Checked]:
        """Beside what the paper gives a figure for, our count."""
        found = []
        for figure in self.table.parameters:
            counts = self.of(figure.base, figure.method)
            ours = {"trained": counts.trained, "routers": counts.routers, "base": counts.base}[figure.part]
            whole = counts.base if figure.of == "base" else counts.total
            if figure.beside is not None:
                whole = self.of(figure.base, figure.beside).trained
            found.append(Checked(figure, ours, whole))
        return found

    def without_a_figure(self) -> list[str]:
        """A line for every method and base of which the paper does not give what is trained."""
        given = {(figure.base, figure.method) for figure in self.table.parameters if figure.part == "trained"}
        bases = self.table.scales["paper"].bases
        lines = []
        for base, method in pairs(self.table, self.table.scales["paper"], list(self.table.methods), list(bases)):
            if (base, method) not in given:
                counts = self.of(base, method)
                share = 100 * counts.trained / counts.base
                lines.append(
                    f"{self.table.methods[method].title} on {bases[base].title}: trained parameters here"
                    f" {counts.trained:,}, {share:.3f} % of the base; the paper gives none"
                )
        return lines


def equal_budgets(table: PaperTable, runs: Sequence[Wanted], budget: str) -> tuple[list[Wanted], list[str]]:
    """The runs with ranks that give every method the reference's number of adapter parameters, and a line for each.

    Args:
        budget: `equal`, of all that trains, or `active`, of what a token goes through.

    Alpha changes with the rank, so that their ratio, the scale of an update, stays. A method whose ranks are not free,
    or that cannot come near, is an error: leave it out with methods=.

    Raises:
        ConfigError: no reference in the table, or a method that cannot have this budget.
    """
    if table.reference is None:
        raise ConfigError(f"budget={budget}: this table names no reference method; leave budget out")
    made: dict[tuple[str, str, str], RunConfig] = {}
    targets: dict[tuple[str, str], int] = {}
    notes = []
    for run in runs:
        key = (run.base, run.method, run.train)
        if key in made:
            continue
        where = (run.base, run.train)
        if where not in targets:
            targets[where] = _size(_reference(table, runs, where), budget)
        config = run.config if run.method == table.reference else _fitted(run, targets[where], budget)
        made[key] = config
        notes.append(_reached(key, config, targets[where], budget))
    with_ranks = [replace(run, config=_ranks_of(run.config, made[run.base, run.method, run.train])) for run in runs]
    return with_ranks, notes


def budgets_of(table: PaperTable, found: Iterable[Found], budget: str) -> list[str]:
    """The same lines for runs that are there, from the configs they were started with. Raises LoramoeError."""
    configs: dict[tuple[str, str, str], RunConfig] = {}
    for run in found:
        key = (run.base, run.method, run.train)
        if key not in configs:
            configs[key] = run.sweep.config(run.status.run)
    notes = []
    for key, config in configs.items():
        reference = configs.get((key[0], str(table.reference), key[2]))
        if reference is not None:
            notes.append(_reached(key, config, _size(reference, budget), budget))
    return notes


def _reached(key: tuple[str, str, str], config: RunConfig, target: int, budget: str) -> str:
    base, method, train = key
    size = _size(config, budget)
    return (
        f"{method} on {base} ({train}): rank {config.experts.rank}, {size:,} of {target:,} parameters"
        f" ({100 * (size / target - 1):+.1f} %)"
    )


def _reference(table: PaperTable, runs: Iterable[Wanted], where: tuple[str, str]) -> RunConfig:
    for run in runs:
        if (run.base, run.train) == where and run.method == table.reference:
            return run.config
    raise ConfigError(f"budget: the reference {table.reference} is not among the methods on {where[0]}; add it")


def _size(config: RunConfig, budget: str) -> int:
    counts = make_counts(config)[0]
    return counts.active if budget == "active" else counts.experts + counts.routers


def _fitted(run: Wanted, target: int, budget: str) -> RunConfig:
    """The config with the rank that comes nearest; counts grow in a straight line with the rank."""
    config, experts = run.config, run.config.experts
    named = f"{run.method} on {run.base}"
    if not isinstance(experts.rank, int) or experts.adapters:
        raise ConfigError(f"budget={budget}: the ranks of {named} are given, not free; leave it out with methods=")
    if not make_counts(config)[0].experts:
        raise ConfigError(f"budget={budget}: {named} has no experts, so no rank to change; leave it out with methods=")
    low, high = 1, 2
    sizes = {rank: _size(_with_rank(config, rank), budget) for rank in (low, high)}
    slope = sizes[high] - sizes[low]
    guess = low + (target - sizes[low]) / slope
    ranks = sorted({min(max(round(guess) + step, 1), MAX_RANK) for step in (-1, 0, 1)})
    sizes = {rank: _size(_with_rank(config, rank), budget) for rank in ranks}
    rank = min(ranks, key=lambda each: (abs(sizes[each] - target), each))
    if abs(sizes[rank] - target) > TOLERANCE * target:
        raise ConfigError(
            f"budget={budget}: {named} has {sizes[rank]:,} parameters at rank {rank}, its nearest to {target:,}; leave"
            " it out with methods=, or give the reference a higher rank"
        )
    return _with_rank(config, rank)


def _with_rank(config: RunConfig, rank: int) -> RunConfig:
    """Ranks of experts and of plain LoRA beside them in the same ratio, alpha over rank as before."""
    experts = config.experts
    assert isinstance(experts.rank, int)
    alpha = experts.alpha if experts.scale == "constant" else experts.alpha * rank / experts.rank
    change: dict[str, object] = {"rank": rank, "alpha": alpha}
    if experts.plain is not None:
        own = max(round(experts.plain.rank * rank / experts.rank), 1)
        plain = {"rank": own, "alpha": experts.plain.alpha * own / experts.plain.rank}
        change["plain"] = experts.plain.model_copy(update=plain)
    return config.model_copy(update={"experts": experts.model_copy(update=change)})


def _ranks_of(config: RunConfig, fitted: RunConfig) -> RunConfig:
    return config.model_copy(update={"experts": fitted.experts})
