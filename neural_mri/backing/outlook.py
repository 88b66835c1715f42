"""How long a job will wait, as far as anybody can tell: a queue's line, and the pace at which it moves.

The pace is measured: a line fitted to how long the queue's last jobs took against what they were estimated
to cost; jobs that were claimed together share the time they took together. Nothing is foretold of jobs that will come and have a better turn, nor of other models that share a
worker.
"""

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import NamedTuple, Self
from uuid import UUID

from sqlalchemy import bindparam, select
from sqlalchemy.orm import Session

from neural_mri.backing import keys
from neural_mri.backing.database import epoch
from neural_mri.backing.records import AnyRow, Job
from neural_mri.backing.rows import JOBS
from neural_mri.contract.jobs import JobKind, JobState, QueuePlace

__all__ = ("Line", "Pace", "line", "loading_seconds")

MEASURED = 64
"""So many of a queue's last jobs say how quick it is."""

_job = JOBS.c
_OF_QUEUE = _job.queue == bindparam("name")

_WAITING = (
    select(_job.id, _job.virtual_start, _job.estimated_cost)
    .where(
        _OF_QUEUE,
        _job.finished_at.is_(None),
        _job.state == JobState.QUEUED,
        _job.leader.is_(None),
    )
    .order_by(_job.virtual_start, _job.id)
)
_HELD = select(
    _job.estimated_cost, _job.started_at, (epoch() - _job.started_at).label("seconds")
).where(_OF_QUEUE, _job.lease_owner.is_not(None))
_LASTED = (
    select(
        _job.estimated_cost,
        _job.started_at,
        (_job.finished_at - _job.started_at).label("seconds"),
    )
    .where(
        _OF_QUEUE,
        _job.finished_at.is_not(None),
        _job.state == JobState.SUCCEEDED,
        _job.started_at.is_not(None),
    )
    .order_by(_job.finished_at.desc())
    .limit(MEASURED)
)
_LOADED = (
    select(
        _job.finished_at.is_(None).label("is_now"),
        (epoch() - _job.started_at).label("since"),
        (_job.finished_at - _job.started_at).label("seconds"),
    )
    .where(
        _job.queue == keys.CONTROL_QUEUE,
        _job.kind == JobKind.LOAD,
        _job.revision == bindparam("weights"),
        _job.started_at.is_not(None),
        _job.state.in_([JobState.SUCCEEDED, JobState.LOADING, JobState.RUNNING]),
    )
    .order_by(_job.created_at.desc())
    .limit(MEASURED)
)


class Pace(NamedTuple):
    """How long a job holds a worker: seconds a job, and seconds a unit of its estimated cost."""

    seconds_a_job: float
    seconds_a_unit: float

    @classmethod
    def of(cls, lasted: Sequence[tuple[float, float]]) -> Self | None:
        """Fitted to pairs of cost and seconds by least squares, neither part below 0; None of none."""
        if not lasted:
            return None
        count = len(lasted)
        mean_cost = sum(cost for cost, _ in lasted) / count
        mean_seconds = sum(seconds for _, seconds in lasted) / count
        spread = sum((cost - mean_cost) ** 2 for cost, _ in lasted)
        slope = (
            sum((cost - mean_cost) * (seconds - mean_seconds) for cost, seconds in lasted) / spread
            if spread > 0
            else 0.0
        )
        if slope <= 0:
            return cls(mean_seconds, 0.0)
        constant = mean_seconds - slope * mean_cost
        if constant < 0:
            # Through the origin instead: seconds in proportion to cost.
            squares = sum(cost**2 for cost, _ in lasted)
            return cls(0.0, sum(cost * seconds for cost, seconds in lasted) / squares)
        return cls(constant, slope)

    def seconds(self, cost: float, jobs: int = 1) -> float:
        """How long jobs of so much cost in all will hold one worker."""
        return jobs * self.seconds_a_job + cost * self.seconds_a_unit


class Batch(NamedTuple):
    """Jobs that were claimed together."""

    costs: tuple[float, ...]
    seconds: float
    """How long the last of them took, or all have been held so far."""

    @property
    def cost(self) -> float:
        """Of all of them."""
        return sum(self.costs)

    def shares(self) -> list[tuple[float, float]]:
        """Each one's cost, and its part of the time."""
        return [(cost, self.seconds * cost / self.cost) for cost in self.costs]


class Line(NamedTuple):
    """A queue at one moment."""

    turns: tuple[tuple[float, UUID], ...]
    """Who waits, in fair order."""
    places: dict[UUID, int]
    cost_before: tuple[float, ...]
    """Of all who stand before each of them, and of all."""
    held: tuple[Batch, ...]
    pace: Pace | None

    def place(self, job: Job, *, workers: int | None, ready_in: float | None) -> QueuePlace:
        """Where a waiting job stands; when it starts, where that can be told.

        `ready_in` is when workers will hold its model, in seconds.
        """
        ahead = self.places.get(job.source)
        if ahead is None:
            ahead = bisect_left(self.turns, (job.virtual_start, job.id))
        seconds = None
        if workers and ready_in is not None:
            busy = self._work_before(ahead)
            seconds = None if busy is None else round(ready_in + busy / workers, 3)
        return QueuePlace(position=ahead + 1, estimated_start_seconds=seconds)

    def _work_before(self, ahead: int) -> float | None:
        """Seconds of one worker's time before somebody's turn; None where no pace was ever measured."""
        if ahead == 0 and not self.held:
            return 0.0
        if self.pace is None:
            return None
        left = (
            max(0.0, self.pace.seconds(batch.cost, len(batch.costs)) - batch.seconds)
            for batch in self.held
        )
        return sum(left) + self.pace.seconds(self.cost_before[ahead], ahead)


def _batches(rows: Iterable[AnyRow]) -> list[Batch]:
    """Jobs of one claim begin at the same millisecond."""
    together: defaultdict[float, list[AnyRow]] = defaultdict(list)
    for row in rows:
        together[round(row.started_at, 3)].append(row)
    return [
        Batch(tuple(row.estimated_cost for row in batch), max(row.seconds for row in batch))
        for batch in together.values()
    ]


def line(session: Session, queue: str) -> Line:
    """A queue as it stands."""
    run = session.connection().execute
    name = {"name": queue}
    waiting = run(_WAITING, name).all()
    lasted = [share for batch in _batches(run(_LASTED, name)) for share in batch.shares()]
    return Line(
        turns=tuple((row.virtual_start, row.id) for row in waiting),
        places={row.id: place for place, row in enumerate(waiting)},
        cost_before=tuple(accumulate((row.estimated_cost for row in waiting), initial=0.0)),
        held=tuple(_batches(run(_HELD, name))),
        pace=Pace.of(lasted),
    )


class _Load(NamedTuple):
    is_now: bool
    since: float
    seconds: float | None


def loading_seconds(session: Session, revision: str) -> float | None:
    """How long until weights that are being loaded will be there; None where it was never measured."""
    rows = session.connection().execute(_LOADED, {"weights": revision})
    loads = [_Load(row.is_now, row.since, row.seconds) for row in rows]
    lasted = [load.seconds for load in loads if load.seconds is not None]
    if not lasted:
        return None
    typical = sum(lasted) / len(lasted)
    since = min((load.since for load in loads if load.is_now), default=0.0)
    return max(0.0, typical - since)
