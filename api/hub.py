"""Job events from Redis Streams to any number of readers, over one connection.

One task of the process waits in one XREAD for every stream that somebody follows; a new stream joins at
once, because the wait is ended from outside (CLIENT UNBLOCK). Each event is encoded once. What a reader
missed it reads from the stream itself, page by page, at its own pace.

Redis may be away, or come back empty. A second task then asks the database which jobs have ended, so
that every reader hears the end; and it tells readers when the stream they followed is gone.
"""

import asyncio
import math
import re
import time
from collections.abc import Awaitable, Callable, Collection, Sequence
from contextlib import suppress
from typing import Any, NamedTuple, Self
from uuid import UUID

import redis.asyncio
import structlog
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from api.cancellation import cancelled
from api.ends import Ends
from neural_mri.backing import keys
from neural_mri.backing.broker import AWAY, AsyncRedis
from neural_mri.backing.events import Entry, change_of, parse_entries
from neural_mri.backing.records import Job
from neural_mri.backing.settings import Settings
from neural_mri.contract.events import Event, encode_event, event_name
from neural_mri.contract.problems import Unavailable

__all__ = ("END", "PAGE", "START", "Frame", "Hub", "Listener", "News", "Position", "frame_of")

PAGE = 256
"""Events read from a stream at once."""

BACKLOG = 512
"""Events a reader may be behind; beyond it they are forgotten and read from the stream again."""

BLOCK_SECONDS = 5.0
TICK_SECONDS = 1.0
WATCH_SECONDS = 10.0
"""How often it is said which jobs are watched: who says so may be forgotten, or go away without a word."""
QUIET_SECONDS = 2.0
"""A stream silent for so long is compared with the database: its end may have been lost."""

PAUSE = 4.0
"""How long the reader rests after events, in times of what handing them on has taken."""
LONGEST_PAUSE_SECONDS = 0.02

READERS = 32
"""Pages read at once: redis-py's pool refuses the hundred and first connection."""

log = structlog.get_logger(__name__)


class Position(NamedTuple):
    """A place in a stream: the id of the event there."""

    milliseconds: int
    sequence: int

    @classmethod
    def parse(cls, text: str) -> Self | None:
        """A position as `str` wrote it; None for any other text."""
        if text == _END_TEXT:
            return cls(*END)
        match = _POSITION.fullmatch(text)
        return cls(int(match[1]), int(match[2])) if match else None

    def __str__(self) -> str:
        return _END_TEXT if self == END else f"{self.milliseconds}-{self.sequence}"


_END_TEXT = "end"
_POSITION = re.compile(r"([0-9]{1,18})-([0-9]{1,18})")
START = Position(0, 0)
"""Before every event."""
END = Position(2**63, 0)
"""After every event: where an end stands that no stream holds."""


class Frame(NamedTuple):
    """An event as it goes out, encoded once for all its readers."""

    job_id: UUID
    position: Position
    name: str
    body: bytes
    """The SSE block from `event:` on; the id before it depends on what the reader follows."""


def frame_of(job_id: UUID, event: Event, position: Position) -> Frame:
    """An event that no stream holds."""
    return _frame(job_id, position, event_name(event), encode_event(event))


def _frame(job_id: UUID, position: Position, name: str, data: bytes) -> Frame:
    # Each event says whose it is: one connection may carry several jobs.
    body = b'event: %b\ndata: {"job":"%b",%b\n\n' % (name.encode(), str(job_id).encode(), data[1:])
    return Frame(job_id, position, name, body)


def _frames(job_id: UUID, entries: Sequence[Entry]) -> list[Frame]:
    return [
        _frame(job_id, Position.parse(entry.id) or START, entry.name, entry.data)
        for entry in entries
    ]


class News(NamedTuple):
    """What reached a listener since it last looked."""

    frames: Sequence[Frame] = ()
    fell_behind: bool = False
    """Whether events were forgotten: they are still in the streams."""
    lost: frozenset[UUID] = frozenset()
    """Jobs whose streams have vanished."""


class Listener:
    """One reader's inbox."""

    def __init__(self, only: str | None = None) -> None:
        self._only = only
        self._frames: list[Frame] = []
        self._fell_behind = False
        self._lost: set[UUID] = set()
        self._arrived = asyncio.Event()

    def push(self, frame: Frame) -> None:
        """Take in an event; of one name only, when that was wished for."""
        if self._only is not None and frame.name != self._only:
            return
        if len(self._frames) >= BACKLOG:
            self._frames.clear()
            self._fell_behind = True
        self._frames.append(frame)
        self._arrived.set()

    def lose(self, job_id: UUID) -> None:
        """Note that a job's stream has vanished."""
        self._lost.add(job_id)
        self._arrived.set()

    def wake(self) -> None:
        """Make `news` return."""
        self._arrived.set()

    async def news(self, timeout_seconds: float) -> News:
        """What has arrived, as soon as something has; nothing after the timeout."""
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_seconds):
                await self._arrived.wait()
        self._arrived.clear()
        news = News(self._frames, self._fell_behind, frozenset(self._lost))
        self._frames, self._fell_behind, self._lost = [], False, set()
        return news


