"""A model in a worker's memory, and what it was registered as."""

from typing import NamedTuple

from neural_mri.backing.models import RegisteredModel
from worker.scanner.loading import LoadedModel

__all__ = ("Resident",)


class Resident(NamedTuple):
    """A model in memory."""

    registered: RegisteredModel
    model: LoadedModel
    memory_bytes: int
    load_seconds: float = 0.0
    """What loading took, calibration included."""
    loaded_at: float = 0.0
    """On the monotonic clock."""
    main_bytes: int = 0
    """Of `memory_bytes`, those on the device where scans are."""
