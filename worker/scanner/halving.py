"""Smaller batches where memory has run out.

What a scan computes together is bounded by constants that suit a device with room. Where one has less, the
same scan runs again with a half of them, and a half of that. Digits then differ as they do between any two
batch sizes: in the last but one.
"""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

__all__ = ("Halving", "halved", "has_lost_device", "portion", "ran_out")

_NO_MEMORY = (
    "DefaultCPUAllocator: can't allocate",
    "CUDA error: out of memory",
    # What a library of the accelerator's says that finds no room for its own workspace.
    "CUBLAS_STATUS_NOT_INITIALIZED",
    "CUBLAS_STATUS_ALLOC_FAILED",
    # Of a file that it maps.
    "Cannot allocate memory",
)


class Halving:
    """How much smaller the batches are while it is in force."""

    def __init__(self, times: int) -> None:
        self.times = times
        self.has_batches = False
        """Whether anything asked: what computes all at once has nothing to make smaller."""


_in_force: ContextVar[Halving | None] = ContextVar("halving", default=None)


def portion(n_bytes: int) -> int:
    """Of what may be computed together, what is now."""
    halving = _in_force.get()
    if halving is None:
        return n_bytes
    halving.has_batches = True
    return max(1, n_bytes >> halving.times)


def ran_out(error: BaseException) -> bool:
    """Whether an error says that there was not enough memory."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    # On the CPU torch says it in words only, and of an accelerator's own libraries.
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _NO_MEMORY)


def has_lost_device(error: BaseException) -> bool:
    """Whether an error says that the device will compute nothing more for this process.

    Whatever an accelerator refuses that is not memory stays refused: the context is lost, and what is asked of
    it later, by whomever, fails likewise.
    """
    return isinstance(error, torch.AcceleratorError) and not ran_out(error)


@contextmanager
def halved(times: int) -> Iterator[Halving]:
    """Run what is inside in batches halved so many times."""
    halving = Halving(times)
    token = _in_force.set(halving)
    try:
        yield halving
    finally:
        _in_force.reset(token)
