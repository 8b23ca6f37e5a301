"""Signals that ask a run to stop: noted when they come, obeyed at the next step boundary. No torch in here.

SIGTERM and SIGUSR1/2 (time limit, preemption) and Ctrl-C all mean "finish the step, save, leave". A second Ctrl-C stops
at once. submitit installs a SIGUSR2 handler of its own that requeues the job and exits without asking anybody to save,
so ours takes its place while training and calls it after the checkpoint is safe.
"""

import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any, NoReturn

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)


class Terminated(BaseException):
    """A signal to stop came outside the training loop. No Exception, for the same reason as KeyboardInterrupt."""


def end_on_signals() -> None:
    """From here on the signals that would kill this process raise Terminated; who listens already goes on listening.

    Ctrl-C raises KeyboardInterrupt anyway.
    """
    for number in STOP_SIGNALS:
        if signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, _terminate)


def ignore_signals() -> None:
    """For a process that is leaving: a launcher that sees one rank leave ends the others with SIGTERM, which must
    change no exit code. Ctrl-C still ends it."""
    for number in STOP_SIGNALS:
        if number != signal.SIGINT:
            signal.signal(number, signal.SIG_IGN)


def _terminate(number: int, frame: FrameType | None) -> NoReturn:
    ignore_signals()
    raise Terminated(signal.Signals(number).name)


class StopSignals:
    """Context manager; `received` is the first signal that came, or None."""

    def __init__(self, on_interrupt: Callable[[], None] = lambda: None) -> None:
        self.received: signal.Signals | None = None
        self._on_interrupt = on_interrupt  # tells the user, once, that Ctrl-C was heard
        self._interrupted = False
        self._heard: set[int] = set()
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():  # Python allows handlers nowhere else
            for number in STOP_SIGNALS:
                self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            if self._interrupted:
                raise KeyboardInterrupt
            self._interrupted = True
            self._on_interrupt()
        self.received = self.received or signal.Signals(number)
        self._heard.add(number)

    def chain(self) -> None:
        """Hand SIGUSR1 and 2 on to whoever listened before us. Call it once the checkpoint is on the disk.

        Another signal may have come first: a scheduler that preempts sends SIGTERM too.
        """
        for number in (signal.SIGUSR1, signal.SIGUSR2):
            handler = self._previous.get(number)
            if number in self._heard and callable(handler) and handler is not _terminate:
                handler(int(number), None)