class _Topic:
    """A stream that somebody follows."""

    def __init__(self, job_id: UUID) -> None:
        self.job_id = job_id
        self.listeners: set[Listener] = set()
        self.position: Position | None = None
        """Up to where the reader task has read; None until it has found the stream's end."""
        self.live = asyncio.Event()
        """Set once every later event will be pushed."""
        self.heard = time.monotonic()
        self.has_ended = False
        """Whether the database said so at the last look."""

    def push(self, frames: Sequence[Frame]) -> None:
        self.heard = time.monotonic()
        for listener in self.listeners:
            for frame in frames:
                listener.push(frame)


class Hub:
    """The process's one reader of event streams.

    `ended` finds, among jobs by id, those that have ended according to the database.
    """

    def __init__(
        self,
        settings: Settings,
        redis: AsyncRedis,
        ended: Callable[[Collection[UUID]], Awaitable[Sequence[Job]]],
    ) -> None:
        self._url = settings.effective_redis_url
        self._redis = redis
        self._ended = ended
        self.ends = Ends(settings)
        """For those who wait for ends alone."""
        self._topics: dict[str, _Topic] = {}
        self._followed = asyncio.Event()
        self._reader_id: int | None = None
        self._answered = 0.0
        """When the reader last had an answer, on the monotonic clock."""
        self._pages = asyncio.Semaphore(READERS)
        self._tasks: list[asyncio.Task[None]] = []
        # No shorter than who submitted has said it: readers go and come again.
        self._watched_seconds = int(max(settings.event_stream_seconds, 6 * WATCH_SECONDS))
        self._said_at = -math.inf
        """When it was last said what is watched, on the monotonic clock."""
        self.closing = False

    @property
    def is_connected(self) -> bool:
        """Whether Redis answered the reader last time."""
        return self._reader_id is not None

    @property
    def followed(self) -> int:
        """How many streams are followed."""
        return len(self._topics)

    @property
    def readers(self) -> int:
        """How many event streams are being read."""
        return len({id(each) for topic in self._topics.values() for each in topic.listeners})

    def start(self) -> None:
        """Begin to read."""
        self.ends.start()
        self._tasks = [asyncio.create_task(self._read()), asyncio.create_task(self._watch())]

    async def stop(self) -> None:
        """Stop reading."""
        self.close()
        await cancelled(*self._tasks)
        await self.ends.stop()

    def close(self) -> None:
        """Send every reader away: the process is about to end."""
        self.closing = True
        self.ends.wake_all()
        for topic in self._topics.values():
            for listener in topic.listeners:
                listener.wake()

    def join(self, job_id: UUID, listener: Listener) -> None:
        """Push a job's events to a listener, from the moment that `live` says so."""
        topic = self._topics.setdefault(keys.event_stream(job_id), _Topic(job_id))
        topic.listeners.add(listener)
        self._followed.set()

    def leave(self, job_id: UUID, listener: Listener) -> None:
        """Push no more. Awaits nothing: it runs while its caller is being cancelled."""
        key = keys.event_stream(job_id)
        if topic := self._topics.get(key):
            topic.listeners.discard(listener)
            if not topic.listeners:
                del self._topics[key]

    async def live(self, job_id: UUID, timeout_seconds: float = 1.0) -> bool:
        """Wait until every further event of a joined job is pushed; False while Redis is away."""
        topic = self._topics[keys.event_stream(job_id)]
        until = time.monotonic() + timeout_seconds
        while not topic.live.is_set() and time.monotonic() < until:
            # The reader may be just about to block: ask until it has seen the new stream.
            if self._reader_id is not None:
                with suppress(*AWAY):
                    await self._redis.client_unblock(self._reader_id)
            with suppress(TimeoutError):
                async with asyncio.timeout(0.02):
                    await topic.live.wait()
        return topic.live.is_set()

    async def page(self, job_id: UUID, after: Position) -> list[Frame]:
        """Up to `PAGE` events after a position. Raises what `broker.AWAY` names."""
        key = keys.event_stream(job_id)
        async with self._pages:
            rows = await self._redis.xrange(key, min=f"({after}", count=PAGE)
        return _frames(job_id, parse_entries(rows))

    async def at(self, job_id: UUID, position: Position) -> Frame | None:
        """The event at a position, if it is still there. Raises what `broker.AWAY` names."""
        key = keys.event_stream(job_id)
        async with self._pages:
            rows = await self._redis.xrange(key, min=str(position), max=str(position), count=1)
        return next(iter(_frames(job_id, parse_entries(rows))), None)

    async def _read(self) -> None:
        """The reader task: positions outlive a lost connection, so nothing is missed."""
        while True:
            reader = redis.asyncio.Redis.from_url(
                self._url,
                single_connection_client=True,
                socket_connect_timeout=1.0,
                socket_timeout=2 * BLOCK_SECONDS,
                retry=Retry(NoBackoff(), 0),
            )
            try:
                self._reader_id = await reader.client_id()
                while True:
                    if await self._read_once(reader):
                        # Events come in bursts: while one rests, the next gathers.
                        busy = time.monotonic() - self._answered
                        await asyncio.sleep(min(LONGEST_PAUSE_SECONDS, PAUSE * busy))
            except AWAY as error:
                if self._reader_id is not None:
                    log.warning("event_reader_lost_redis", error=str(error))
                self._reader_id = None
            finally:
                with suppress(*AWAY):
                    await reader.aclose()
            await asyncio.sleep(0.2)

    async def _read_once(self, reader: AsyncRedis) -> bool:
        """Wait for events and hand them on; whether there were some."""
        if not self._topics:
            self._followed.clear()
            await self._followed.wait()
        for key, topic in tuple(self._topics.items()):
            if topic.position is None:
                newest = parse_entries(await reader.xrevrange(key, count=1))
                topic.position = Position.parse(newest[0].id) if newest else START
                # A server without room takes nothing in, and what it holds is told all the same.
                with suppress(redis.ResponseError):
                    await self._say_watched(reader, topic)
            topic.live.set()
        positions: Any = {
            key: str(topic.position)
            for key, topic in self._topics.items()
            if topic.position is not None
        }
        if not positions:
            return False
        answer: Any = await reader.xread(positions, block=int(BLOCK_SECONDS * 1000), count=PAGE)
        self._answered = time.monotonic()
        for raw_key, rows in answer or ():
            topic_or_none = self._topics.get(raw_key.decode())
            if topic_or_none is not None and topic_or_none.position is not None:
                frames = _frames(topic_or_none.job_id, parse_entries(rows))
                topic_or_none.position = frames[-1].position
                topic_or_none.push(frames)
        return bool(answer)

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(TICK_SECONDS)
            try:
                await self._find_lost()
                await self._keep_watched()
                await self._tell_ends()
            except Unavailable:
                log.debug("event_watch_without_database")
            except Exception:
                # Every reader's last resort: it must not end.
                log.exception("event_watch_failed")

    async def _find_lost(self) -> None:
        """Tell listeners whose stream has vanished: Redis was emptied, or came back empty."""
        read = {
            key: topic
            for key, topic in self._topics.items()
            if topic.position is not None and topic.position != START
        }
        if not read:
            return
        with suppress(*AWAY):
            if await self._redis.exists(*read) == len(read):
                return
            for key, topic in read.items():
                if not await self._redis.exists(key):
                    topic.position = START
                    for listener in topic.listeners:
                        listener.lose(topic.job_id)

    def _say_watched(self, redis: Any, topic: _Topic) -> Any:
        """Have workers tell of the job's frames: somebody looks."""
        return redis.set(keys.watched(topic.job_id), b"1", ex=self._watched_seconds)

    async def _keep_watched(self) -> None:
        """Say again which jobs are watched, before it is forgotten."""
        if time.monotonic() < self._said_at + WATCH_SECONDS:
            return
        self._said_at = time.monotonic()
        pipeline = self._redis.pipeline(transaction=False)
        for topic in self._topics.values():
            self._say_watched(pipeline, topic)
        with suppress(*AWAY):
            await pipeline.execute()

    async def _tell_ends(self) -> None:
        """Tell of ends that only the database knows."""
        now = time.monotonic()
        silent = {
            topic.job_id: topic
            for topic in self._topics.values()
            if not self.is_connected or now - topic.heard > QUIET_SECONDS
        }
        if not silent:
            return
        for job in await self._ended(silent):
            topic = silent[job.id]
            # The stream is a moment behind the database: its own account, if any, comes first.
            if topic.has_ended or not self.is_connected:
                topic.push([frame_of(job.id, change_of(job), END)])
            topic.has_ended = True
