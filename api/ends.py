"""Which jobs have just ended, for requests that wait for one and for nothing else.

Every process that tells of a job's end says its id on one channel too. Whoever waits for an end so reads
neither the frames before it nor a stream of its own. A word that is lost costs time, not the end: those who
wait ask the database now and then.
"""

import asyncio
import math
import time
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any
from uuid import UUID

import redis.asyncio
import structlog
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from api.cancellation import cancelled
from neural_mri.backing import keys
from neural_mri.backing.broker import AWAY
from neural_mri.backing.settings import Settings

__all__ = ("Ends", "Wait")

ANSWER_SECONDS = 5.0
"""How long a server may leave a connection without an answer."""
AWAY_SECONDS = 0.2
REMEMBERED = 10_000
"""Ends that have been heard, remembered for who begins to wait when one has just been told."""

log = structlog.get_logger(__name__)


class Wait:
    """One request's wait for the first of some jobs to end."""

    def __init__(self, waiting: dict[UUID, set["Wait"]]) -> None:
        self._waiting = waiting
        self._woken = asyncio.Event()
        self.job_ids: set[UUID] = set()

    def add(self, *job_ids: UUID) -> None:
        """Wait for these too."""
        for job_id in job_ids:
            self.job_ids.add(job_id)
            self._waiting.setdefault(job_id, set()).add(self)

    def wake(self) -> None:
        """Make `pause` return."""
        self._woken.set()

    async def pause(self, seconds: float) -> None:
        """Until one has ended, or for so long."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._woken.wait()
        self._woken.clear()

    def leave(self) -> None:
        """Wait no more."""
        for job_id in self.job_ids:
            waits = self._waiting[job_id]
            waits.discard(self)
            if not waits:
                del self._waiting[job_id]


class Ends:
    """The process's one ear for ends."""

    def __init__(self, settings: Settings) -> None:
        self._url = settings.effective_redis_url
        self._waiting: dict[UUID, set[Wait]] = {}
        self._task: asyncio.Task[None] | None = None
        self._heard_since = math.inf
        """Since when every end has been heard, on the monotonic clock; infinite while none is."""
        self._heard: OrderedDict[UUID, float] = OrderedDict()
        """Jobs whose ends were heard, and when."""

    @property
    def is_heard(self) -> bool:
        """Whether an end that comes now would be heard."""
        return self._heard_since < math.inf

    def nothing_since(self, moment: float, *job_ids: UUID) -> bool:
        """Whether these jobs have certainly not ended since then, on the monotonic clock."""
        oldest = next(iter(self._heard.values()), math.inf)
        is_remembered = len(self._heard) < REMEMBERED or oldest < moment
        has_listened = self._heard_since <= moment and is_remembered
        return has_listened and not any(job_id in self._heard for job_id in job_ids)

    def start(self) -> None:
        """Begin to listen."""
        self._task = asyncio.create_task(self._listen())

    async def stop(self) -> None:
        """Stop listening."""
        if self._task is not None:
            await cancelled(self._task)

    @contextmanager
    def waiting(self) -> Iterator[Wait]:
        """A wait, for as long as the block runs."""
        wait = Wait(self._waiting)
        try:
            yield wait
        finally:
            wait.leave()

    def wake_all(self) -> None:
        """Let everybody look for themselves."""
        for waits in tuple(self._waiting.values()):
            for wait in tuple(waits):
                wait.wake()

    async def _listen(self) -> None:
        while True:
            client = redis.asyncio.Redis.from_url(
                self._url,
                socket_connect_timeout=1.0,
                socket_timeout=2 * ANSWER_SECONDS,
                health_check_interval=ANSWER_SECONDS,
                retry=Retry(NoBackoff(), 0),
            )
            try:
                async with client.pubsub() as channel:
                    await channel.subscribe(keys.ENDED)
                    while True:
                        self._hear(await channel.get_message(timeout=ANSWER_SECONDS))
            except AWAY as error:
                if self.is_heard:
                    log.warning("ends_unheard", error=str(error))
                self._heard_since = math.inf
                self.wake_all()
            finally:
                with suppress(*AWAY):
                    await client.aclose()
            await asyncio.sleep(AWAY_SECONDS)

    def _hear(self, message: dict[str, Any] | None) -> None:
        if message is None:
            return
        if message["type"] == "subscribe":
            self._heard_since = time.monotonic()
            self.wake_all()
        elif message["type"] == "message" and len(message["data"]) == 16:
            ended = UUID(bytes=message["data"])
            self._heard[ended] = time.monotonic()
            if len(self._heard) > REMEMBERED:
                self._heard.popitem(last=False)
            for wait in self._waiting.get(ended, ()):
                wait.wake()
