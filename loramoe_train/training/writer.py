"""One piece of writing at a time, in a thread of its own, so that training goes on while a disk takes its time.

No torch and no processes in here: what is written was copied before (`snapshot.py`), and ranks agree elsewhere
(`run_state.py`), because collective operations belong to the main thread.
"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor


class Writer:
    """`start`, then `wait`; an error of the work comes out of `wait`, in the thread that calls it."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")  # begins with the first work
        self._working: Future[None] | None = None

    def start(self, work: Callable[[], None]) -> None:
        """Begin; whoever starts has waited for the work before, or its error would go unheard."""
        assert self._working is None, "a write is still in flight"
        self._working = self._thread.submit(work)

    def wait(self) -> None:
        """Return once the work has ended; at once if there is none. Raises what the work raised."""
        if self._working is not None:
            # forgotten only once it has ended: a Ctrl-C while waiting must not make it look as if there were none
            self._working.exception()
            working, self._working = self._working, None
            working.result()

    def close(self) -> BaseException | None:
        """End the thread after the work in flight, if any; returns the error that nobody waited for."""
        self._thread.shutdown(wait=True)
        working, self._working = self._working, None
        return None if working is None else working.exception()
