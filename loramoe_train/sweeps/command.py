"""`loramoe-sweep status | table | retry-failed`; `submit` is in cli.py, for Hydra composes its runs."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ValidationError

from loramoe_train.errors import ConfigError, DataError, nearest
from loramoe_train.rundir import RESULTS
from loramoe_train.schema.launcher import LauncherConfig
from loramoe_train.screen import screen
from loramoe_train.sweeps.status import FAILED, ask, look, statuses, summary
from loramoe_train.sweeps.sweep import Sweep, counted, read_sweep
from loramoe_train.trust import TYPED_ONLY, refuse_untyped

HELP = """loramoe-sweep submit [GROUP=OPTION ...] [KEY=A,B,C ...]
    start a sweep, as loramoe-train --multirun does, and return at once
loramoe-sweep status FOLDER
    what runs, what is done, what failed and why
loramoe-sweep table FOLDER [format=text|markdown|csv] [side=tuned|base|difference] [over=KEY] [mixed=refuse|mark]
    the runs' scores side by side; over=seed: mean and deviation of the runs that differ in the seed alone
loramoe-sweep retry-failed FOLDER [launcher.KEY=VALUE ...]
    start the runs that failed once more; each goes on from its newest checkpoint"""
FORMATS, MIXED = ("text", "markdown", "csv"), ("refuse", "mark")


def run(arguments: Sequence[str]) -> None:
    """Do what the arguments say. Raises LoramoeError."""
    commands = {"status": show_status, "table": show_table, "retry-failed": retry_failed}
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(HELP)
        return
    name, *rest = arguments
    if name not in commands:
        raise ConfigError(f"loramoe-sweep {name}: no such command{nearest(name, [*commands, 'submit'])}")
    if not rest or "=" in rest[0]:
        raise ConfigError(f"loramoe-sweep {name} wants the folder of a sweep first")
    commands[name](read_sweep(Path(rest[0])), rest[1:])


def show_status(sweep: Sweep, arguments: Sequence[str]) -> None:
    """One row a run, and the counts."""
    from rich.table import Table

    _options(arguments, {})
    found, varying = look(sweep, lambda line: print(line, file=sys.stderr)), sweep.varying()
    table = Table()
    for heading in ("run", *varying, "state", "step", "job"):
        table.add_column(heading, overflow="fold")
    table.add_column("why", overflow="fold")
    for each in found:
        values = sweep.values(each.run)
        job = each.run.jobs[-1].id if each.run.jobs else ""
        step = "" if each.step is None else str(each.step)
        cells = (str(each.run.number), *(values.get(key, "") for key in varying), each.state, step, job, each.why)
        table.add_row(*(cell.replace("[", r"\[") for cell in cells))
    _show(table)
    print(f"{counted(found)}: {summary(found)}")


def show_table(sweep: Sweep, arguments: Sequence[str]) -> None:
    """The runs' scores, on stdout."""
    from rich.table import Table as RichTable

    from loramoe_train.sweeps.table import SIDES, as_csv, as_markdown, make_table

    known = {"format": FORMATS, "side": SIDES, "over": None, "mixed": MIXED}
    options = _options(arguments, known)
    if options.get("format") == "csv" and {"side", "over"} & options.keys():
        raise ConfigError("format=csv has every run and every side by itself; leave side= and over= out")
    found = look(sweep, lambda line: print(line, file=sys.stderr))
    mark = options.get("mixed") == "mark"
    table = make_table(sweep, found, side=options.get("side", "tuned"), over=options.get("over"), mark=mark)
    if options.get("format") == "csv":
        print(as_csv(sweep, found))
        return
    if options.get("format") == "markdown":
        print(as_markdown(table))
        return
    shown = RichTable(title=f"{sweep.root}: {options.get('side', 'tuned')}, per cent", title_justify="left")
    for heading in table.columns:
        shown.add_column(heading, justify="right", overflow="fold")
    for row in table.rows:
        shown.add_row(*(cell.replace("[", r"\[") for cell in row))
    _show(shown)
    for note in table.notes:
        print(note)


def _show(table: Any) -> None:
    """Print a table; in full width where it goes to a file, folded on a narrow terminal, but never cut."""
    console = screen()
    if not console.is_terminal:
        console.width = max(
            console.width, console.measure(table, options=console.options.update(max_width=9999)).maximum
        )
    console.print(table)


def retry_failed(sweep: Sweep, arguments: Sequence[str]) -> None:
    """Start again what has no results and runs no more. `launcher.KEY=VALUE` may give it more time or another place."""
    from dataclasses import replace

    from loramoe_train.sweeps.start import again

    found = statuses(sweep, ask(sweep))  # who is not answered here does not start a run twice
    for each in found:
        if each.state == FAILED and (sweep.folder(each.run) / RESULTS).is_file():
            raise DataError(f"{each.why}: remove that file, and the same command makes it again")
    numbers = [each.run.number for each in found if each.state == FAILED]
    launcher = _with_typed(sweep.parameters, arguments)
    for number in numbers:  # the sweep's folder may come from somebody else
        values = sweep.config(sweep.runs[number]).plain()
        refuse_untyped({**values, "launcher": launcher.model_dump()}, arguments)
    if not numbers:
        print(f"{sweep.root}: nothing has failed ({summary(found)})")
        return
    for number in numbers:
        print(f"{sweep.label(sweep.runs[number])} starts again", file=sys.stderr)
    sweep = replace(sweep, parameters=launcher.model_dump())
    again(sweep, numbers, wait=False, say=lambda line: print(line, file=sys.stderr))


def _with_typed(stored: Mapping[str, Any], arguments: Sequence[str]) -> LauncherConfig:
    """The launcher's settings with those that were typed; other keys would make another run of it."""
    for text in arguments:
        key, equals, _ = text.lstrip("+").partition("=")
        if not equals or not (key.startswith("launcher.") or key in TYPED_ONLY):
            known = [f"launcher.{name}" for name in LauncherConfig.model_fields]
            raise ConfigError(f"retry-failed takes launcher.KEY=VALUE only, got '{text}'{nearest(key, known)}")
        if key == "launcher.name":
            raise ConfigError("launcher.name: a sweep stays where it was started; start a new one for another launcher")
    typed = [text.lstrip("+") for text in arguments if text.lstrip("+").startswith("launcher.")]
    try:
        values = OmegaConf.merge({"launcher": dict(stored)}, OmegaConf.from_dotlist(typed))
        return LauncherConfig(**OmegaConf.to_container(values)["launcher"])  # type: ignore[index,call-overload]
    except OmegaConfBaseException as error:
        raise ConfigError(f"launcher: {str(error).splitlines()[0]}") from error
    except ValidationError as error:
        first = error.errors()[0]
        names = ".".join(map(str, first["loc"]))
        hint = nearest(names, LauncherConfig.model_fields) if first["type"] == "extra_forbidden" else ""
        raise ConfigError(f"launcher.{names}: {first['msg']}{hint}") from error


def _options(arguments: Sequence[str], known: Mapping[str, Sequence[str] | None]) -> dict[str, str]:
    """KEY=VALUE arguments. Raises ConfigError for another key or value."""
    found = {}
    for text in arguments:
        key, equals, value = text.partition("=")
        if not equals or key not in known:
            raise ConfigError(f"unknown option '{text}'{nearest(key, known) if known else '; there are none'}")
        allowed = known[key]
        if allowed is not None and value not in allowed:
            raise ConfigError(f"{text}: {key} must be one of {', '.join(allowed)}")
        found[key] = value
    return found
