"""`loramoe-reproduce NAME [KEY=VALUE ...]`."""

import math
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from loramoe_train.errors import ConfigError, nearest, shown
from loramoe_train.reproduce import tables
from loramoe_train.reproduce.schema import SCALES, PaperTable
from loramoe_train.schema.run import SEEDS

if TYPE_CHECKING:
    from loramoe_train.reproduce.folder import Found
    from loramoe_train.reproduce.runs import Wanted

HELP = """loramoe-reproduce
    the tables
loramoe-reproduce NAME [scale=tiny|small|paper] [KEY=VALUE ...]
    run what a table asks for, as a sweep, and set our numbers beside the paper's; the same command goes on with what
    is missing or has failed
    seeds=0,1,2              other seeds than the table's
    methods=A,B bases=A,B    some of the rows
    format=text|markdown|latex|csv
    budget=none|equal|active ranks that give every method the parameters of the table's reference: of all that is added
                             to the base, or of what a token goes through
    reference=METHOD         another method to compare with, and to take the budget from
    sweep=none|lr            five learning rates for every method; the best by validation loss is reported
    parameters=true          the paper's parameter counts, checked on models without weights; scale=paper does it anyway
    parameters=all           ours for every row, too, where the paper gives none
    plot=FILE.png            the table as a picture (.pdf, .svg)
    plan=true, or --plan     what it would cost; starts nothing. tokens_per_second=N: hours, too
    run=false                the table of what is there; starts nothing
    wait=true|false          for the runs' end; local runs are waited for, those on SLURM are not
    mixed=refuse|mark        scores that were made otherwise than others
    run_dir=FOLDER           of the runs; reproduce/NAME/SCALE, with the names of budget and sweep
    every other KEY=VALUE is given to every run: launcher=slurm, data.root=FOLDER, trainer.max_steps=60"""
BOOLS = ("true", "false")
KNOWN: dict[str, Sequence[str] | None] = {
    "scale": SCALES,
    "seeds": None,
    "methods": None,
    "bases": None,
    "budget": ("none", "equal", "active"),
    "reference": None,
    "sweep": ("none", "lr"),
    "parameters": (*BOOLS, "all"),
    "plot": None,
    "format": ("text", "markdown", "latex", "csv"),
    "plan": BOOLS,
    "tokens_per_second": None,
    "run": BOOLS,
    "wait": BOOLS,
    "mixed": ("refuse", "mark"),
    "run_dir": None,
}


@dataclass(frozen=True)
class Options:
    name: str
    scale: str
    values: Mapping[str, str]
    typed: tuple[str, ...]  # for the runs

    def get(self, key: str, default: str = "") -> str:
        return self.values.get(key, default)

    def names(self, key: str) -> list[str] | None:
        return [part for part in self.values[key].strip("[]").split(",") if part] if key in self.values else None

    @property
    def seeds(self) -> list[int] | None:
        try:
            seeds = [int(part) for part in self.names("seeds") or ()]
        except ValueError:
            seeds = [-1]
        if any(not 0 <= seed < SEEDS for seed in seeds) or len(set(seeds)) < len(seeds):
            raise ConfigError(f"seeds={self.values['seeds']} must be different whole numbers, such as seeds=0,1,2")
        return seeds or None

    @property
    def speed(self) -> float | None:
        """Tokens a second, to tell hours."""
        if "tokens_per_second" not in self.values:
            return None
        try:
            speed = float(self.values["tokens_per_second"])
        except ValueError:
            speed = 0.0
        if not 0 < speed < math.inf:
            raise ConfigError(f"tokens_per_second={self.values['tokens_per_second']} must be a positive number")
        return speed

    @property
    def root(self) -> Path:
        ways = [self.scale]
        if self.get("budget", "none") != "none":
            ways += [self.get("budget"), *filter(None, [self.get("reference")])]
        if self.get("sweep", "none") != "none":
            ways.append(self.get("sweep"))
        return Path(self.get("run_dir") or f"reproduce/{self.name}/{'-'.join(ways)}")


