"""Around every command: what a user can cause becomes one line on stderr and its exit code (errors.py).

A traceback therefore means a defect.
"""

import os
import select
import signal
import sys
from collections.abc import Callable

from loramoe_train.errors import Interrupted, LoramoeError, OutOfMemoryError, SavedOnSignal
from loramoe_train.training.signals import Terminated, end_on_signals, ignore_signals


def guard(job: Callable[[], None], cure: str = "the same command with resume=auto goes on") -> None:
    """Run `job`; one line and the right exit code for everything that a user can cause. `cure`: after a signal."""
    # Threads of torch that wait by spinning starve each other where cores are shared: two runs on two cores took 15
    # times as long. Read once, when torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    end_on_signals()  # the training loop has handlers of its own meanwhile; submitit's for SIGUSR2 stays
    try:
        job()
        sys.stdout.flush()
    except LoramoeError as error:
        fail(str(error), error.exit_code)
    except BrokenPipeError:
        if not _reader_left():
            raise
        sys.exit(128 + signal.SIGPIPE)
    except KeyboardInterrupt:
        fail("interrupted", Interrupted.exit_code)
    except Terminated as stop:
        fail(f"stopped by {stop}; {cure}", SavedOnSignal.exit_code)
    except MemoryError:
        fail("out of memory; lower trainer.micro_batch_size or data.max_length", OutOfMemoryError.exit_code)


def _reader_left() -> bool:
    """Whether nobody reads what we print any more, as behind `| head`; what is left of it then goes nowhere."""
    watch = select.poll()
    watch.register(sys.stdout.fileno(), 0)
    if not watch.poll(0):  # it is another pipe that broke
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return True


def fail(message: str, code: int) -> None:
    """Leave with the message as one line; signals that come meanwhile change nothing."""
    ignore_signals()
    print(f"loramoe: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(code)
