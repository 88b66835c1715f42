"""What is told: each job's event stream, cancel flags, and what the workers say of themselves.

All of it may be lost: SQL is the truth. So nothing here raises when Redis is away. An event that cannot be
told is dropped and counted; a reader who finds a gap is told where the job stands (`Replay.is_whole`).
"""

import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple
from uuid import UUID

import msgspec
import structlog

from neural_mri.backing import keys
from neural_mri.backing.broker import AWAY, AsyncRedis, SyncRedis
from neural_mri.backing.queue import ticket_message
from neural_mri.backing.records import Job
from neural_mri.backing.settings import Settings
from neural_mri.contract.events import Ended, Event, StateChanged, encode_event, event_name
from neural_mri.contract.jobs import TERMINAL
from neural_mri.contract.models import ModelState
from neural_mri.contract.sessions import SessionEvent

__all__ = (
    "AsyncPublisher",
    "Entry",
    "HeldModel",
    "Publisher",
    "Replay",
    "Told",
    "WorkerBeat",
    "asked_to_stop",
    "beat",
    "change_of",
    "heartbeats",
    "heartbeats_async",
    "parse_entries",
    "replay",
)

log = structlog.get_logger(__name__)

RECONNECT_SECONDS = 1.0
"""After a failure events are dropped for so long: a frozen server must not slow a scan down."""
CANCEL_FLAG_SECONDS = 3600
NO_TICKETS: Mapping[str, int] = MappingProxyType({})
BEAT_SECONDS = 10
"""A worker that has not been heard of for so long holds nothing, as far as anyone can tell."""


def change_of(job: Job) -> StateChanged | Ended:
    """The event that tells of the state a job has just reached."""
    if job.state not in TERMINAL:
        return StateChanged(state=job.state, attempt=job.attempt)
    return Ended(
        state=job.state,
        attempt=job.attempt,
        cached=job.cached,
        result=job.view().links.get("result"),
        problem=job.problem,
    )


class Told(NamedTuple):
    """An event, and whose it is."""

    job_id: UUID
    event: Event


class _Outage:
    """Whether Redis was away a moment ago, and how much went untold since."""

    def __init__(self) -> None:
        self._until = 0.0
        self._is_said = False
        self._dropped = 0

    def is_now(self, count: int = 1) -> bool:
        """Whether not even to try; counts what is dropped for it."""
        away = time.monotonic() < self._until
        self._dropped += count * away
        return away

    def begin(self, error: Exception, count: int = 1) -> None:
        """Note a failure; said once an outage."""
        if not self._is_said:
            log.warning("events_dropped", error=str(error))
        self._is_said = True
        self._dropped += count
        self._until = time.monotonic() + RECONNECT_SECONDS

    def end(self) -> None:
        """Note a success."""
        if self._is_said:
            log.info("events_resumed", dropped=self._dropped)
            self._is_said, self._dropped = False, 0


class Publisher:
    """Appends events to jobs' streams; drops them while Redis is away. Use from one thread."""

    def __init__(self, redis: SyncRedis, settings: Settings) -> None:
        self._redis = redis
        self._length = settings.event_stream_length
        self._seconds = int(settings.event_stream_seconds)
        self._outage = _Outage()

    def publish(self, job_id: UUID, event: Event) -> None:
        """Append an event. Never raises for Redis."""
        self.publish_all((Told(job_id, event),))

    def publish_all(self, told: Sequence[Told], asking: Sequence[UUID] = ()) -> frozenset[UUID]:
        """Append events, in order, by one round trip; those of the jobs asked for that are watched.

        Never raises for Redis; while it is away nobody counts as watched.
        """
        if not (told or asking) or self._outage.is_now(len(told)):
            return frozenset()
        pipeline = self._redis.pipeline(transaction=False)
        _append(pipeline, told, length=self._length, seconds=self._seconds)
        if asking:
            pipeline.mget([keys.watched(job_id) for job_id in asking])
        try:
            answers = pipeline.execute()
        except AWAY as error:
            self._outage.begin(error, len(told))
            return frozenset()
        self._outage.end()
        return _set_among(asking, answers[-1]) if asking else frozenset()

    def announce(self, job: Job) -> None:
        """Tell of a job's new state, once the transaction that moved it is committed."""
        self.publish(job.id, change_of(job))

    def flag_cancel(self, job_id: UUID) -> None:
        """Let the job's worker know sooner than by its next renewal."""
        try:
            self._redis.set(keys.cancel_flag(job_id), b"1", ex=CANCEL_FLAG_SECONDS)
        except AWAY as error:
            self._outage.begin(error)


