"""What a file of recipes/paper holds: a paper's table as data, and the runs that stand for its rows."""

from typing import Literal

from pydantic import Field, model_validator

from loramoe_train.schema.base import Strict

SCALES = ("tiny", "small", "paper")
Mark = Literal["seen", "recalled", "inferred"]  # read in the paper or a copy of it; from memory; by arithmetic


class Method(Strict):
    """A row. `recipe` with its overrides makes the runs; a row without one says why it has none."""

    title: str
    recipe: str | None = None
    overrides: list[str] = Field(default_factory=list)
    base: bool = False  # the untuned base model: every run scores it
    absent: str | None = None  # why there is nothing to run
    at: dict[str, list[str]] = Field(default_factory=dict)  # scale -> further overrides

    @model_validator(mode="after")
    def _one_of_three(self) -> "Method":
        if sum((self.recipe is not None, self.base, self.absent is not None)) != 1:
            raise ValueError("give exactly one of recipe, base: true and absent")
        return self


class Column(Strict):
    """A column of the paper, or the mean over others."""

    title: str
    rule: str  # how the paper scores it
    not_comparable: str | None = None  # why our number and the paper's cannot be set against each other
    absent: str | None = None  # why nothing measures it here, or nothing can be trained for it
    mean_of: list[str] = Field(default_factory=list)


class Base(Strict):
    title: str
    overrides: list[str]
    beside: str | None = None  # the paper's base whose numbers stand beside; null: the one of this name
    without: dict[str, str] = Field(default_factory=dict)  # method -> why it is not run on this base


class Load(Strict):
    """What the routers decide for the held-out examples of a run, as at inference: one expert's share of the weight, in
    per cent, the mean over sites and layers.
    """

    take: Literal["largest", "smallest"]  # of the experts' shares
    task: str | None = None  # of the data set; null: the mean over its tasks, each counting alike

    @property
    def title(self) -> str:
        return f"{self.take} expert's share of {self.task or 'all tasks'}"


class Place(Strict):
    """Where a column's number comes from: a benchmark, or the routers' load, of the runs trained on a data set."""

    benchmark: str | None = None
    load: Load | None = None
    train: str = "all"
    ours: str = ""  # how it is scored here

    @model_validator(mode="after")
    def _one_of_two(self) -> "Place":
        if (self.benchmark is None) == (self.load is None):
            raise ValueError("give exactly one of benchmark and load")
        return self

    @property
    def name(self) -> str:
        """What is measured; places of the same name measure the same."""
        return self.load.title if self.load is not None else str(self.benchmark)

    @property
    def told(self) -> str:
        return ", ".join(filter(None, (self.name, self.ours)))


class Scale(Strict):
    bases: dict[str, Base]
    train: dict[str, list[str]]  # data set -> overrides
    columns: dict[str, Place]
    overrides: list[str] = Field(default_factory=list)
    seeds: list[int] = Field(min_length=1)
    not_comparable: str | None = None  # why no number of this scale can be set against the paper's


class Number(Strict):
    """What the paper prints, in the paper's unit. `low`, `high`: its interval."""

    value: float | None = None
    low: float | None = None
    high: float | None = None

    @model_validator(mode="after")
    def _not_empty(self) -> "Number":
        if self.value is None and None in (self.low, self.high):
            raise ValueError("give value, or low and high")
        return self


class Numbers(Strict):
    """One block of the paper's table."""

    base: str
    mark: Mark
    source: str
    rows: dict[str, dict[str, float | Number]]  # method -> column -> number


class Figure(Strict):
    """A parameter count that the paper gives for a method at its own scale."""

    method: str
    base: str
    mark: Mark
    source: str
    count: int | None = Field(default=None, gt=0)
    millions: float | None = Field(default=None, gt=0)
    per_cent: float | None = Field(default=None, gt=0)
    of: Literal["base", "sum"] = "base"  # what the per cent are of: the base, or the base and what is added
    beside: str | None = None  # or another method's count
    digits: int = Field(default=2, ge=0)  # after the point, as printed
    part: Literal["trained", "routers", "base"] = "trained"
    note: str = ""  # what is known where the two differ

    @model_validator(mode="after")
    def _one_figure(self) -> "Figure":
        if sum(value is not None for value in (self.count, self.millions, self.per_cent)) != 1:
            raise ValueError("give exactly one of count, millions and per_cent")
        return self


class PaperTable(Strict):
    paper: str
    table: str
    about: str = ""
    reference: str | None = None  # the method that others are compared with, and whose budget they get
    methods: dict[str, Method]
    columns: dict[str, Column]
    scales: dict[Literal["tiny", "small", "paper"], Scale]
    numbers: list[Numbers] = Field(default_factory=list)
    parameters: list[Figure] = Field(default_factory=list)

    @model_validator(mode="after")
    def _names_fit(self) -> "PaperTable":
        def check(what: str, names: object, known: object) -> None:
            for name in names:  # type: ignore[attr-defined]
                if name not in known:  # type: ignore[operator]
                    raise ValueError(f"{what} names '{name}', which the table does not have")

        for name, scale in self.scales.items():
            check(f"scales.{name}.columns", scale.columns, self.columns)
            check(f"scales.{name}.columns", (place.train for place in scale.columns.values()), scale.train)
            for base in scale.bases.values():
                check(f"scales.{name}.bases", base.without, self.methods)
        for column in self.columns.values():
            check("mean_of", column.mean_of, self.columns)
        for block in self.numbers:
            check("numbers", block.rows, self.methods)
            for row in block.rows.values():
                check("numbers", row, self.columns)
        counted = [name for f in self.parameters for name in (f.method, f.beside) if name is not None]
        check("parameters", counted, {name for name, method in self.methods.items() if method.recipe})
        check("methods.at", (name for method in self.methods.values() for name in method.at), self.scales)
        if self.reference is not None:
            check("reference", [self.reference], {name for name, m in self.methods.items() if m.recipe})
        if self.parameters and "paper" not in self.scales:
            raise ValueError("parameters are counted at the scale paper, which the table does not have")
        if "paper" in self.scales:
            check("parameters", (figure.base for figure in self.parameters), self.scales["paper"].bases)
        return self

    def overrides(self, scale: str, base: str, method: str, train: str) -> tuple[str, ...]:
        """What the table gives `loramoe-train` for one run, the recipe first; its seed apart."""
        row, settings = self.methods[method], self.scales[scale]  # type: ignore[index]
        shared = (*settings.bases[base].overrides, *settings.overrides, *settings.train[train])
        own = (*row.overrides, *row.at.get(scale, ()))  # type: ignore[call-overload]
        return (f"recipe={row.recipe}", *shared, *own)

    def number(self, base: str, method: str, column: str) -> tuple[Number, Numbers] | None:
        """What the paper prints in a cell, and the block it stands in."""
        for block in self.numbers:
            found = block.rows.get(method, {}).get(column) if block.base == base else None
            if found is not None:
                return (found if isinstance(found, Number) else Number(value=found)), block
        return None
