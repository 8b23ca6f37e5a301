"""A table as text, Markdown, LaTeX and CSV: our number, the paper's, the difference, and every cell's status."""

import csv
import io
from collections.abc import Sequence

from loramoe_train.reproduce.outcome import MEASURED, NOT_RUN, Cell, Outcome
from loramoe_train.reproduce.schema import Number

CSV = (
    "base", "method", "column", "scale", "status", "why", "mean", "deviation", "seeds", "low", "high", "paper",
    "paper low", "paper high", "mark", "source", "difference", "within noise", "paper's rule", "our rule", "odd",
    "runs",
)  # fmt: skip
SPECIAL = {"\\": r"\textbackslash{}", "±": r"$\pm$", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
SPECIAL.update({character: f"\\{character}" for character in "&%$#_{}"})


def number_text(number: Number | None) -> str:
    """As the paper prints it."""
    if number is None:
        return ""
    interval = "" if number.low is None else f"{number.low:g}-{number.high:g}"
    if number.value is None:
        return interval
    return f"{number.value:g}" + (f" ({interval})" if interval else "")


def cell_text(cell: Cell) -> str:
    """`43.0 ± 1.2 (paper 45.1: -2.1)`; a star where scores were made otherwise."""
    printed = number_text(cell.paper)
    if cell.status == NOT_RUN:
        return f"not run (paper {printed})" if printed else "not run"
    text = f"{cell.mean:.1f}"
    text += "" if cell.deviation is None else f" ± {cell.deviation:.1f}"
    text += "*" if cell.odd else ""
    if not printed:
        return text
    if cell.difference is None:
        return f"{text} (paper {printed})"
    noise = ", within noise" if cell.within_noise else ""
    return f"{text} (paper {printed}: {cell.difference:+.1f}{noise})"


def grid(outcome: Outcome, base: str) -> tuple[list[str], list[list[str]]]:
    """Headings and rows of one base."""
    table = outcome.table
    head = ["method", *(table.columns[name].title for name in outcome.columns)]
    rows = [[table.methods[m].title, *map(cell_text, cells)] for m, cells in outcome.cells[base].items()]
    return head, rows


def statuses(outcome: Outcome, base: str) -> list[str]:
    """A line for each row and each kind of cell in it: status, why, and the runs."""
    lines = []
    for method, cells in outcome.cells[base].items():
        kinds: dict[tuple[str, str, tuple[str, ...], tuple[int, ...]], list[Cell]] = {}
        for cell in cells:
            runs = tuple(run.id for run in cell.runs)
            kinds.setdefault((cell.status, cell.why, runs, tuple(cell.scores)), []).append(cell)
        for (status, why, runs, seeds), members in kinds.items():
            whole = len(members) == len(cells)
            where = "" if whole else f" [{', '.join(outcome.table.columns[c.column].title for c in members)}]"
            told = f": {why}" if why else ""
            count = f"; {len(seeds)} seed{'s' * (len(seeds) > 1)}, runs {', '.join(runs)}" if runs else ""
            measured = f"{MEASURED}, " if runs and status != MEASURED else ""
            lines.append(f"{outcome.table.methods[method].title}{where}: {measured}{status}{told}{count}")
    return lines


def rules(outcome: Outcome) -> list[str]:
    """How each column is scored, by the paper and by us."""
    found = []
    for name, column in outcome.table.columns.items():
        place = outcome.settings.columns.get(name)
        ours = f"; here {place.told}" if place else ""
        found.append(f"{column.title}: paper {column.rule}{ours}")
    return found


def sections(outcome: Outcome) -> list[tuple[str, list[str]]]:
    """What stands below the grids: (heading, lines)."""
    found = [(f"Status of every cell on {_title(outcome, base)}", statuses(outcome, base)) for base in outcome.cells]
    found.append(("Scoring", rules(outcome)))
    marks = dict.fromkeys(f"{c.source} [{c.mark}]" for c in outcome.all() if c.paper is not None)
    found.append(("The paper's numbers", list(marks) or ["none is known"]))
    if outcome.notes:
        found.append(("Notes", list(outcome.notes)))
    return found


def _title(outcome: Outcome, base: str) -> str:
    own = outcome.settings.bases[base]
    beside = f", beside the paper's {own.beside}" if own.beside else ""
    return f"{own.title}{beside}"


def heading(outcome: Outcome) -> str:
    return f"{outcome.table.paper}, {outcome.table.table}: scale={outcome.scale}, per cent, mean ± deviation over seeds"


def as_text(outcome: Outcome, extra: Sequence[tuple[str, list[str]]] = ()) -> None:
    """Print on stdout; in full width where it goes to a file, folded on a narrow terminal, but never cut."""
    from rich.table import Table

    from loramoe_train.screen import screen

    console = screen()
    console.print(heading(outcome), markup=False)
    for base in outcome.cells:
        head, rows = grid(outcome, base)
        table = Table(title=_title(outcome, base), title_justify="left")
        for number, name in enumerate(head):
            table.add_column(name, justify="right" if number else "left", overflow="fold")
        for row in rows:
            table.add_row(*(cell.replace("[", r"\[") for cell in row))
        if not console.is_terminal:
            wide = console.measure(table, options=console.options.update(max_width=9999)).maximum
            console.width = max(console.width, wide)
        console.print(table)
    for title, lines in [*sections(outcome), *extra]:
        console.print(f"\n{title}", markup=False)
        for line in lines:
            console.print(f"  {line}", markup=False, soft_wrap=True)


def as_markdown(outcome: Outcome, extra: Sequence[tuple[str, list[str]]] = ()) -> str:
    def line(cells: Sequence[str]) -> str:
        return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"

    parts = [f"**{heading(outcome)}**"]
    for base in outcome.cells:
        head, rows = grid(outcome, base)
        parts += ["", f"{_title(outcome, base)}:", "", line(head), line(["---"] * len(head)), *map(line, rows)]
    for title, lines in [*sections(outcome), *extra]:
        parts += ["", f"{title}:", "", *(f"- {text}" for text in lines)]
    return "\n".join(parts)


def as_latex(outcome: Outcome, extra: Sequence[tuple[str, list[str]]] = ()) -> str:
    """A tabular for each base; what stands below the table on the screen as comments."""

    def escaped(text: str) -> str:
        return "".join(SPECIAL.get(character, character) for character in text)

    parts = [f"% {heading(outcome)}"]
    for base in outcome.cells:
        head, rows = grid(outcome, base)
        parts += [f"% {_title(outcome, base)}", rf"\begin{{tabular}}{{l{'r' * (len(head) - 1)}}}", r"\hline"]
        parts += [f"{' & '.join(map(escaped, head))} \\\\", r"\hline"]
        parts += [f"{' & '.join(map(escaped, row))} \\\\" for row in rows]
        parts += [r"\hline", r"\end{tabular}"]
    for title, lines in [*sections(outcome), *extra]:
        parts += [f"% {title}", *(f"%   {' '.join(text.splitlines())}" for text in lines)]
    return "\n".join(parts)


def as_csv(outcome: Outcome) -> str:
    """Every cell and every number unrounded; an empty field is a number that is not there."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(CSV)
    for cell in outcome.all():
        column, printed = outcome.table.columns[cell.column], cell.paper or Number.model_construct()
        low, high = cell.interval or (None, None)
        place = outcome.settings.columns.get(cell.column)
        ours = place.told if place else ""
        ids = " ".join(run.id for run in cell.runs)
        seeds = " ".join(map(str, cell.scores))
        numbers = (printed.value, printed.low, printed.high)
        writer.writerow(
            [cell.base, cell.method, cell.column, outcome.scale, cell.status, cell.why, cell.mean, cell.deviation]
            + [seeds, low, high, *numbers, cell.mark, cell.source, cell.difference, cell.within_noise]
            + [column.rule, ours, cell.odd, ids]
        )
    return out.getvalue().rstrip("\n")
