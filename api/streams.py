"""Event streams over HTTP: server-sent events, replayed from where the reader stopped.

One stream may carry several jobs. Its id then names each job's position (`id: HEX=12-0,HEX=end`), so that
one Last-Event-ID resumes them all. A stream ends when each of its jobs has ended.

A job that follows an equal one is told of by that one's events, as if they were its own; but its end is
its own, and stands after every event. Where it goes on without the other, its reader is told where it
stands (`reset`) and hears its own events from there. Of one that is deleted before its end was read
nothing more is told.
"""

import asyncio
import random
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from uuid import UUID

import structlog
from litestar.types import ASGIApp, Receive, Scope, Send

from api.access import Admitted
from api.cancellation import cancelled
from api.dependencies import Services
from api.hub import END, PAGE, START, Frame, Listener, News, Position, frame_of
from neural_mri.backing.broker import AWAY
from neural_mri.backing.events import change_of
from neural_mri.backing.records import Job
from neural_mri.contract.events import Queued, Reset
from neural_mri.contract.jobs import TERMINAL, JobState, QueuePlace
from neural_mri.contract.problems import Unavailable, UnknownJob

__all__ = ("MEDIA_TYPE", "Following", "event_stream", "no_content", "parse_cursors")

MEDIA_TYPE = "text/event-stream"

RETRY_MILLISECONDS = 500
AWAY_SECONDS = 1.0
"""How often a stream is tried again that could not be read, or whose job could not be looked at."""
STALL_SECONDS = 30.0
"""A reader that takes nothing for so long is cut; it may resume."""
PLACE_SECONDS = 1.0
"""How often a reader is told, at most, where a waiting job stands."""

STATE, RESET, ENDED = "state", "reset", "ended"
_WAITS = b'"state":"queued"'
_NOWHERE = QueuePlace(position=0)

log = structlog.get_logger(__name__)


def parse_cursors(last_event_id: str | None, job_ids: Sequence[UUID]) -> dict[UUID, Position]:
    """Where a reader stopped, by job. What cannot be read counts as never begun.

    A stream of one job has plain ids, one of several has ids that name them.
    """
    text = last_event_id or ""
    named = dict(part.partition("=")[::2] for part in text.split(","))
    alone = Position.parse(text) if len(job_ids) == 1 else None
    cursors = {}
    for job_id in job_ids:
        position = alone or Position.parse(named.get(job_id.hex, ""))
        if position is not None:
            cursors[job_id] = position
    return cursors