class AsyncPublisher:
    """The same for an event loop."""

    def __init__(self, redis: AsyncRedis, settings: Settings) -> None:
        self._redis = redis
        self._length = settings.event_stream_length
        self._seconds = int(settings.event_stream_seconds)
        self._outage = _Outage()

    async def publish(self, job_id: UUID, event: Event | SessionEvent) -> None:
        """Append an event, of a session's stream under the session's id. Never raises for Redis."""
        await self.publish_all(((job_id, event),))

    async def publish_all(
        self,
        told: Sequence[tuple[UUID, Event | SessionEvent]],
        *,
        watched: Collection[UUID] = (),
        tickets: Mapping[str, int] = NO_TICKETS,
    ) -> None:
        """Append events, in order, say who is watched, and then send so many tickets to queues.

        By one round trip. Never raises for Redis: tickets that are not sent the reaper finds missing.
        """
        if not (told or watched) or self._outage.is_now(len(told)):
            return
        pipeline = self._redis.pipeline(transaction=False)
        _append(pipeline, told, length=self._length, seconds=self._seconds)
        for job_id in watched:
            pipeline.set(keys.watched(job_id), b"1", ex=self._seconds)
        for queue, count in tickets.items():
            pipeline.lpush(queue, *(ticket_message(queue) for _ in range(count)))
        try:
            await pipeline.execute()
        except AWAY as error:
            self._outage.begin(error, len(told))
        else:
            self._outage.end()

    async def announce(self, job: Job) -> None:
        """Tell of a job's new state, once the transaction that moved it is committed."""
        await self.publish(job.id, change_of(job))

    async def forget(self, job_id: UUID, *, is_followed: bool) -> None:
        """Take away what was told of a job that has been deleted, and count it. Never raises for Redis.

        Of one that `is_followed` others are told the same: it goes with its time.
        """
        pipeline = self._redis.pipeline(transaction=False)
        if not is_followed:
            pipeline.delete(keys.event_stream(job_id), keys.watched(job_id))
        pipeline.hincrby(keys.DELETED, "job:asked", 1)
        try:
            await pipeline.execute()
        except AWAY as error:
            self._outage.begin(error)

    async def flag_cancel(self, job_id: UUID) -> None:
        """Let the job's worker know sooner than by its next renewal."""
        try:
            await self._redis.set(keys.cancel_flag(job_id), b"1", ex=CANCEL_FLAG_SECONDS)
        except AWAY as error:
            self._outage.begin(error)


def _append(
    pipeline: Any, told: Sequence[tuple[UUID, Event | SessionEvent]], *, length: int, seconds: int
) -> None:
    for job_id, event in told:
        fields = {"k": event_name(event), "d": encode_event(event)}
        pipeline.xadd(keys.event_stream(job_id), fields, maxlen=length, approximate=True)
    for job_id in {job_id for job_id, _ in told}:
        pipeline.expire(keys.event_stream(job_id), seconds)
    for job_id, event in told:
        if isinstance(event, Ended):
            pipeline.publish(keys.ENDED, job_id.bytes)


def asked_to_stop(redis: SyncRedis, job_ids: Sequence[UUID]) -> frozenset[UUID]:
    """Those of the jobs whose cancel flag is set; none while Redis is away."""
    if not job_ids:
        return frozenset()
    try:
        flags = redis.mget([keys.cancel_flag(job_id) for job_id in job_ids])
    except AWAY:
        return frozenset()
    return _set_among(job_ids, flags)


def _set_among(job_ids: Sequence[UUID], flags: Sequence[Any]) -> frozenset[UUID]:
    return frozenset(
        job_id for job_id, flag in zip(job_ids, flags, strict=True) if flag is not None
    )


