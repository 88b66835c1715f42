"""What waits and what runs, by model and lane: the figures that an operator watches and scales by."""

from collections.abc import Mapping
from typing import NamedTuple

from sqlalchemy import and_, case, func, select
from sqlalchemy.orm import Session

from neural_mri.backing.database import epoch
from neural_mri.backing.rows import BATCH_LINES, BATCHES, JOBS
from neural_mri.backing.statements import WAITING_FROM
from neural_mri.contract.cluster import QueueLoad
from neural_mri.contract.jobs import HELD, JobState, Lane

__all__ = ("Standing", "loads", "standing", "version")

_job = JOBS.c
_WAITS = and_(_job.state == JobState.QUEUED, _job.leader.is_(None))


_LOADS = (
    select(
        _job.queue,
        _job.model,
        _job.lane,
        func.sum(case((_WAITS, 1), else_=0)).label("waiting"),
        func.sum(case((_job.state.in_(HELD), 1), else_=0)).label("running"),
        (epoch() - func.min(case((_WAITS, WAITING_FROM)))).label("oldest_seconds"),
    )
    .where(_job.finished_at.is_(None))
    .group_by(_job.queue, _job.model, _job.lane)
    .order_by(_job.model, _job.queue, _job.lane)
)


_WAITING_LINES = (
    select(BATCHES.c.lane, func.count().label("lines"))
    .select_from(BATCHES.join(BATCH_LINES, BATCHES.c.id == BATCH_LINES.c.batch_id))
    .where(BATCHES.c.fed_at.is_(None), BATCH_LINES.c.wanted.is_not(None))
    .group_by(BATCHES.c.lane)
)


_BUSY = select(func.count(_job.lease_owner.distinct())).where(_job.lease_owner.is_not(None))


class Standing(NamedTuple):
    """Everything that is not done yet."""

    loads: list[QueueLoad]
    lines: Mapping[Lane, int]
    """Lines of batches that wait for room in the queues, by lane: no jobs yet."""
    busy_workers: int
    """Workers that hold jobs."""


def standing(session: Session) -> Standing:
    """What stands in the queues, and what waits before them."""
    lines = {Lane(row.lane): int(row.lines) for row in session.execute(_WAITING_LINES)}
    busy: int = session.execute(_BUSY).scalar_one()
    return Standing(loads(session), {lane: lines.get(lane, 0) for lane in Lane}, busy)


def loads(session: Session) -> list[QueueLoad]:
    """Every queue that has work, a row a model and lane."""
    return [
        QueueLoad(
            queue=row.queue,
            model=row.model,
            lane=row.lane,
            waiting=int(row.waiting),
            oldest_seconds=max(0.0, row.oldest_seconds or 0.0),
            running=int(row.running),
        )
        for row in session.execute(_LOADS)
        if row.waiting or row.running
    ]


def version(session: Session) -> str:
    """The database's name and version."""
    name = session.get_bind().dialect.name
    number = func.sqlite_version() if name == "sqlite" else func.current_setting("server_version")
    said: str = session.execute(select(number)).scalar_one()
    return f"{name} {said.split(maxsplit=1)[0]}"
