"""A session's events over HTTP: who saves what, and scans as they arrive.

Told by Redis as jobs' events are. The database is asked as well, now and then, and more often while a scan is
on its way or Redis is away: whoever follows hears of every revision in the end.
"""

import time
from collections.abc import AsyncGenerator, Callable, Iterable
from contextlib import suppress
from uuid import UUID

import msgspec

from api.batch_streams import block
from api.dependencies import Services
from api.hub import END, PAGE, START, Frame, Listener, Position
from api.session_contents import arriving
from neural_mri.backing import sessions
from neural_mri.backing.broker import AWAY
from neural_mri.contract.problems import Unavailable
from neural_mri.contract.sessions import (
    Arrival,
    ScanArrived,
    SessionClosed,
    SessionEvent,
    SessionSaved,
    SessionView,
    UnknownSession,
    decode_session_event,
)

__all__ = ("SessionFollowing",)

LOOK_SECONDS = 5.0
ARRIVING_SECONDS = 0.5
RETRY_MILLISECONDS = 500
_NAMES = frozenset({"saved", "scan", "closed"})

Shown = Callable[[SessionEvent], SessionEvent]


class SessionFollowing:
    """One reader's way through a session's events."""

    def __init__(
        self,
        services: Services,
        session_id: UUID,
        last_event_id: str | None,
        shown: Shown = lambda event: event,
    ) -> None:
        """Follow a session from where a reader stopped.

        `shown` is what the reader may see of an event.
        """
        self._services = services
        self._hub = services.hub
        self._session_id = session_id
        cursor = Position.parse(last_event_id or "")
        self._cursor = START if cursor is None or cursor == END else cursor
        self._shown = shown
        self._listener = Listener()
        self._head = ""
        """The revision that the reader was last told of."""
        self._seen = ""
        """The one that the database named last."""
        self._states: dict[UUID, Arrival] = {}
        """Scans on their way, as the reader was last told of them."""
        self._is_blind = False
        """Whether the database did not answer when it was last asked."""
        self._has_closed = False

    async def chunks(self) -> AsyncGenerator[bytes]:
        """The stream's bytes."""
        self._hub.join(self._session_id, self._listener)
        try:
            yield b"retry: %d\n\n" % RETRY_MILLISECONDS
            await self._hub.live(self._session_id)
            for chunk in await self._missed():
                yield chunk
            heartbeat = self._services.settings.heartbeat_seconds
            spoke, looked = time.monotonic(), -LOOK_SECONDS
            while not self._hub.closing and not self._has_closed:
                if time.monotonic() >= looked + self._pause():
                    told = await self._look()
                    looked = time.monotonic()
                    if told:
                        yield told
                        spoke = looked
                        continue
                until = min(looked + self._pause(), spoke + heartbeat)
                news = await self._listener.news(max(0.0, until - time.monotonic()))
                if news.fell_behind or news.lost:
                    looked = -LOOK_SECONDS
                if told := b"".join(self._frames(news.frames)):
                    yield told
                    spoke = time.monotonic()
                elif time.monotonic() - spoke >= heartbeat:
                    yield b":\n\n"
                    spoke = time.monotonic()
        finally:
            self._hub.leave(self._session_id, self._listener)

    def _pause(self) -> float:
        """How long until the next look at the database."""
        is_overdue = self._seen not in ("", self._head)
        is_coming = any(arrival.problem is None for arrival in self._states.values())
        is_busy = is_coming or is_overdue or self._is_blind or not self._hub.is_connected
        return ARRIVING_SECONDS if is_busy else LOOK_SECONDS

    async def _missed(self) -> list[bytes]:
        """What the stream holds that came after the reader's last event, if that is still there."""
        missed: list[bytes] = []
        with suppress(*AWAY):
            if self._cursor == START:
                return missed
            if await self._hub.at(self._session_id, self._cursor) is None:
                # One that no event has had may stand behind all that are to come.
                self._cursor = START
                return missed
            while frames := await self._hub.page(self._session_id, self._cursor):
                missed += self._frames(frames)
                self._cursor = max(self._cursor, frames[-1].position)
                if len(frames) < PAGE:
                    break
        return missed

    def _frames(self, frames: Iterable[Frame]) -> list[bytes]:
        told = []
        for frame in frames:
            if frame.name not in _NAMES or frame.position <= self._cursor:
                continue
            self._cursor = frame.position
            event = decode_session_event(_data(frame, self._session_id))
            if chunk := self._told(event):
                told.append(chunk)
        return told

    async def _look(self) -> bytes:
        """Where the session stands, where that is news and can be told."""
        self._is_blind = False
        try:
            arrivals = await arriving(self._services, self._session_id)
            view = await self._services.sessions.read(sessions.find, self._session_id)
        except UnknownSession:
            view = None
        except Unavailable:
            self._is_blind = True
            return b""
        if view is None:
            return self._told(SessionClosed())
        told = self._told(_saved(view)) if self._is_untold(view.head) else b""
        told += b"".join([self._told(_arrived(arrival)) for arrival in arrivals])
        self._states = {arrival.job: arrival for arrival in arrivals}
        return told

    def _is_untold(self, head: str) -> bool:
        """Whether the stream owes the reader a revision: it says more of it, and so has the first word."""
        is_overdue = self._seen == head or not self._head or not self._hub.is_connected
        self._seen = head
        return head != self._head and is_overdue

    def _told(self, event: SessionEvent) -> bytes:
        """An event as it goes out; nothing where the reader knows it."""
        match event:
            case SessionSaved(revision=revision):
                if revision == self._head:
                    return b""
                self._head = revision
            case ScanArrived(job=job):
                known = self._states.get(job)
                arrival = Arrival(**msgspec.structs.asdict(event))
                if known == arrival:
                    return b""
                self._states[job] = arrival
            case SessionClosed():
                self._has_closed = True
        return block(self._shown(event), str(self._cursor), "session", self._session_id)


def _saved(view: SessionView) -> SessionSaved:
    return SessionSaved(revision=view.head, number=view.revision, name=view.name)


def _arrived(arrival: Arrival) -> ScanArrived:
    return ScanArrived(**msgspec.structs.asdict(arrival))


def _data(frame: Frame, session_id: UUID) -> bytes:
    """An event's own JSON: the hub puts whose it is before it, under the name that jobs have."""
    data = frame.body.partition(b"data: ")[2].rstrip(b"\n")
    return b"{" + data.removeprefix(b'{"job":"%b",' % str(session_id).encode())
