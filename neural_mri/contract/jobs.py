"""Jobs: what was asked, and how far it has come.

    queued -> claimed -> loading -> running -> storing -> succeeded

A job whose worker is lost goes back to `queued`; the attempt number is the fencing token.
"""

from collections.abc import Mapping
from datetime import datetime
from enum import StrEnum
from types import MappingProxyType
from typing import Any
from uuid import UUID

import msgspec

__all__ = (
    "TERMINAL",
    "TRANSITIONS",
    "DeletedJob",
    "JobKind",
    "JobState",
    "JobView",
    "Lane",
    "QueuePlace",
)


class JobKind(StrEnum):
    """What sort of work a job is."""

    SCAN = "scan"
    LOAD = "load"
    UNLOAD = "unload"


class JobState(StrEnum):
    """Where a job stands."""

    QUEUED = "queued"
    CLAIMED = "claimed"
    LOADING = "loading"
    RUNNING = "running"
    STORING = "storing"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"
    EXPIRED = "expired"
    QUARANTINED = "quarantined"
    """Lost three workers: set aside with what is known, never tried again by itself."""


class Lane(StrEnum):
    """How soon a job should run; the weights are the queue's."""

    INTERACTIVE = "interactive"
    BATCH = "batch"
    BACKGROUND = "background"


_S = JobState
_LEAVES = frozenset({_S.QUEUED, _S.FAILED, _S.CANCELLED, _S.EXPIRED, _S.QUARANTINED})

TRANSITIONS: Mapping[JobState, frozenset[JobState]] = MappingProxyType(
    {
        _S.QUEUED: frozenset({_S.CLAIMED, _S.CANCELLED, _S.EXPIRED, _S.FAILED}),
        _S.CLAIMED: _LEAVES | {_S.LOADING, _S.RUNNING},
        _S.LOADING: _LEAVES | {_S.RUNNING},
        # A small result is stored in one step: nobody would see the state between.
        _S.RUNNING: _LEAVES | {_S.STORING, _S.SUCCEEDED},
        _S.STORING: _LEAVES | {_S.SUCCEEDED},
        _S.SUCCEEDED: frozenset(),
        _S.FAILED: frozenset(),
        _S.CANCELLED: frozenset(),
        _S.EXPIRED: frozenset(),
        _S.QUARANTINED: frozenset(),
    }
)
"""From each state, the states a job may move to. Only `backing.jobs` moves one."""

TERMINAL = frozenset(state for state, following in TRANSITIONS.items() if not following)
HELD = frozenset({_S.CLAIMED, _S.LOADING, _S.RUNNING, _S.STORING})
"""States in which a worker holds the job under a lease."""


class QueuePlace(msgspec.Struct, frozen=True, kw_only=True):
    """Where a waiting job stands, as things are: who comes later may have a better turn."""

    position: int
    """1 for the next to be taken."""
    estimated_start_seconds: float | None = None
    """From now, by the pace at which the queue has moved; None where nobody can tell, because no worker
    holds the model or nothing like it was ever measured."""


class JobView(msgspec.Struct, frozen=True, kw_only=True):
    """A job as its owner sees it."""

    id: UUID
    kind: JobKind
    state: JobState
    model: str
    revision: str
    lane: Lane = Lane.INTERACTIVE
    request: dict[str, Any] = {}
    """The request as it was understood, defaults written out."""
    cached: bool = False
    """Whether an earlier scan had already computed this result."""
    coalesced: bool = False
    """Whether an equal scan that was under way computes, or computed, this result."""
    attempt: int = 0
    scan_key: str | None = None
    """The result's, once there is one: workers that have been upgraded may compute a scan otherwise than it was asked for."""
    created_at: datetime
    started_at: datetime | None = None
    finished_at: datetime | None = None
    queue: QueuePlace | None = None
    """While it waits, to who looks at the job itself."""
    problem: dict[str, Any] | None = None
    """Why it failed, as problem details."""
    links: dict[str, str] = {}
    """`self`, `events`, and, once it has succeeded, `result`."""


class DeletedJob(msgspec.Struct, frozen=True, kw_only=True):
    """A job that has been deleted, and its result as far as it was this job's."""

    id: UUID
    sessions: tuple[UUID, ...] = ()
    """Sessions of yours that keep the result: they show it as before."""
