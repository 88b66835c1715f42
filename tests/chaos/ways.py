"""What else than its death may befall a process at a point of `neural_mri.backing.faults`.

Only a process that imports this module and adds them to `faults.WAYS` knows of them.
"""

import ctypes
import resource
import time
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import psutil

__all__ = ("WAYS",)

ROOM_BYTES = 32 << 20
PIECE_BYTES = 1 << 20
SLOW_SECONDS = 3.0
LOST = "CUDA error: device-side assert triggered"


def _read_nowhere() -> None:
    """A segmentation fault, as of a kernel that is wrong."""
    ctypes.string_at(0)


def _exhaust_memory() -> None:
    """Ask for all the memory that there is, and for more; what was had is given back with the error."""
    unlimited = resource.getrlimit(resource.RLIMIT_AS)
    mapped = psutil.Process().memory_info().vms
    resource.setrlimit(resource.RLIMIT_AS, (mapped + ROOM_BYTES, unlimited[1]))
    hoard = []
    try:
        while True:
            hoard.append(bytearray(PIECE_BYTES))
    finally:
        hoard.clear()
        resource.setrlimit(resource.RLIMIT_AS, unlimited)


def _lose_device() -> None:
    """What a GPU does after an assertion of a kernel's: it says so, and computes nothing more for this process."""
    import torch

    def refuse(*_: Any, **__: Any) -> None:
        raise torch.AcceleratorError(LOST)

    computing: Any = torch.nn.functional
    computing.embedding = refuse
    refuse()


def _dawdle() -> None:
    """Be slow, as a disk that is far away."""
    time.sleep(SLOW_SECONDS)


def _go_deaf() -> None:
    """Ask the broker for no ticket any more, and go on living."""
    from kombu.transport.redis import Channel

    channel: Any = Channel
    channel._brpop_start = lambda *_: None


WAYS: Mapping[str, Callable[[], None]] = MappingProxyType(
    {
        "segmentation fault": _read_nowhere,
        "exhausted memory": _exhaust_memory,
        "lost device": _lose_device,
        "slowness": _dawdle,
        "deafness": _go_deaf,
    }
)