class Following:
    """One reader's way through the events of some jobs."""

    def __init__(
        self, services: Services, jobs: Sequence[Job], cursors: Mapping[UUID, Position]
    ) -> None:
        self._services = services
        self._hub = services.hub
        self._jobs = {job.id: job for job in jobs}
        self._cursors = {job.id: _place_in(job, cursors.get(job.id, START)) for job in jobs}
        self._is_shared = len(jobs) > 1
        self._listener = Listener()
        self._joined: set[UUID] = set()
        self._places = {job.id: _NOWHERE for job in jobs if job.state is JobState.QUEUED}
        """What the reader was last told of jobs that wait."""
        self._place_at = time.monotonic() + PLACE_SECONDS
        self._open = set(self._jobs)
        """Jobs whose end the reader has not seen."""
        self._behind = set(self._jobs)
        """Jobs of whose events the reader lacks some that were not pushed."""
        self._vanished: set[UUID] = set()
        """Jobs whose streams are gone, and with them what the reader has seen."""

    async def has_ended(self) -> bool:
        """Whether the reader has seen the end of every job: there is nothing more to come."""
        for job_id, job in self._jobs.items():
            cursor = self._cursors[job_id]
            if job.state not in TERMINAL or cursor == START:
                continue
            if job.leader is not None and cursor != END:
                continue  # the cursor stands in another job's stream, whose end is not this one's
            with suppress(*AWAY):
                last = None if cursor == END else await self._hub.at(job_id, cursor)
                if cursor == END or (last is not None and last.name == ENDED):
                    self._open.discard(job_id)
        self._behind &= self._open
        return not self._open

    async def chunks(self) -> AsyncGenerator[bytes]:
        """The stream's bytes: what was missed, then what happens, and comments while nothing does."""
        for job_id in self._open:
            self._join(self._jobs[job_id])
        try:
            yield b"retry: %d\n\n" % RETRY_MILLISECONDS
            heartbeat = self._services.settings.heartbeat_seconds
            spoke = time.monotonic()
            while True:
                async for chunk in self._catch_up():
                    yield chunk
                    spoke = time.monotonic()
                if not self._open or self._hub.closing:
                    break
                until = spoke + heartbeat
                if self._places:
                    until = min(until, self._place_at)
                pause = max(0.0, until - time.monotonic())
                news = await self._listener.news(
                    min(pause, AWAY_SECONDS) if self._behind else pause
                )
                told = self._take(await self._in_order(news))
                if chunk := told + await self._waiting():
                    yield chunk
                    spoke = time.monotonic()
                elif time.monotonic() - spoke >= heartbeat:
                    yield b":\n\n"
                    spoke = time.monotonic()
        finally:
            for topic in self._joined:
                self._hub.leave(topic, self._listener)

    async def _waiting(self) -> bytes:
        """Where the jobs that wait stand, where that has changed and is not told too often."""
        if not self._places or time.monotonic() < self._place_at:
            return b""
        self._place_at = time.monotonic() + PLACE_SECONDS
        parts = []
        for job_id in self._places.keys() & self._open:
            try:
                place = await self._services.outlook.place(self._jobs[job_id])
            except Unavailable:  # where it stands is told when somebody can look
                break
            if place is not None and place != self._places[job_id]:
                self._places[job_id] = place
                queued = Queued(
                    position=place.position, estimated_start_seconds=place.estimated_start_seconds
                )
                # It stands in no stream, and so moves no cursor.
                frame = frame_of(job_id, queued, START)
                parts.append(b"id: %b\n%b" % (self._id().encode(), frame.body))
        return b"".join(parts)

    def _join(self, job: Job) -> None:
        """Hear of a job; of one that follows its own stream tells only when it was cancelled."""
        for topic in {job.id, job.source} - self._joined:
            self._hub.join(topic, self._listener)
            self._joined.add(topic)

    async def _in_order(self, news: News) -> list[Frame]:
        """The pushed frames that follow on what the reader has; the others are read from the streams."""
        self._vanished |= {
            job_id for job_id in self._open if self._jobs[job_id].source in news.lost
        }
        self._behind |= self._open if news.fell_behind else self._vanished
        frames, turned = [], set()
        for frame in news.frames:
            for job_id in self._open:
                job, is_behind = self._jobs[job_id], job_id in self._behind
                if frame.job_id == job_id and (frame.position == END or not is_behind):
                    if job.leader is None or frame.position == END:
                        frames.append(frame)
                    else:
                        turned.add(job_id)
                elif frame.job_id == job.source != job_id and not is_behind:
                    if frame.name == ENDED:
                        turned.add(job_id)
                    else:
                        frames.append(_retold(frame, job_id))
        for job_id in turned:
            try:
                frames += await self._look(job_id)
            except Unavailable:
                # What it turned to is read from its streams, and looked at, once that can be done.
                self._behind.add(job_id)
            except UnknownJob:
                self._leave_out(job_id)
        return frames

    async def _look(self, job_id: UUID) -> list[Frame]:
        """What there is to tell of a job that follows, when that which it follows has ended."""
        source = self._jobs[job_id].source
        reset = await self._reset(job_id)
        job = self._jobs[job_id]
        if job.state in TERMINAL:
            return [frame_of(job_id, change_of(job), END)]
        if job.source == source:
            return []  # handed over: the work goes on, and is told of where it was
        self._behind.add(job_id)
        return [reset]

    async def _catch_up(self) -> AsyncIterator[bytes]:
        """What the streams hold and the reader lacks; what cannot be read now stays behind."""
        for job_id in tuple(self._behind):
            while job_id in self._behind:
                source = self._jobs[job_id].source
                try:
                    if not await self._hub.live(source):
                        return
                    async for frames in self._missed(job_id):
                        if chunk := self._take(frames):
                            yield chunk
                except (Unavailable, *AWAY):
                    return
                except UnknownJob:
                    self._leave_out(job_id)
                if self._jobs[job_id].source == source:
                    self._behind.discard(job_id)

    async def _missed(self, job_id: UUID) -> AsyncIterator[Sequence[Frame]]:
        cursor, was_reset = self._cursors[job_id], False
        source = self._jobs[job_id].source
        if job_id in self._vanished or (
            cursor != START and await self._hub.at(source, cursor) is None
        ):
            # Emptied, expired or trimmed: the reader begins again from where the job stands.
            yield [await self._reset(job_id)]
            self._vanished.discard(job_id)
            was_reset = True
            if self._jobs[job_id].source != source:
                return
        async for frames in self._pages(job_id, source):
            yield frames
        if source != job_id:
            if told := await self._look(job_id):
                # What was told between the last page and the look comes before it.
                async for frames in self._pages(job_id, source):
                    yield frames
                yield told
            return
        job = self._jobs[job_id]
        if self._cursors[job_id] != START:
            return
        # Nothing stands in the stream. A job answered from an earlier result never had one.
        if job.state in TERMINAL:
            yield [frame_of(job_id, change_of(job), END)]
        elif job.state is not JobState.QUEUED and not was_reset:
            yield [await self._reset(job_id)]

    async def _pages(self, job_id: UUID, source: UUID) -> AsyncIterator[Sequence[Frame]]:
        """What a stream holds after that which the reader has, as a job's own events."""
        after = self._cursors[job_id]
        while True:
            frames = await self._hub.page(source, after=after)
            if source == job_id:
                yield frames
            else:
                yield [_retold(frame, job_id) for frame in frames if frame.name != ENDED]
            if len(frames) < PAGE:
                return
            after = frames[-1].position

    def _leave_out(self, job_id: UUID) -> None:
        """Tell no more of a job that has been deleted: of its mates there is more to tell."""
        self._open.discard(job_id)
        self._behind.discard(job_id)
        self._vanished.discard(job_id)
        self._places.pop(job_id, None)

    async def _reset(self, job_id: UUID) -> Frame:
        """Where the job stands now. Raises `UnknownJob` once it has been deleted."""
        job = await self._services.job(job_id)
        self._jobs[job_id] = job
        self._join(job)
        return frame_of(job_id, Reset(state=job.state, attempt=job.attempt), START)

    def _take(self, frames: Iterable[Frame]) -> bytes:
        """The frames that are new to the reader, as bytes; moves the cursors."""
        parts = []
        for frame in frames:
            cursor = self._cursors[frame.job_id]
            is_reset = frame.position == START
            if frame.job_id not in self._open or (frame.position <= cursor and not is_reset):
                continue
            self._cursors[frame.job_id] = frame.position
            if _WAITS in frame.body and frame.name in (STATE, RESET):
                self._places.setdefault(frame.job_id, _NOWHERE)
            else:
                self._places.pop(frame.job_id, None)
            if frame.name == ENDED:
                self._open.discard(frame.job_id)
                self._behind.discard(frame.job_id)
            parts.append(b"id: %b\n%b" % (self._id().encode(), frame.body))
        return b"".join(parts)

    def _id(self) -> str:
        if not self._is_shared:
            (position,) = self._cursors.values()
            return str(position)
        return ",".join(f"{job_id.hex}={at}" for job_id, at in self._cursors.items() if at != START)


