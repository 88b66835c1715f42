"""The service as its operator sees it: workers, what they hold, and what waits."""

import msgspec

from neural_mri.contract.jobs import Lane
from neural_mri.contract.models import ModelState

__all__ = ("Cluster", "ModelHeld", "QueueLoad", "Versions", "WorkerSeen")


class ModelHeld(msgspec.Struct, frozen=True, kw_only=True):
    """A model in a worker's memory, or on its way there or out."""

    name: str
    revision: str
    state: ModelState
    memory_bytes: int | None = None
    load_seconds: float | None = None
    """What loading took, calibration included."""
    pinned: bool = False
    """Whether it stays, whatever else is asked for."""
    held_seconds: float | None = None
    """Since it was loaded."""


class WorkerSeen(msgspec.Struct, frozen=True, kw_only=True):
    """A worker heard of within the last seconds."""

    worker: str
    device: str
    version: str
    models: tuple[ModelHeld, ...] = ()
    budget_bytes: int | None = None
    """What its models may take in all."""
    free_bytes: int | None = None
    """What it could load now without letting anything go."""
    seen_at: float
    """By the worker's clock, seconds since 1970."""


class QueueLoad(msgspec.Struct, frozen=True, kw_only=True):
    """What waits for one model in one lane. Jobs that follow an equal one wait for no worker."""

    queue: str
    model: str
    lane: Lane
    waiting: int
    oldest_seconds: float
    """How long the first of them has waited; 0 where none waits."""
    running: int
    """Jobs that workers hold."""


class Versions(msgspec.Struct, frozen=True, kw_only=True):
    """What answers, and what it stands on."""

    service: str
    python: str
    database: str
    redis: str | None
    """None while Redis is away."""


class Cluster(msgspec.Struct, frozen=True, kw_only=True):
    """The whole service now."""

    versions: Versions
    workers: tuple[WorkerSeen, ...] | None
    """None while Redis, which carries their heartbeats, is away."""
    queues: tuple[QueueLoad, ...]
