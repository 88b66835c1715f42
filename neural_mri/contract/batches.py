"""Batches: up to ten thousand scans asked for in one request, and what became of each line of it.

A line is a scan request with its tag (`scan_mode`), one JSON object. Lines that ask for the same scan share
one job, and a scan whose result is known costs nothing: a batch may be sent again as it stands.
"""

from datetime import datetime
from enum import StrEnum
from typing import Annotated, Any, TypeAlias
from uuid import UUID

import msgspec
from msgspec import Meta

from neural_mri.contract.jobs import JobState, Lane
from neural_mri.contract.problems import NotFound, Unprocessable
from neural_mri.contract.scans import Scan

__all__ = (
    "LEFT_OUT",
    "MOST_LINES",
    "NDJSON",
    "BatchCounts",
    "BatchEnded",
    "BatchEvent",
    "BatchLine",
    "BatchProgress",
    "BatchRequest",
    "BatchState",
    "BatchView",
    "InvalidLine",
    "LineEnded",
    "LinesInvalid",
    "OnInvalid",
    "UnknownBatch",
    "decode_batch_event",
)

MOST_LINES = 10_000
"""Scans of one batch."""
NDJSON = "application/x-ndjson"
LEFT_OUT = b"neural_mri.left_out"
"""Where the schema metadata of one table of all results says which results are lost: a JSON list of problem
details, each with its `line`."""


class UnknownBatch(NotFound):
    """There is no such batch."""


class LinesInvalid(Unprocessable):
    """Some lines of the batch ask for what cannot be done."""


class OnInvalid(StrEnum):
    """What becomes of a batch some of whose lines cannot be done."""

    REFUSE = "refuse"
    """Nothing of it is recorded; the answer names every such line."""
    SKIP = "skip"
    """Those lines are left out and reported, the others run."""


class BatchState(StrEnum):
    """Where a batch stands."""

    RUNNING = "running"
    """Some of its scans have not ended."""
    ENDED = "ended"
    STOPPED = "stopped"
    """Too many of its scans failed: the rest was cancelled."""
    CANCELLED = "cancelled"


class BatchRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A batch as one JSON document; as NDJSON, its scans stand a line each."""

    scans: Annotated[tuple[Scan, ...], Meta(min_length=1, max_length=MOST_LINES)]
    """Each with its `scan_mode`. Line numbers count from 1."""


class InvalidLine(msgspec.Struct, frozen=True, kw_only=True):
    """A line that was refused: its number, and why, as the single request would have been."""

    line: int
    type: str
    title: str
    status: int
    detail: str


class BatchCounts(msgspec.Struct, frozen=True, kw_only=True):
    """How many scans stand where; each scan counts once, however many lines asked for it."""

    queued: int = 0
    """Waiting for a worker, or for room to wait there."""
    running: int = 0
    """Held by a worker, in whatever state of it."""
    succeeded: int = 0
    failed: int = 0
    """Failed, expired or quarantined."""
    cancelled: int = 0
    cached: int = 0
    """Of those that succeeded: known before."""

    @property
    def total(self) -> int:
        """All scans."""
        return self.queued + self.running + self.done

    @property
    def done(self) -> int:
        """Scans that have ended."""
        return self.succeeded + self.failed + self.cancelled


class BatchView(msgspec.Struct, frozen=True, kw_only=True):
    """A batch as its owner sees it."""

    id: UUID
    name: str = ""
    state: BatchState
    lane: Lane
    lines: int
    """Lines that were read, blank ones not counted."""
    refused: int
    """Lines that asked for what cannot be done."""
    repeated: int
    """Lines that asked for what an earlier line had asked for."""
    deleted: int = 0
    """Scans whose jobs have been deleted since: `counts` has them no more."""
    counts: BatchCounts
    max_failures: int | None = None
    created_at: datetime
    invalid: tuple[InvalidLine, ...] = ()
    """The first refused lines, in the answer that accepts the batch; all of them stand at `lines`."""
    links: dict[str, str] = {}
    """`self`, `events`, `lines`, `results`."""


class BatchLine(msgspec.Struct, frozen=True, kw_only=True):
    """What became of a line."""

    line: int
    job: UUID | None = None
    """None for a line that was refused, whose job has been deleted, or that waits for room: then it is `queued`."""
    state: JobState | None = None
    cached: bool = False
    repeats: int | None = None
    """The earlier line that asked for the same scan."""
    problem: dict[str, Any] | None = None
    """Why it was refused, why its job has no result, or that it is there no more."""


class BatchProgress(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="progress"):
    """How far the batch has come."""

    total: int
    done: int
    counts: BatchCounts


class LineEnded(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="line"):
    """The scan of a line has ended. Told again, perhaps, to a reader that comes back."""

    line: int
    job: UUID
    state: JobState
    cached: bool = False
    repeats: int | None = None
    problem: dict[str, Any] | None = None


class BatchEnded(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="ended"):
    """Every scan of the batch has ended: the last event."""

    state: BatchState
    counts: BatchCounts


BatchEvent: TypeAlias = BatchProgress | LineEnded | BatchEnded

_decoder: msgspec.json.Decoder[BatchEvent] = msgspec.json.Decoder(BatchEvent)


def decode_batch_event(body: bytes | str) -> BatchEvent:
    """An event as it was sent."""
    return _decoder.decode(body)