def parsed(arguments: Sequence[str]) -> Options:
    """Raises ConfigError for a name that is no table, or a value that an option does not take."""
    name, *rest = map(_without_dashes, arguments)
    if "=" in name:
        raise ConfigError(f"loramoe-reproduce wants the name of a table first, got '{arguments[0]}'")
    values: dict[str, str] = {}
    typed: list[str] = []
    for text in rest:
        key, equals, value = text.partition("=")
        if not equals:
            raise ConfigError(f"'{text}' is no KEY=VALUE{nearest(text, KNOWN) if text else ''}")
        if key in ("seed", "recipe", "+recipe"):
            raise ConfigError(
                f"{text}: the table says which; {'give seeds=0,1,2' if key == 'seed' else 'give methods=A,B'}"
            )
        if re.split("[./@]", key.lstrip("+~"))[0] == "hydra":
            raise ConfigError(f"{text}: keys of hydra do nothing here; launcher.KEY=VALUE says how runs are started")
        if key not in KNOWN:
            typed.append(text)
            continue
        allowed = KNOWN[key]
        if allowed is not None and value not in allowed:
            raise ConfigError(f"{text}: there is no such {key}{nearest(value, allowed)}")
        if not value.strip("[] ,"):
            raise ConfigError(f"{text}: {key} has no value; give one, or leave it out")
        if values.setdefault(key, value) != value:
            raise ConfigError(f"{key} is given twice, as {values[key]} and as {value}; give one")
    return Options(name, values.get("scale", "tiny"), values, tuple(typed))


def _without_dashes(text: str) -> str:
    """`--plan` is another way of writing plan=true. Raises ConfigError for any other option."""
    if text == "--plan":
        return "plan=true"
    if text.startswith("-"):
        key, equals, value = text.lstrip("-").partition("=")
        cure = f"write {key}={value if equals else 'VALUE'}" if key in KNOWN else "all else is KEY=VALUE, see --help"
        raise ConfigError(f"unknown option {shown(text)}; the only ones are --plan and --help: {cure}")
    return text


def run(arguments: Sequence[str]) -> None:
    """Do what the arguments say. Raises LoramoeError."""
    if arguments[:1] == ["help"] or {"-h", "--help"} & set(arguments):
        print(HELP)
        return
    if not arguments:
        for name in tables.names():
            table = tables.load(name)
            runs = [scale for scale, entry in table.scales.items() if entry.columns]
            print(f"{name:<24}{table.paper}, {table.table} ({', '.join(runs) or 'the numbers alone'})")
        return
    options = parsed(arguments)
    table = tables.load(options.name)
    if "scale" not in options.values and "tiny" not in table.scales:
        options = replace(options, scale="paper")  # the paper's numbers, of which nothing can be run
    reproduce(table, options)


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def reproduce(table: PaperTable, options: Options) -> None:
    """Plan, or run what is missing and show the table."""
    from loramoe_train.reproduce.folder import complete, find
    from loramoe_train.reproduce.plot import check_plot
    from loramoe_train.reproduce.runs import scale_of

    scale = scale_of(table, options.scale)
    if options.speed is not None and options.get("plan") != "true":
        raise ConfigError("tokens_per_second goes with plan=true, which tells the hours; add it, or leave the key out")
    if "plot" in options.values:
        check_plot(Path(options.values["plot"]))
    extra: list[tuple[str, list[str]]] = []
    problem = None
    if not scale.columns:
        say(f"nothing of {options.name} can be run at scale={options.scale}; its rows and columns say why")
    elif options.get("run") != "false" or options.get("plan") == "true":
        runs, notes = _runs(table, options)
        extra += [(f"Ranks, budget={options.get('budget')}", notes)] if notes else []
        if options.get("plan") == "true":
            _plan(runs, options)
            return _print_sections(extra + _figures(table, options))
        wait = {"true": True, "false": False}.get(options.get("wait"))
        problem = complete(options.root, runs, wait=wait, say=say, typed=options.typed)
    elif options.typed:
        raise ConfigError(f"run=false starts no run, so {options.typed[0]} means nothing; leave it out")
    found = find(options.root, say)
    if options.get("run") == "false" and options.get("budget", "none") != "none":
        from loramoe_train.reproduce.parameters import budgets_of

        lines = budgets_of(_beside(table, options), found, options.get("budget"))
        extra += [(f"Ranks, budget={options.get('budget')}", lines)] if lines else []
    _show(table, options, found, extra)
    if problem is not None:
        raise problem


