"""A batch's events over HTTP: how far it has come, each line as its scan ends, and one end.

The database is asked, a few times a second for as long as somebody reads: it is the truth, and ten thousand
jobs' streams would be ten thousand keys in Redis. Where it does not answer it is asked again. An event's id
is the moment it tells of. Moments of transactions that ran side by side are seen out of order, so the last
seconds are looked at again each time, and a reader that comes back may be told again of some lines.
"""

import asyncio
import time
from collections.abc import AsyncGenerator
from uuid import UUID

import msgspec

from api.dependencies import Services
from neural_mri.backing import batches
from neural_mri.backing.batches import Batch
from neural_mri.contract.batches import (
    BatchEnded,
    BatchEvent,
    BatchProgress,
    BatchState,
    BatchView,
    LineEnded,
)
from neural_mri.contract.problems import Unavailable

__all__ = ("END", "BatchFollowing", "block", "parse_cursor")

LOOK_SECONDS = 0.3
OVERLAP_SECONDS = 3.0
"""A transaction lasts no longer than that, but for a fault's sake."""
PAGE = 500
RETRY_MILLISECONDS = 500
END = "end"


def parse_cursor(last_event_id: str | None) -> float | None:
    """Where a reader stopped: seconds since 1970; None after the end. What cannot be read is the start."""
    if last_event_id == END:
        return None
    try:
        return max(0.0, float(last_event_id or 0.0))
    except ValueError:
        return 0.0


class BatchFollowing:
    """One reader's way through a batch."""

    def __init__(self, services: Services, batch: Batch, since: float) -> None:
        self._services = services
        self._batch = batch
        self._since = since
        self._told: dict[int, float] = {}
        """Lines that the reader was told of, and when they ended; those of the last seconds."""
        self._progress: BatchProgress | None = None

    async def chunks(self) -> AsyncGenerator[bytes]:
        """The stream's bytes."""
        yield b"retry: %d\n\n" % RETRY_MILLISECONDS
        heartbeat = self._services.settings.heartbeat_seconds
        spoke = time.monotonic()
        while not self._services.hub.closing:
            # First where it stands, then what has ended: at the end no line is left out.
            try:
                view = await self._look()
                async for chunk in self._news():
                    yield chunk
                    spoke = time.monotonic()
            except Unavailable:
                view = None
            if view is not None and (chunk := self._standing(view)):
                yield chunk
                spoke = time.monotonic()
            if view is not None and view.state is not BatchState.RUNNING:
                return
            if time.monotonic() - spoke >= heartbeat:
                yield b":\n\n"
                spoke = time.monotonic()
            await asyncio.sleep(LOOK_SECONDS)

    async def _look(self) -> BatchView:
        found = await self._services.sessions.read(batches.find, self._batch.id)
        # One that was undone half recorded is there no more: it has nothing to wait for.
        self._batch = found or self._batch
        view = await self._services.sessions.read(batches.view, self._batch)
        return view if found else msgspec.structs.replace(view, state=BatchState.CANCELLED)

    async def _news(self) -> AsyncGenerator[bytes]:
        since = max(0.0, self._since - OVERLAP_SECONDS)
        limit = PAGE + len(self._told)
        while True:
            ended = await self._services.sessions.read(
                batches.ended_since, self._batch.id, since, limit
            )
            parts = []
            for line, at in ended:
                if line.line not in self._told and line.job is not None and line.state is not None:
                    self._told[line.line] = at
                    self._since = max(self._since, at)
                    event = LineEnded(
                        line=line.line,
                        job=line.job,
                        state=line.state,
                        cached=line.cached,
                        repeats=line.repeats,
                        problem=line.problem,
                    )
                    parts.append(self._block(event, f"{at:.6f}"))
            if parts:
                yield b"".join(parts)
            if len(ended) < limit:
                break
            # Many may have ended in the same moment: the page grows until it leaves that behind.
            if ended[-1].at > since:
                since = ended[-1].at
            else:
                limit *= 2
        old = self._since - 2 * OVERLAP_SECONDS
        self._told = {line: at for line, at in self._told.items() if at > old}

    def _standing(self, view: BatchView) -> bytes:
        counts = view.counts
        if view.state is not BatchState.RUNNING:
            return self._block(BatchEnded(state=view.state, counts=counts), END)
        progress = BatchProgress(total=counts.total, done=counts.done, counts=counts)
        if progress == self._progress:
            return b""
        self._progress = progress
        return self._block(progress, f"{self._since:.6f}")

    def _block(self, event: BatchEvent, event_id: str) -> bytes:
        return block(event, event_id, "batch", self._batch.id)


def block(event: msgspec.Struct, event_id: str, noun: str, owner: UUID) -> bytes:
    """An event as it goes out, saying whose it is."""
    data = msgspec.json.encode(event)
    config: object = event.__struct_config__
    name = str(getattr(config, "tag", ""))
    return b'id: %b\nevent: %b\ndata: {"%b":"%b",%b\n\n' % (
        event_id.encode(),
        name.encode(),
        noun.encode(),
        str(owner).encode(),
        data[1:],
    )
