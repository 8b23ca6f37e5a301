"""A table as a picture: our mean with its deviation, and the paper's number, by column."""

from pathlib import Path

from loramoe_train.errors import ConfigError
from loramoe_train.files import write_bytes, write_errors
from loramoe_train.reproduce.outcome import MEASURED, Outcome

FORMATS = (".png", ".pdf", ".svg")


def check_plot(path: Path) -> None:
    """Raise ConfigError for a picture that cannot be made, before anything is run for it."""
    import importlib.util

    if path.suffix not in FORMATS:
        raise ConfigError(f"plot={path} must end in {', '.join(FORMATS)}")
    if not path.absolute().parent.is_dir():
        raise ConfigError(f"plot={path}: there is no folder {path.parent}")
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("plot needs matplotlib; install loramoe-train[plot]")


def plot(outcome: Outcome, path: Path) -> None:
    """Draw one row of axes a base, one axis a column: a bar with its deviation for ours, a line for the paper's, or two
    for an interval.
    """
    import io

    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows, columns = len(outcome.cells), len(outcome.columns)
    figure, axes = pyplot.subplots(rows, columns, figsize=(2.0 * columns + 1.5, 2.6 * rows), squeeze=False)
    for line, (base, methods) in zip(axes, outcome.cells.items(), strict=True):
        titles = [outcome.table.methods[method].title for method in methods]
        for number, (axis, name) in enumerate(zip(line, outcome.columns, strict=True)):
            for place, cells in enumerate(methods.values()):
                cell = cells[number]
                if cell.mean is not None:
                    axis.barh(place, cell.mean, xerr=cell.deviation, color="tab:blue", height=0.6)
                paper = cell.paper
                if paper is not None:
                    style = "solid" if cell.status == MEASURED else "dotted"
                    ends = [place - 0.4, place + 0.4]
                    for value in (paper.low, paper.high) if paper.value is None else (paper.value,):
                        axis.plot([value] * 2, ends, color="tab:orange", linewidth=2, linestyle=style)
            axis.set_title(outcome.table.columns[name].title, fontsize=9)
            axis.set_xlim(0, 100)
            axis.set_ylim(len(titles) - 0.5, -0.5)
            axis.set_yticks(range(len(titles)), titles if number == 0 else [], fontsize=8)
            axis.tick_params(labelsize=7, axis="x")
        line[0].set_ylabel(base, fontsize=8)
    title = f"{outcome.table.paper}, {outcome.table.table}, scale={outcome.scale}"
    figure.suptitle(f"{title}: bars ours; lines the paper's, dotted where not comparable", fontsize=9)
    figure.tight_layout()
    content = io.BytesIO()
    figure.savefig(content, format=path.suffix[1:], dpi=130)
    pyplot.close(figure)
    with write_errors(f"plot={path}", "give another place"):
        write_bytes(path, content.getvalue())
