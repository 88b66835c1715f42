"""What a waiting job is told of its wait: one look a second at a queue, however many wait in it."""

import asyncio
import time
from typing import NamedTuple

from api.residents import Holdings, holdings
from neural_mri.backing import keys, outlook
from neural_mri.backing.broker import AsyncRedis
from neural_mri.backing.database import AsyncSessions
from neural_mri.backing.outlook import Line
from neural_mri.backing.records import Job
from neural_mri.backing.residences import costs
from neural_mri.backing.settings import Settings
from neural_mri.contract.jobs import JobState, QueuePlace
from neural_mri.contract.models import ModelState

__all__ = ("Outlook",)

KEPT_SECONDS = 1.0
"""A look at a queue serves all who ask within that time."""
REMEMBERED = 256


class _Look(NamedTuple):
    at: float
    task: "asyncio.Task[_Seen]"


class _Seen(NamedTuple):
    line: Line
    workers: int | None
    """How many will serve it; None where nobody knows."""
    ready_in: float | None
    """In how many seconds; None where nobody can say."""


class Outlook:
    """Places in queues, and when jobs will start."""

    def __init__(self, settings: Settings, sessions: AsyncSessions, redis: AsyncRedis) -> None:
        self._settings = settings
        self._sessions = sessions
        self._redis = redis
        self._looks: dict[str, _Look] = {}

    async def place(self, job: Job) -> QueuePlace | None:
        """Where a job stands that waits; None for one that does not."""
        if job.state is not JobState.QUEUED:
            return None
        seen = await self._seen(job.queue, job.revision)
        return seen.line.place(job, workers=seen.workers, ready_in=seen.ready_in)

    async def _seen(self, queue: str, revision: str) -> _Seen:
        look = self._looks.get(queue)
        now = time.monotonic()
        if look is None or now - look.at > KEPT_SECONDS or _failed(look.task):
            look = _Look(now, asyncio.create_task(self._look(queue, revision)))
            self._looks.pop(queue, None)
            self._looks[queue] = look
            if len(self._looks) > REMEMBERED:
                del self._looks[next(iter(self._looks))]
        # Shielded: who goes away while the look is taken takes it from nobody else.
        return await asyncio.shield(look.task)

    async def _look(self, queue: str, revision: str) -> _Seen:
        line, held = await asyncio.gather(
            self._sessions.read(outlook.line, queue), holdings(self._redis)
        )
        if not held.is_known:
            return _Seen(line, None, None)
        if queue in (keys.CPU_QUEUE, keys.CONTROL_QUEUE):
            return _Seen(line, len(held.beats), 0.0)
        return _Seen(line, *await self._ready(revision, held))

    async def _ready(self, revision: str, held: Holdings) -> tuple[int, float | None]:
        """How many workers will serve a model, and in how many seconds; None where nobody can say."""
        workers, state = len(held.workers(revision)), held.state(revision)
        if state is ModelState.RESIDENT:
            return workers, 0.0
        cost = (await self._sessions.read(costs, self._settings.dtype)).get(revision)
        if state is ModelState.LOADING:
            seconds = await self._sessions.read(outlook.loading_seconds, revision)
            return workers, cost.load_seconds if seconds is None and cost else seconds
        if self._settings.load_on_demand and cost and held.has_room(cost.memory_bytes):
            return 1, cost.load_seconds
        # It waits for others to be let go, and nobody knows when they are.
        return 0, None


def _failed(task: "asyncio.Task[_Seen]") -> bool:
    return task.done() and (task.cancelled() or task.exception() is not None)
