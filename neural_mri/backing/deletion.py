"""Jobs that are wanted no more: deleted, and what only they needed taken away.

Pure SQL on the caller's transaction. A job goes in one transaction, its result later: what it leaves is noted
where it stood (`discards`), and the reaper takes away what no job names any more, once nobody can still be
reading it. A result that several jobs name goes with the last of them.

Nobody is answered with a result that is about to go. Whoever is answered with a known one names it while a job
that names it stands: on SQLite transactions that write come one after another, on PostgreSQL such a job is
locked until the new one is there (`jobs.submit`). So a result that no job names is never named again.

What a session keeps are copies. What a day's limit counts stays counted.
"""

from collections.abc import Collection, Iterator, Sequence
from typing import NamedTuple
from uuid import UUID

import msgspec
from sqlalchemy import (
    Double,
    Integer,
    Select,
    Uuid,
    bindparam,
    delete,
    exists,
    func,
    insert,
    literal,
    select,
    update,
)
from sqlalchemy.orm import Session

from neural_mri.backing import keys, leftovers
from neural_mri.backing.database import epoch
from neural_mri.backing.keys import Attempt
from neural_mri.backing.limits import CHARGED, DAY_SECONDS
from neural_mri.backing.rows import (
    BATCH_LINES,
    BATCHES,
    DISCARDS,
    IDEMPOTENCY_KEYS,
    JOBS,
    SESSION_ARRIVALS,
    SPENT,
)
from neural_mri.contract.jobs import JobKind
from neural_mri.contract.problems import Conflict, Gone, UnknownJob

__all__ = (
    "LINGER_SECONDS",
    "MOST_DELETED",
    "Discard",
    "JobDeleted",
    "JobUnderWay",
    "batches_by_age",
    "by_age",
    "clock",
    "delete_job",
    "discarded",
    "settle",
    "unneeded",
)

MOST_DELETED = 200
"""Jobs deleted in one transaction, and results taken away at once: in between others have their turn."""
LINGER_SECONDS = 600.0
"""How long a result stays after its last job: who has begun to read it goes on."""

_job = JOBS.c
_line = BATCH_LINES.c
_batch = BATCHES.c
_discard = DISCARDS.c
_spent = SPENT.c

_IS_OLD = _job.finished_at < epoch() - bindparam("older", type_=Double)
_OLD = (
    select(_job.id)
    .where(
        _job.queue == bindparam("name"),
        _IS_OLD,
        # It is about to be kept.
        _job.id.not_in(
            select(SESSION_ARRIVALS.c.job_id).where(SESSION_ARRIVALS.c.problem.is_(None))
        ),
        # It goes with its batch.
        ~exists().where(_line.job_id == _job.id),
    )
    .order_by(_job.finished_at)
    .limit(bindparam("most", type_=Integer))
    # Who is being answered with its result just now is not stood in the way of.
    .with_for_update(skip_locked=True)
)
"""Parameters: name, older, most."""
_NEXT_QUEUE = select(func.min(_job.queue)).where(_job.queue > bindparam("last"))
_OLD_BATCHES = (
    select(_batch.id)
    .where(
        _batch.created_at < epoch() - bindparam("older", type_=Double),
        _batch.fed_at.is_not(None),
        ~exists().where(
            _line.batch_id == _batch.id,
            _job.id == _line.job_id,
            func.coalesce(_job.finished_at, epoch()) >= epoch() - bindparam("older", type_=Double),
        ),
    )
    .order_by(_batch.created_at)
    .limit(bindparam("most", type_=Integer))
    .with_for_update(skip_locked=True)
)
"""Parameters: older, most."""


class JobUnderWay(Conflict):
    """The job has not ended."""


class JobDeleted(Gone):
    """The job has been deleted."""


class Discard(NamedTuple):
    """What a deleted job may have left in the store."""

    id: UUID
    """The job's."""
    work: UUID
    """The id under which workers knew it."""
    attempts: int
    manifest: str | None
    scan_key: str | None

    @property
    def results(self) -> tuple[tuple[Attempt, str], ...]:
        """Where something may be, and whose it is: its result, and what lost attempts left."""
        lost = (Attempt(self.work, number) for number in range(1, self.attempts + 1))
        found = {path: attempt for attempt in lost for path in attempt.results}
        own = None if self.manifest is None else keys.attempt_of(self.manifest)
        if self.manifest is not None and own is not None:
            # An attempt leaves one result.
            found = {path: attempt for path, attempt in found.items() if attempt != own}
            found[self.manifest] = own
        return tuple((attempt, path) for path, attempt in found.items())


def delete_job(session: Session, job_id: UUID) -> bool:
    """Delete a job that has ended; whether its events are told of another job as well, which followed it.

    Raises `UnknownJob`, and `JobUnderWay` where it has not.
    """
    locked = select(_job.id, _job.owner, _job.state, _job.finished_at).where(_job.id == job_id)
    row = session.connection().execute(locked.with_for_update()).one_or_none()
    if row is None:
        raise UnknownJob(f"there is no job {job_id}", job=str(job_id))
    if row.finished_at is None:
        raise JobUnderWay(
            f"job {job_id} is {row.state.value}: only a job that has ended can be deleted; cancel it first",
            job=str(job_id),
            state=row.state.value,
        )
    _tell_lines(session, job_id)
    word = IDEMPOTENCY_KEYS.c
    run = session.connection().execute
    # Sent again, the request is a new one.
    run(delete(IDEMPOTENCY_KEYS).where(word.owner == row.owner, word.job_id == job_id))
    run(delete(SPENT).where(_spent.owner == row.owner, _spent.finished_at < epoch() - DAY_SECONDS))
    _delete(session, [job_id])
    followed = select(_job.id).where(_job.leader == job_id).limit(1)
    return run(followed).one_or_none() is not None


