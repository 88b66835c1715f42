"""From the lines of a batch to its jobs: as many as there is room for, the others as room comes.

A batch is one ask, however many scans it has, and is accepted as one; what limits are about is how many jobs
stand in the queues at once. A line that waits for room holds what its job is to be made of. Lines are fed in
order, and of a batch only once all of them are recorded: of half a batch nothing runs. Whoever has recorded it
feeds what there is room for; from then on the reaper does.

Pure SQL on the caller's transaction.
"""

from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple
from uuid import UUID

import msgspec
from sqlalchemy import bindparam, func, select, update
from sqlalchemy.orm import Session

from neural_mri.backing import jobs, limits
from neural_mri.backing.database import epoch
from neural_mri.backing.limits import NO_LIMITS, Limits
from neural_mri.backing.records import Submission
from neural_mri.backing.rows import BATCH_LINES, BATCHES
from neural_mri.contract.jobs import Lane
from neural_mri.contract.problems import TooMany

__all__ = ("MOST_WAITING", "Fed", "cancel_unfed", "check_waiting", "feed", "kept", "owners_waiting")

FED_SHARE = 0.75
"""How much of a limit batches may fill: the rest is left to what the same people ask for one by one."""
FED_AT_ONCE = 500
"""Lines in one transaction: in between others have their turn."""
MOST_WAITING = 100_000
"""Lines of one owner that wait for room: each holds a request."""

_batch = BATCHES.c
_line = BATCH_LINES.c
_submission = msgspec.json.Decoder(Submission)

_IS_WAITING = _line.wanted.is_not(None)
_IS_UNFED = _batch.fed_at.is_(None) & _batch.filled_at.is_not(None) & _batch.stopped_at.is_(None)
_NEXT = (
    select(_batch.id)
    .where(_batch.owner == bindparam("who"), _IS_UNFED)
    .order_by(_batch.lane != Lane.INTERACTIVE, _batch.created_at, _batch.id)
    .limit(1)
    .with_for_update()
)
_WAITING = (
    select(_line.line, _line.wanted)
    .where(_line.batch_id == bindparam("batch"), _IS_WAITING)
    .order_by(_line.line)
)
_NAME = (
    update(BATCH_LINES)
    .where(_line.batch_id == bindparam("batch"), _line.line == bindparam("number"))
    .values(job_id=bindparam("made"), wanted=None)
)


class Fed(NamedTuple):
    """What was fed at once."""

    lines: int
    queued: Counter[str]
    """New jobs that wait, by queue."""


def kept(submission: Submission) -> str:
    """A job to be, as its line holds it."""
    return msgspec.json.encode(submission).decode()


def check_waiting(session: Session, owner: str, lines: int) -> None:
    """Whether so many lines more may wait. Raises `TooMany`."""
    counted = (
        select(func.count())
        .select_from(BATCH_LINES.join(BATCHES, _batch.id == _line.batch_id))
        .where(_batch.owner == owner, _batch.fed_at.is_(None), _IS_WAITING)
    )
    waiting: int = session.connection().execute(counted).scalar_one()
    if waiting + lines > MOST_WAITING:
        raise TooMany(
            f"{waiting} lines of your batches wait for room, {MOST_WAITING} may: there is no room for "
            f"{lines} more; try again when some have begun",
            waiting=waiting,
            limit=MOST_WAITING,
        )


def owners_waiting(session: Session) -> list[str]:
    """Whose batches have lines that wait for room."""
    return list(
        session.connection().execute(select(_batch.owner).where(_IS_UNFED).distinct()).scalars()
    )


def feed(session: Session, owner: str, *, max_queued: int, usual: Limits = NO_LIMITS) -> Fed:
    """Submit the next lines of an owner's batches for which there is room, and such as cost nothing.

    Raises `TooMany` where others took the room meanwhile: then none is submitted.
    """
    run = session.connection().execute
    batch_id: UUID | None = run(_NEXT, {"who": owner}).scalar_one_or_none()
    if batch_id is None:
        return Fed(0, Counter())
    rows = run(_WAITING.limit(FED_AT_ONCE), {"batch": batch_id}).all()
    if not rows:
        run(update(BATCHES).where(_batch.id == batch_id).values(fed_at=epoch()))
        return feed(session, owner, max_queued=max_queued, usual=usual)
    waiting = {row.line: _submission.decode(row.wanted) for row in rows}
    known = jobs.known_results(
        session, {each.scan_key for each in waiting.values() if each.scan_key}
    )
    room = _room(session, owner, max_queued, usual)
    chosen: dict[int, Submission] = {}
    for line, submission in waiting.items():
        if submission.scan_key in known:
            chosen[line] = submission
        elif room > 0:
            chosen[line] = submission
            room -= 1
    if not chosen:
        return Fed(0, Counter())
    made = jobs.submit_many(session, list(chosen.values()), max_queued=max_queued, usual=usual)
    _name(session, batch_id, {line: each.job_id for line, each in zip(chosen, made, strict=True)})
    queued = Counter(
        submission.queue
        for submission, each in zip(chosen.values(), made, strict=True)
        if not each.cached
    )
    return Fed(len(chosen), queued)


def _room(session: Session, owner: str, max_queued: int, usual: Limits) -> int:
    """How many jobs more batches of the owner may have in the queues now."""
    room = _share(max_queued) - jobs.unfinished(session)
    if usual is not NO_LIMITS:
        own = limits.room(session, owner, usual, FED_SHARE)
        room = room if own is None else min(room, own)
    return room


def _share(limit: int) -> int:
    return max(1, int(limit * FED_SHARE))


def _name(session: Session, batch_id: UUID, made: Mapping[int, UUID]) -> None:
    """Have lines, and those that repeat them, name the jobs that they became."""
    run = session.connection().execute
    repeating = select(_line.line, _line.repeats).where(
        _line.batch_id == batch_id, _line.repeats.in_(tuple(made))
    )
    named = dict(made) | {row.line: made[row.repeats] for row in run(repeating)}
    run(
        _NAME,
        [{"batch": batch_id, "number": number, "made": job_id} for number, job_id in named.items()],
    )


def cancel_unfed(session: Session, batch_id: UUID) -> int:
    """Have each line that waits for room become a job that is cancelled already; how many they were."""
    rows = session.connection().execute(_WAITING, {"batch": batch_id}).all()
    if rows:
        made = jobs.add_cancelled(session, [_submission.decode(row.wanted) for row in rows])
        for some in range(0, len(rows), FED_AT_ONCE):
            chunk = slice(some, some + FED_AT_ONCE)
            lines = [row.line for row in rows[chunk]]
            _name(session, batch_id, dict(zip(lines, made[chunk], strict=True)))
    return len(rows)
