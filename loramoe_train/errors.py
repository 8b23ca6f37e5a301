"""The errors that a user can cause or meet, each with the exit code that scripts rely on.

Whatever is wrong with a config, a file or the machine is raised as one of these with a one-line message: the key or the
file, the value, what would be right, the nearest known name. `cli.py` prints that line and exits with the code; a
traceback therefore always means a defect of ours.

| code | meaning |
|---|---|
| 0 | done |
| 2 | bad config or bad data |
| 3 | a file is missing, or would have to be fetched while offline |
| 4 | training diverged |
| 5 | out of memory |
| 6 | runs of a sweep failed |
| 75 | stopped on a signal with a checkpoint saved; run the same command again |
| 130 | interrupted from the keyboard |
"""

from collections.abc import Iterable
from difflib import get_close_matches


class LoramoeError(Exception):
    """Base class: something the user can put right. The message is one line, and safe to print."""

    exit_code = 2

    def __init__(self, message: str = "") -> None:
        super().__init__(printable(message))


MAX_MESSAGE = 1500  # characters: a message may quote what a file holds


def printable(text: str) -> str:
    """One line of at most MAX_MESSAGE characters, begin and end kept.

    What a file brought along must neither break the line nor reach a terminal as a command: line breaks become spaces;
    other control characters, and those that turn the direction of writing, are spelled out.
    """
    if not text.isprintable():
        line = " ".join(text.split("\n"))
        text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)
    if len(text) > MAX_MESSAGE:
        text = f"{text[: MAX_MESSAGE // 2]} ... {text[-MAX_MESSAGE // 2 + 5 :]}"
    return text


def shown(value: object, limit: int = 60) -> str:
    """A value inside a message: printable, cut to `limit` characters."""
    text = printable(str(value))
    return text if len(text) <= limit else text[: limit - 3] + "..."


class ConfigError(LoramoeError):
    """A key, value or combination of the configuration is wrong."""


class DataError(LoramoeError):
    """A data file is malformed, or its examples cannot be trained on."""


class MissingFileError(LoramoeError):
    """A file is absent, or would have to be fetched while offline."""

    exit_code = 3


class DivergedError(LoramoeError):
    """The loss or a gradient became non-finite."""

    exit_code = 4


class OutOfMemoryError(LoramoeError):
    """The device ran out of memory."""

    exit_code = 5


class SweepFailed(LoramoeError):
    """Runs of a sweep failed; the others have their results."""

    exit_code = 6


class SavedOnSignal(LoramoeError):
    """A signal asked the run to stop; a checkpoint was saved and the same command continues it."""

    exit_code = 75


class Interrupted(LoramoeError):
    """Ctrl-C; a checkpoint was saved first."""

    exit_code = 130


def nearest(name: str, known: Iterable[str]) -> str:
    """`"; did you mean 'x'?"` for a near miss, else the list of what is known (at most 20 names)."""
    names = sorted({str(entry) for entry in known})
    match = get_close_matches(str(name), names, n=1, cutoff=0.6)
    if match:
        return f"; did you mean '{match[0]}'?"
    if not names:
        return ""
    shown = ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
    return f"; known: {shown}"