class Entry(NamedTuple):
    """One event as it stands in its stream."""

    id: str
    """Of the stream; the SSE id."""
    name: str
    data: bytes
    """JSON, as `contract.events.encode_event` wrote it."""


class Replay(NamedTuple):
    """What a stream says after a point."""

    entries: tuple[Entry, ...]
    is_whole: bool
    """False when what stood there is gone (trimmed, expired, emptied): start from SQL, by `reset`."""


START = "0-0"
"""Before every event."""


async def replay(redis: AsyncRedis, job_id: UUID, after: str = START) -> Replay:
    """The events after the one with id `after`. Raises what `broker.AWAY` names."""
    # Inclusive, to see whether the reader's last event is still there.
    rows = parse_entries(await redis.xrange(keys.event_stream(job_id), min=after))
    if after == START:
        return Replay(rows, is_whole=True)
    if rows and rows[0].id == after:
        return Replay(rows[1:], is_whole=True)
    return Replay(rows, is_whole=False)


def parse_entries(rows: Iterable[tuple[Any, Any]] | None) -> tuple[Entry, ...]:
    """Entries as XRANGE, and XREAD of one stream, give them: bytes throughout."""
    return tuple(
        Entry(id_.decode(), fields[b"k"].decode(), fields[b"d"]) for id_, fields in rows or ()
    )


class HeldModel(msgspec.Struct, frozen=True, kw_only=True):
    """A model that a worker holds, or is about to."""

    name: str
    revision: str
    state: ModelState
    memory_bytes: int | None = None
    load_seconds: float | None = None
    pinned: bool = False
    held_seconds: float | None = None
    """Since it was loaded."""
    has_served: bool = False
    """Whether a job has been run since."""


class WorkerBeat(msgspec.Struct, frozen=True, kw_only=True):
    """What a worker says of itself."""

    worker: str
    device: str
    models: tuple[HeldModel, ...] = ()
    budget_bytes: int | None = None
    """What its models may take in all."""
    free_bytes: int | None = None
    """What it could load now without letting anything go."""
    resting: bool = False
    """Whether no scan had a part of its memory then."""
    at: float
    """By the worker's clock, seconds since 1970; for people."""
    version: str = ""


_beat = msgspec.json.Decoder(WorkerBeat)


def beat(redis: SyncRedis, worker_beat: WorkerBeat) -> None:
    """Say it; forgotten after `BEAT_SECONDS`. Never raises for Redis."""
    pipeline = redis.pipeline(transaction=False)
    pipeline.set(
        keys.heartbeat(worker_beat.worker), msgspec.json.encode(worker_beat), ex=BEAT_SECONDS
    )
    pipeline.sadd(keys.WORKERS, worker_beat.worker)
    try:
        pipeline.execute()
    except AWAY as error:
        log.debug("beat_not_sent", error=str(error))


def heartbeats(redis: SyncRedis) -> list[WorkerBeat]:
    """Workers heard of lately, by name. Raises what `broker.AWAY` names."""
    workers = _names(redis.smembers(keys.WORKERS))
    if not workers:
        return []
    said = _Said(workers, redis.mget([keys.heartbeat(worker) for worker in workers]))
    if said.silent:
        redis.srem(keys.WORKERS, *said.silent)
    return said.beats


async def heartbeats_async(redis: AsyncRedis) -> list[WorkerBeat]:
    """The same for an event loop."""
    workers = _names(await redis.smembers(keys.WORKERS))
    if not workers:
        return []
    said = _Said(workers, await redis.mget([keys.heartbeat(worker) for worker in workers]))
    if said.silent:
        await redis.srem(keys.WORKERS, *said.silent)
    return said.beats


def _names(members: Iterable[Any]) -> list[str]:
    return sorted(member.decode() for member in members)


class _Said:
    """What each worker said, and which have fallen silent."""

    def __init__(self, workers: Sequence[str], bodies: Sequence[Any]) -> None:
        pairs = list(zip(workers, bodies, strict=True))
        self.beats = [_beat.decode(body) for _, body in pairs if body is not None]
        self.silent = [worker for worker, body in pairs if body is None]
