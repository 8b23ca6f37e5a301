"""Where people read: one way to make a rich console, and quiet libraries."""

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

PLAIN_WIDTH = 120  # columns where nobody says how wide the screen is (a log file, a pipe)


def screen(*, stderr: bool = False) -> "Console":
    """A console on stdout (results) or stderr (progress); wide enough for our tables when it is not a terminal."""
    from rich.console import Console

    console = Console(stderr=stderr, highlight=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = PLAIN_WIDTH
    return console


def quiet_libraries() -> None:
    """No bars and advice from libraries between our lines; their errors still come through as exceptions."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