def _tell_lines(session: Session, job_id: UUID) -> None:
    """Have lines of batches say what has become of their job."""
    gone = JobDeleted(f"job {job_id} has been deleted, and its result with it", job=str(job_id))
    said = msgspec.json.encode(gone.document()).decode()
    lines = update(BATCH_LINES).where(_line.job_id == job_id).values(problem=said)
    session.connection().execute(lines)


def by_age(session: Session, *, older_seconds: float, most: int = MOST_DELETED) -> int:
    """Delete some of the jobs that ended so long ago, the oldest of each queue first; how many they were.

    Jobs of a batch stay as long as the batch, and one that a session waits for until it is there.
    """
    run = session.connection().execute
    count = 0
    for queue in _queues(session):
        wanted = {"name": queue, "older": older_seconds, "most": most - count}
        count += _delete(session, run(_OLD, wanted).scalars().all())
        if count >= most:
            break
    return count


def _queues(session: Session) -> Iterator[str]:
    """Every queue that some job was for, one after another: an index has each queue's jobs in order.

    Their clocks name not all: one whose only jobs were cancelled while they waited for room has none.
    """
    last = ""
    run = session.connection().execute
    while (found := run(_NEXT_QUEUE, {"last": last}).scalar()) is not None:
        yield (last := found)


def batches_by_age(session: Session, *, older_seconds: float, most: int = 1) -> int:
    """Forget batches all of whose jobs ended so long ago; how many they were. Their jobs are `by_age`'s then."""
    run = session.connection().execute
    old = run(_OLD_BATCHES, {"older": older_seconds, "most": most}).scalars().all()
    if old:
        run(delete(BATCH_LINES).where(_line.batch_id.in_(old)))
        run(delete(BATCHES).where(_batch.id.in_(old)))
    return len(old)


def _delete(session: Session, job_ids: Sequence[UUID]) -> int:
    """Delete jobs that have ended, whose rows are locked."""
    if not job_ids:
        return 0
    run = session.connection().execute
    chosen = _job.id.in_(job_ids)
    left = select(
        _job.id,
        func.coalesce(_job.leader, _job.id, type_=Uuid()),
        _job.attempt,
        _job.manifest,
        _job.scan_key,
        epoch(),
    ).where(chosen, _job.kind == literal(JobKind.SCAN, _job.kind.type))
    run(
        insert(DISCARDS).from_select(
            ("id", "work", "attempts", "manifest", "scan_key", "deleted_at"),
            left.where((_job.attempt > 0) | _job.manifest.is_not(None)),
        )
    )
    charged = select(_job.id, _job.owner, _job.finished_at, CHARGED).where(
        chosen, _job.started_at.is_not(None), _job.finished_at > epoch() - DAY_SECONDS
    )
    run(insert(SPENT).from_select(("id", "owner", "finished_at", "seconds"), charged))
    count: int = run(delete(JOBS).where(chosen)).rowcount
    return count


def clock(session: Session) -> float:
    """What time it is, as jobs' ages are told by it."""
    now: float = session.connection().execute(select(epoch())).scalar_one()
    return now


# What they have left


def discarded(
    session: Session, *, older_seconds: float = LINGER_SECONDS, most: int = MOST_DELETED
) -> list[Discard]:
    """What some jobs have left that were deleted so long ago, those that were first."""
    wanted: Select[tuple[UUID, UUID, int, str | None, str | None]] = (
        select(_discard.id, _discard.work, _discard.attempts, _discard.manifest, _discard.scan_key)
        .where(
            (_discard.deleted_at < epoch() - older_seconds)
            # By a clock that was wrong: else it would wait until that time comes.
            | (_discard.deleted_at > epoch() + DAY_SECONDS)
        )
        .order_by(_discard.deleted_at)
        .limit(most)
    )
    rows = session.connection().execute(wanted)
    return [Discard(**row._asdict()) for row in rows]


class Unneeded(NamedTuple):
    """What may be taken away, and what of it is seen to then."""

    results: tuple[str, ...]
    discards: tuple[UUID, ...]
    """Of the others somebody still holds an attempt: what becomes of that is not known yet."""


def unneeded(session: Session, discards: Collection[Discard]) -> Unneeded:
    """Those results that no job names, and that none ever will. In a transaction that sees one state."""
    known = leftovers.works(
        session,
        {attempt.job_id for each in discards for attempt, _ in each.results},
        (path for each in discards for _, path in each.results),
        (each.scan_key for each in discards if each.scan_key is not None),
    )
    settled = tuple(
        each for each in discards if not any(attempt in known.held for attempt, _ in each.results)
    )
    return Unneeded(
        tuple(
            path
            for each in settled
            for attempt, path in each.results
            if not known.need(attempt, path)
        ),
        tuple(each.id for each in settled),
    )


def settle(session: Session, discards: Collection[UUID]) -> None:
    """What jobs have left has been seen to."""
    session.connection().execute(delete(DISCARDS).where(_discard.id.in_(discards)))
