"""Equal scans under way run once: the first leads, the others follow.

A follower waits in the queue's table and is never claimed. Its leader is named by the id under which a
worker knows the work. When the work succeeds, all succeed with its result, in the one transaction. When
its owner no longer wants it, a follower inherits it: the attempt under way where there is one, else the
place in the queue. When it fails, the first follower takes a turn of its own, and the others follow that
one: what failed once need not fail again.

Fairness charges who leads, and whoever takes over a place in the queue from then on.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple
from uuid import UUID

from sqlalchemy import (
    Boolean,
    Double,
    UpdateBase,
    Uuid,
    and_,
    bindparam,
    case,
    func,
    or_,
    select,
    tuple_,
    update,
)
from sqlalchemy.orm import Session

from neural_mri.backing.database import epoch
from neural_mri.backing.prepared import Prepared
from neural_mri.backing.records import LANE_WEIGHTS, AnyRow, Job
from neural_mri.backing.rows import JOBS
from neural_mri.contract.jobs import JobState

__all__ = (
    "Leader",
    "give_back",
    "heir",
    "inherit",
    "leader",
    "lift",
    "promote",
    "renew_heirs",
    "runner",
    "share",
)

_job = JOBS.c
_ended = JOBS.alias("ended").c
_UNFINISHED = _job.finished_at.is_(None)
_HELD = _job.lease_owner.is_not(None)
_FOLLOWS = and_(_job.leader == bindparam("work"), _UNFINISHED, ~_HELD)
"""Parameter: work."""

_LEADER = (
    select(
        func.coalesce(_job.leader, _job.id, type_=Uuid()).label("work"),
        _job.id,
        _job.state,
        _job.virtual_start,
    )
    .where(
        _job.scan_key == bindparam("key"),
        _UNFINISHED,
        ~_job.cancel_requested,
        or_(_job.leader.is_(None), _HELD),
    )
    .order_by(_job.id)
    .limit(1)
    # It must not end before its new follower is there to be told.
    .with_for_update()
)
_LIFT = (
    update(JOBS)
    .where(_job.id == bindparam("job_id"), _job.virtual_start > bindparam("start"))
    .values(virtual_start=bindparam("start"))
)
_FIRST = select(*_job).where(_FOLLOWS).order_by(_job.id).limit(1).with_for_update()
_HEIR = select(_job.id).where(
    _job.leader == bindparam("work"), _job.attempt == bindparam("held_attempt"), _HELD
)
_RUNNER = select(*_job).where(
    or_(
        and_(_job.id == bindparam("work"), _UNFINISHED),
        and_(_job.leader == bindparam("work"), _HELD),
    )
)
_SHARE = Prepared(
    update(JOBS)
    .where(_FOLLOWS)
    .values(
        state=bindparam("to", type_=_job.state.type),
        finished_at=epoch(),
        manifest=bindparam("path"),
        scan_key=bindparam("true_key"),
        problem=bindparam("why"),
    )
)
_LEASE = (
    select(
        _job.state,
        _job.attempt,
        _job.lease_owner,
        _job.lease_until,
        _job.started_at,
        _job.claim_share,
    )
    .where(_job.id == bindparam("job_id"), _HELD)
    .with_for_update()
)
_INHERIT = (
    update(JOBS)
    .where(_job.id == bindparam("job_id"))
    .values(
        state=bindparam("to", type_=_job.state.type),
        attempt=bindparam("held_attempt"),
        lease_owner=bindparam("holder"),
        lease_until=bindparam("until"),
        started_at=bindparam("began"),
        claim_share=bindparam("part"),
    )
)
_CEDE = update(JOBS).where(_job.id == bindparam("job_id")).values(claim_share=0.0)
_LEAD = (
    update(JOBS)
    .where(_job.id == bindparam("job_id"))
    .values(
        leader=None,
        waiting_since=case(
            (bindparam("anew", type_=Boolean), epoch()),
            else_=select(_ended.waiting_since)
            .where(_ended.id == bindparam("before"))
            .scalar_subquery(),
        ),
        virtual_start=bindparam("start"),
        virtual_finish=bindparam("finish"),
    )
)
_TURN_BACK = update(JOBS).where(_job.id == bindparam("job_id")).values(leader=None)
_FOLLOW_ANOTHER = (
    update(JOBS).where(_FOLLOWS, _job.id != bindparam("job_id")).values(leader=bindparam("job_id"))
)
_OWNER_FINISH = select(func.max(_job.virtual_finish)).where(
    _job.queue == bindparam("name"),
    _job.owner == bindparam("who"),
    _job.lane == bindparam("in_lane"),
)


class Leader(NamedTuple):
    """The work that an equal scan can follow."""

    work: UUID
    """The id under which a worker knows it, or will."""
    job_id: UUID
    """Whose job it is now."""
    is_queued: bool
    virtual_start: float


def leader(session: Session, scan_key: str) -> Leader | None:
    """The work under way for a scan key that nobody has asked to stop."""
    row = _run(session, _LEADER, key=scan_key).one_or_none()
    if row is None:
        return None
    return Leader(row.work, row.id, row.state is JobState.QUEUED, row.virtual_start)


def lift(session: Session, found: Leader, virtual_start: float) -> None:
    """Let waiting work start no later than its new follower would have: following costs nobody time."""
    if found.is_queued:
        _run(session, _LIFT, job_id=found.job_id, start=virtual_start)


def heir(session: Session, work: UUID, attempt: int) -> UUID | None:
    """The job to which an attempt under way was handed over."""
    found: UUID | None = _run(session, _HEIR, work=work, held_attempt=attempt).scalar()
    return found


def runner(session: Session, job: Job) -> Job | None:
    """The job whose attempt a follower waits for."""
    row = None if job.leader is None else _run(session, _RUNNER, work=job.leader).first()
    return None if row is None else Job.of_row(row)


def share(
    session: Session,
    work: UUID,
    to: JobState,
    *,
    manifest: str | None,
    scan_key: str | None,
    problem: str | None,
) -> None:
    """End all followers as the work ended, under the key that it has in the end."""
    end = {"path": manifest, "true_key": scan_key, "why": problem}
    _SHARE.run(session, {"work": work, "to": to, **end})


def inherit(session: Session, job: Job) -> int | None:
    """Hand the attempt that holds a job over to who has followed for longest; the attempt's number.

    None where nobody holds it, or nobody follows. The worker goes on under the id it knows: nothing is
    lost of what it has computed.
    """
    # First who is followed, then who follows: everybody locks in this order.
    row = _run(session, _LEASE, job_id=job.id).one_or_none()
    follower = None if row is None else _run(session, _FIRST, work=job.source).one_or_none()
    if row is None or follower is None:
        return None
    _run(
        session,
        _INHERIT,
        job_id=follower.id,
        to=row.state,
        held_attempt=row.attempt,
        holder=row.lease_owner,
        until=row.lease_until,
        began=row.started_at,
        part=row.claim_share,
    )
    _run(session, _CEDE, job_id=job.id)  # the attempt is charged once, to who has it in the end
    attempt: int = row.attempt
    return attempt


def give_back(session: Session, job_id: UUID, work: UUID) -> None:
    """Let an heir whose worker is lost lead under its own id."""
    _run(session, _TURN_BACK, job_id=job_id)
    _run(session, _FOLLOW_ANOTHER, work=work, job_id=job_id)


def promote(session: Session, ended: Job, *, was_held: bool) -> None:
    """Let the first follower of a job that has ended take a turn of its own, and the others follow it.

    It starts where it would have, had it not followed, or where its owner's last job of that lane ends by
    now. It waits from now on, but where nobody held the job for as long as that had waited.
    """
    work = ended.source
    row = _run(session, _FIRST, work=work).one_or_none()
    if row is None:
        return
    first = Job.of_row(row)
    finish: float | None = _run(
        session, _OWNER_FINISH, name=first.queue, who=first.owner, in_lane=first.lane
    ).scalar()
    start = first.virtual_start if finish is None else max(first.virtual_start, finish)
    cost = first.estimated_cost / LANE_WEIGHTS[first.lane]
    turn = {"start": start, "finish": start + cost}
    _run(session, _LEAD, job_id=first.id, **turn, anew=was_held, before=ended.id)
    _run(session, _FOLLOW_ANOTHER, work=work, job_id=first.id)


def renew_heirs(
    session: Session, attempts: Mapping[UUID, int], holder: str, seconds: float
) -> Sequence[AnyRow]:
    """Prolong the leases of attempts that were handed over, given by the ids their worker knows."""
    prolonged: UpdateBase = (
        update(JOBS)
        .where(
            tuple_(_job.leader, _job.attempt).in_(list(attempts.items())),
            _job.lease_owner == holder,
        )
        .values(lease_until=epoch() + bindparam("seconds", type_=Double))
        .returning(_job.leader.label("id"), _job.cancel_requested)
    )
    rows: Sequence[AnyRow] = _run(session, prolonged, seconds=seconds).all()
    return rows


def _run(session: Session, statement: Any, **parameters: Any) -> Any:
    """Run a statement on the transaction's connection, past the mapped classes."""
    return session.connection().execute(statement, parameters)