def _place_in(job: Job, cursor: Position) -> Position:
    """Where a reader stopped; who says that they have read an end that there has not been begins anew."""
    return START if cursor == END and job.state not in TERMINAL else cursor


def _retold(frame: Frame, job_id: UUID) -> Frame:
    """An event of the job that another follows, as the other's: its addresses are the other's as well."""
    body = frame.body.replace(str(frame.job_id).encode(), str(job_id).encode())
    return frame._replace(job_id=job_id, body=body)


def event_stream(
    chunks: Callable[[], AsyncGenerator[bytes]], admitted: Admitted, *, look_seconds: float
) -> ASGIApp:
    """Answer with a stream of events until it ends, or its reader goes away or takes nothing.

    Every `look_seconds` at the latest it is asked whether the reader is still `admitted`: a key that is
    revoked ends its streams too.
    """

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        await send(
            {
                "type": "http.response.start",
                "status": 200,
                "headers": [
                    (b"content-type", MEDIA_TYPE.encode()),
                    (b"cache-control", b"no-store"),
                    (b"x-accel-buffering", b"no"),
                ],
            }
        )
        if scope.get("head_only"):
            await send({"type": "http.response.body", "body": b"", "more_body": False})
            return
        sending = asyncio.create_task(_send_all(chunks(), send))
        leaving = asyncio.create_task(_disconnected(receive))
        barring = asyncio.create_task(_shut_out(admitted, look_seconds))
        try:
            await asyncio.wait({sending, leaving, barring}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            await cancelled(sending, leaving, barring)
        if sending.cancelled() and not barring.cancelled():
            log.info("event_reader_shut_out")
            await send({"type": "http.response.body", "body": b"", "more_body": False})

    return answer


async def _shut_out(admitted: Admitted, look_seconds: float) -> None:
    """Return once the reader would not be let in any more."""
    while True:
        # Not all at once who came all at once.
        await asyncio.sleep(look_seconds * random.uniform(0.5, 1.0))  # noqa: S311 (no secret)
        if not await admitted():
            return


async def _send_all(chunks: AsyncGenerator[bytes], send: Send) -> None:
    try:
        async for chunk in chunks:
            async with asyncio.timeout(STALL_SECONDS):
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
    except TimeoutError:
        log.info("event_reader_cut", seconds=STALL_SECONDS)
    finally:
        await chunks.aclose()


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def no_content(_scope: Scope, _receive: Receive, send: Send) -> None:
    """Tell a reader that comes back not to come again: the end has been read. An ASGI application."""
    await send({"type": "http.response.start", "status": 204, "headers": []})
    await send({"type": "http.response.body", "body": b"", "more_body": False})
