"""How much memory a worker has for models and scans, and how much of it is left.

On a GPU its device says so. On the CPU it is the least of what the machine has, what the control group
allows (a container's limit) and what the process may address. `NEURAL_MRI_MEMORY_BYTES` overrides all of
them: then models and scans together are held to that.
"""

import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import psutil
import torch

from neural_mri.backing.settings import Settings

__all__ = ("Memory", "Reading", "control_group", "room_of_each")

SCANS_SHARE = 0.2
"""Of the budget, kept for what scans need beside the models."""

LITTLE = 1 / 64
"""Of what is left: so much may be given away without looking again."""
MOMENT_SECONDS = 0.5

_GROUPS = Path("/sys/fs/cgroup")


class Reading(NamedTuple):
    """Bytes, at one moment."""

    total: int
    """All that this process could have."""
    available: int
    """What it could still ask for."""


class _Seen(NamedTuple):
    held: int
    """By models."""
    left: int
    until: float
    """How long it counts, on the monotonic clock."""


class Memory:
    """One worker's memory."""

    def __init__(self, settings: Settings, device: str) -> None:
        self._stated = settings.memory_bytes
        self._device = device
        self._spreads = settings.spread == "auto"
        self._seen = _Seen(0, 0, 0.0)
        self._scans = 0

    def has_amply(self, n_bytes: int, held_bytes: int) -> bool:
        """Whether so much is little of what scans had left a moment ago, beside the same models.

        `held_bytes` as for `for_scans`. To look again takes as long as recording a job.
        """
        now = time.monotonic()
        if held_bytes != self._seen.held or now > self._seen.until:
            left = self.for_scans(held_bytes).available
            self._seen = _Seen(held_bytes, left, now + MOMENT_SECONDS)
        return n_bytes <= LITTLE * self._seen.left

    def reading(self, held_bytes: int = 0) -> Reading:
        """What there is, and what is left while models take `held_bytes`."""
        if self._stated:
            return Reading(self._stated, max(0, self._stated - held_bytes))
        return self._gpus() if self._device == "cuda" else least(*_of_this_machine())

    def for_models(self, held_bytes: int = 0) -> Reading:
        """The part that models may have."""
        total, available = self.reading(held_bytes)
        budget = int(total * (1.0 - SCANS_SHARE))
        return Reading(budget, max(0, min(budget - held_bytes, available)))

    @property
    def is_of_several(self) -> bool:
        """Whether models may be spread over several GPUs, on the first of which scans are."""
        if self._stated or self._device != "cuda" or not self._spreads:
            return False
        return torch.cuda.device_count() > 1

    def for_scans(self, held_bytes: int = 0) -> Reading:
        """What there is for what scans make: of several GPUs the first, where activations are.

        Models take `held_bytes` of it.
        """
        return _gpu(0) if self.is_of_several else self.reading(held_bytes)

    @contextmanager
    def lent(self) -> Iterator[None]:
        """While the block runs a scan has a part of it, and what is missing need not be others'."""
        self._scans += 1
        try:
            yield
        finally:
            self._scans -= 1

    @property
    def is_resting(self) -> bool:
        """Whether no scan has a part of it. Asked by any thread."""
        return self._scans == 0

    def _gpus(self) -> Reading:
        count = torch.cuda.device_count() if self._spreads else 1
        readings = [_gpu(index) for index in range(count)]
        return Reading(sum(one.total for one in readings), sum(one.available for one in readings))


def _gpu(index: int) -> Reading:
    free, total = torch.cuda.mem_get_info(index)
    # What torch keeps for itself it gives to whoever asks next.
    kept = torch.cuda.memory_reserved(index) - torch.cuda.memory_allocated(index)
    return Reading(total, free + kept)


def room_of_each(settings: Settings, device: str) -> tuple[Reading, ...]:
    """What each GPU of several has for a model that one is too small for; empty where none is spread."""
    if device != "cuda" or settings.spread == "off" or torch.cuda.device_count() < 2:
        return ()
    readings = map(_gpu, range(torch.cuda.device_count()))
    return tuple(Reading(*(int(each * (1.0 - SCANS_SHARE)) for each in one)) for one in readings)


def least(*readings: Reading) -> Reading:
    """What holds under all limits at once."""
    return Reading(
        min(reading.total for reading in readings),
        max(0, min(reading.available for reading in readings)),
    )


def _of_this_machine() -> list[Reading]:
    memory = psutil.virtual_memory()
    found = [Reading(memory.total, memory.available)]
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY:
        found.append(Reading(limit, limit - psutil.Process().memory_info().vms))
    group = control_group()
    return found if group is None else [*found, group]


def control_group(
    root: Path = _GROUPS, process: Path = Path("/proc/self/cgroup")
) -> Reading | None:
    """What the control groups of this process allow; None where none sets a limit.

    Version 2, and what version 1 says at its root, which is where a container sees its own group.
    """
    readings = []
    for folder in _folders(root, process):
        for names in _NAMES:
            limit, used = _number(folder / names.limit), _number(folder / names.used)
            if limit is not None and used is not None and limit < _NO_LIMIT:
                # Pages of files go when they are in the way.
                used -= _statistic(folder / "memory.stat", names.files)
                readings.append(Reading(limit, limit - used))
    return least(*readings) if readings else None


class _Names(NamedTuple):
    limit: str
    used: str
    files: str


_NAMES = (
    _Names("memory.max", "memory.current", "inactive_file"),
    _Names("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)
_NO_LIMIT = 1 << 60
"""Version 1 writes a huge number where there is none."""


def _folders(root: Path, process: Path) -> list[Path]:
    """The group's folder and those above it: each may set a limit."""
    folders = [root, root / "memory"]
    try:
        lines = process.read_text().splitlines()
    except OSError:
        return folders
    for line in lines:
        _, _, name = line.partition("::")
        here = root / name.strip("/")
        while name and here != root and root in here.parents:
            folders.append(here)
            here = here.parent
    return folders


def _number(path: Path) -> int | None:
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdecimal() else None


def _statistic(path: Path, name: str) -> int:
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return 0
    pairs = (line.split() for line in lines)
    return next((int(pair[1]) for pair in pairs if len(pair) == 2 and pair[0] == name), 0)