def _runs(table: PaperTable, options: Options) -> tuple[list["Wanted"], list[str]]:
    from loramoe_train.reproduce.runs import wanted, with_learning_rates

    methods, bases = options.names("methods"), options.names("bases")
    given = {"typed": options.typed, "seeds": options.seeds, "root": str(options.root)}
    runs, notes = wanted(table, options.scale, methods=methods, bases=bases, **given), []  # type: ignore[arg-type]
    budget = options.get("budget", "none")
    if budget != "none":
        from loramoe_train.reproduce.parameters import equal_budgets

        runs, notes = equal_budgets(_beside(table, options), runs, budget)
    return (with_learning_rates(runs) if options.get("sweep") == "lr" else runs), notes


def _beside(table: PaperTable, options: Options) -> PaperTable:
    """The table with the reference that was asked for. Which runs score the base stays the shipped table's affair."""
    if "reference" not in options.values:
        return table
    able = [name for name, method in table.methods.items() if method.recipe is not None]
    if options.values["reference"] not in able:
        wrong = options.values["reference"]
        raise ConfigError(f"reference={wrong}: the table has no row of that name with runs{nearest(wrong, able)}")
    return table.model_copy(update={"reference": options.values["reference"]})


def _show(table: PaperTable, options: Options, found: list["Found"], extra: list[tuple[str, list[str]]]) -> None:
    from loramoe_train.reproduce import show
    from loramoe_train.reproduce.compare import compare
    from loramoe_train.reproduce.outcome import outcome

    rows = {"methods": options.names("methods"), "bases": options.names("bases")}
    table = _beside(table, options)
    result = outcome(table, options.scale, found, seeds=options.seeds, mark=options.get("mixed") == "mark", **rows)
    if options.get("format") == "csv":
        print(show.as_csv(result))
    else:
        for base in result.cells:
            lines = [row.line(result) for row in compare(result, base)]
            title = (
                f"Beside {table.methods[str(table.reference)].title if table.reference else ''} on {base}, in points"
            )
            extra += [(title, lines)] if lines else []
        extra += [*_figures(table, options), ("Runs are below", [str(options.root)])]
        chosen = options.get("format", "text")
        if chosen == "text":
            show.as_text(result, extra)
        else:
            print({"markdown": show.as_markdown, "latex": show.as_latex}[chosen](result, extra))
    if "plot" in options.values:
        from loramoe_train.reproduce.plot import plot

        plot(result, Path(options.values["plot"]))


def _figures(table: PaperTable, options: Options) -> list[tuple[str, list[str]]]:
    """The section of parameter counts, where it is wished for and the paper has any."""
    wished = options.get("parameters", "true" if options.scale == "paper" else "false")
    if wished == "false" or "paper" not in table.scales:
        return []
    from loramoe_train.reproduce.parameters import Counted

    counted = Counted(table)
    lines = [checked.line(table) for checked in counted.check_figures()]
    lines += counted.without_a_figure() if wished == "all" else []
    return [("Parameter counts", lines)] if lines else []


def _print_sections(sections: Sequence[tuple[str, list[str]]]) -> None:
    for title, lines in sections:
        print(f"\n{title}", *(f"  {line}" for line in lines), sep="\n")


def _plan(runs: Sequence["Wanted"], options: Options) -> None:
    from loramoe_train.sweeps.cost import print_cost
    from loramoe_train.sweeps.sweep import Composed

    composed = [Composed(run.overrides, run.config, {}, run.recipe, run.folder, "") for run in runs]
    print_cost(composed, tokens_per_second=options.speed)
