"""A job as a value: what is submitted, and what the database's row says, decoded."""

import os
import threading
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from types import MappingProxyType
from typing import Any, Self, TypeAlias
from uuid import UUID

import msgspec
from sqlalchemy import Row

from neural_mri.backing.leases import LeaseOwner
from neural_mri.contract.jobs import JobKind, JobState, JobView, Lane
from neural_mri.contract.problems import ProblemDocument
from neural_mri.contract.scans import decode_scan
from neural_mri.contract.tokens import Operands, Tokens

__all__ = ("LANE_WEIGHTS", "AnyRow", "Job", "Submission", "new_id")

LANE_WEIGHTS: Mapping[Lane, float] = MappingProxyType(
    {Lane.INTERACTIVE: 8.0, Lane.BATCH: 2.0, Lane.BACKGROUND: 1.0}
)
"""Shares of a queue: work of one interactive job counts against its owner an eighth of what it costs."""


AnyRow: TypeAlias = Row[*tuple[Any, ...]]
"""A row whose columns are known by name."""


_tokens = msgspec.json.Decoder(Tokens)
_operands = msgspec.json.Decoder(Operands)
_document = msgspec.json.Decoder(dict[str, Any])


class Submission(msgspec.Struct, frozen=True, kw_only=True):
    """A job to be."""

    owner: str
    kind: JobKind
    model: str
    revision: str
    queue: str
    request: bytes
    """JSON, defaults written out."""
    tokens: Tokens | None = None
    operands: Operands = Operands()
    forwards: float = 1.0
    """About how much work it is, in plain forward passes of its prompt."""
    scan_key: str | None = None
    """None for work whose result nobody could use again."""
    lane: Lane = Lane.INTERACTIVE
    deadline_seconds: float = 600.0
    """How long one attempt may run."""
    idempotency_key: str | None = None
    """The caller's own word for this request: sent again, it makes no second job."""
    traceparent: str | None = None
    """The span that asks for it, as W3C Trace Context writes it."""

    @property
    def n_tokens(self) -> int:
        """Of the prompt and of whatever else is read."""
        read = [*self.operands.prompts.values(), *([] if self.tokens is None else [self.tokens])]
        return sum(map(len, read))

    @property
    def estimated_cost(self) -> float:
        """Forward-pass work in tokens; 1 for one forward where there is no prompt."""
        return self.forwards * max(1, len(self.tokens) if self.tokens else 1)

    def batch_key(self, job_id: UUID) -> str:
        """Equal for jobs whose prompts may be rows of one forward pass: same weights and exact length.

        Whatever cannot be a row among others runs alone.
        """
        if self.kind is JobKind.SCAN and self.tokens is not None:
            shared = decode_scan(self.request).shared_forward
            if shared is not None:
                return f"{shared}:{self.revision}:{len(self.tokens)}"
        return f"alone:{job_id}"


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """A job as it stood when it was read."""

    id: UUID
    owner: str
    kind: JobKind
    state: JobState
    model: str
    revision: str
    queue: str
    lane: Lane
    request: bytes
    """JSON, as it was submitted."""
    tokens: Tokens | None
    operands: Operands
    n_tokens: int
    scan_key: str | None
    batch_key: str
    virtual_start: float
    estimated_cost: float
    attempt: int
    lease_owner: LeaseOwner | None
    lease_until: datetime | None
    cancel_requested: bool
    deadline_seconds: float
    cached: bool
    manifest: str | None
    """Storage path of the result's manifest, once it has succeeded."""
    reusable: bool
    """Whether its result answers later scans: not once some of its bytes were found missing or damaged."""
    problem: ProblemDocument | None
    leader: UUID | None
    """The id under which the work is known that this job waits for, where it is not its own."""
    traceparent: str | None
    """The span that asked for it, as W3C Trace Context writes it."""
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None

    @classmethod
    def of_row(cls, row: AnyRow) -> Self:
        """The job that a full row of `jobs` describes."""
        return cls(
            id=row.id,
            owner=row.owner,
            kind=row.kind,
            state=row.state,
            model=row.model,
            revision=row.revision,
            queue=row.queue,
            lane=row.lane,
            request=row.request.encode(),
            tokens=None if row.tokens is None else _tokens.decode(row.tokens),
            operands=_operands.decode(row.operands),
            n_tokens=row.n_tokens,
            scan_key=row.scan_key,
            batch_key=row.batch_key,
            virtual_start=row.virtual_start,
            estimated_cost=row.estimated_cost,
            attempt=row.attempt,
            lease_owner=None if row.lease_owner is None else LeaseOwner.parse(row.lease_owner),
            lease_until=_moment(row.lease_until),
            cancel_requested=row.cancel_requested,
            deadline_seconds=row.deadline_seconds,
            cached=row.cached,
            manifest=row.manifest,
            reusable=row.reusable,
            problem=None if row.problem is None else _document.decode(row.problem),
            leader=row.leader,
            traceparent=row.traceparent,
            created_at=datetime.fromtimestamp(row.created_at, UTC),
            started_at=_moment(row.started_at),
            finished_at=_moment(row.finished_at),
        )

    @property
    def source(self) -> UUID:
        """Whose events tell of this job."""
        return self.leader or self.id

    def view(self, base: str = "/api") -> JobView:
        """The job as its owner sees it, with links under `base`."""
        home = f"{base}/jobs/{self.id}"
        links = {"self": home, "events": f"{home}/events"}
        if self.manifest is not None:
            links["result"] = f"{home}/result"
        return JobView(
            id=self.id,
            kind=self.kind,
            state=self.state,
            model=self.model,
            revision=self.revision,
            lane=self.lane,
            request=_document.decode(self.request),
            cached=self.cached,
            coalesced=self.leader is not None,
            attempt=self.attempt,
            scan_key=self.scan_key,
            created_at=self.created_at,
            started_at=self.started_at,
            finished_at=self.finished_at,
            problem=self.problem,
            links=links,
        )


def _moment(seconds: float | None) -> datetime | None:
    return None if seconds is None else datetime.fromtimestamp(seconds, UTC)


class _Clock:
    """Milliseconds and 1/4096 of them since 1970; each reading is later than the one before."""

    def __init__(self) -> None:
        self._last = 0
        self._turn = threading.Lock()

    def tick(self) -> int:
        """The next reading, in 1/4096 ms."""
        with self._turn:
            self._last = max(self._last + 1, time.time_ns() * 4096 // 1_000_000)
            return self._last


_clock = _Clock()


def new_id() -> UUID:
    """A UUIDv7 (RFC 9562, method 3): ids of one process stand in the order they were made."""
    ticks = _clock.tick()
    milliseconds, fraction = divmod(ticks, 4096)
    noise = int.from_bytes(os.urandom(8)) >> 2
    return UUID(int=milliseconds << 80 | 7 << 76 | fraction << 64 | 2 << 62 | noise)
