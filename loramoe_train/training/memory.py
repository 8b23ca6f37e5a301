"""Out of memory as an error that says what to lower, and how much memory is in use."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from loramoe_train.errors import OutOfMemoryError

# what torch's CPU allocator, cuBLAS and cuDNN say in a plain RuntimeError
_PHRASES = ("can't allocate memory", "not enough memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")


@contextmanager
def memory_errors(where: str) -> Iterator[None]:
    """Turn every kind of allocation failure into OutOfMemoryError; `where` says what was being done."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise _explained(where) from error
    except RuntimeError as error:
        if any(phrase in str(error) for phrase in _PHRASES):
            raise _explained(where) from error
        raise


def _explained(where: str) -> OutOfMemoryError:
    return OutOfMemoryError(
        f"out of memory in {where}: lower trainer.micro_batch_size (the result stays the same) or data.max_length, "
        f"or set model.gradient_checkpointing=true"
    )


def memory_gib(device: torch.device) -> float:
    """Peak memory in GiB: allocated on the device, or resident in this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return peak_resident() / 2**30


def peak_resident() -> int:
    """Bytes of the largest resident set that this process has had; 0 where the system does not tell."""
    # not `getrusage`: Linux hands its figure down, so a process that a larger one started shows that one's
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    try:
        import resource
    except ImportError:  # not on Windows
        return 0
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest if sys.platform == "darwin" else largest * 1024
