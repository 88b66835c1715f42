"""From the lines of a batch to its jobs: as many as there is room for, the others as room comes.

A batch is one ask, however many scans it has, and is accepted as one; what limits are about is how many jobs
stand in the queues at once. A line that waits for room holds what its job is to be made of, and the id that it
will have. Lines are fed in order, and of a batch only once all of them are recorded: of half a batch nothing runs.
Those of a batch that has been stopped become jobs that are cancelled already, so that each line has one. Whoever has
recorded the batch feeds what there is room for, and all whose results are known; from then on the reaper does.

Pure SQL on the caller's transaction.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import NamedTuple
from uuid import UUID

import msgspec
from sqlalchemy import Integer, bindparam, func, select, update
from sqlalchemy.orm import Session

from neural_mri.backing import jobs, limits
from neural_mri.backing.database import epoch
from neural_mri.backing.limits import NO_LIMITS, Limits
from neural_mri.backing.records import Submission
from neural_mri.backing.rows import BATCH_LINES, BATCHES, JOBS
from neural_mri.contract.jobs import Lane
from neural_mri.contract.problems import TooMany, Unprocessable

__all__ = (
    "FED_AT_ONCE",
    "MOST_WAITING",
    "Fed",
    "check_waiting",
    "feed",
    "feed_known",
    "kept",
    "owners_waiting",
)

FED_SHARE = 0.75
"""How much of a limit batches may fill: the rest is left to what the same people ask for one by one."""
FED_AT_ONCE = 500
"""Lines in one transaction: in between others have their turn."""
MOST_WAITING = 100_000
"""Lines of one owner that wait for room: each holds a request."""

_batch = BATCHES.c
_line = BATCH_LINES.c
_job = JOBS.c
_submission = msgspec.json.Decoder(Submission)

_IS_WAITING = _line.wanted.is_not(None)
_IS_UNFED = _batch.fed_at.is_(None) & _batch.filled_at.is_not(None)
_NEXT = (
    select(_batch.id, _batch.stopped_at)
    .where(_batch.owner == bindparam("who"), _IS_UNFED)
    # To cancel takes no room.
    .order_by(
        _batch.stopped_at.is_(None), _batch.lane != Lane.INTERACTIVE, _batch.created_at, _batch.id
    )
    .limit(1)
    .with_for_update()
)
_GOES_ON = (
    select(_batch.id)
    .where(_batch.id == bindparam("batch"), _IS_UNFED, _batch.stopped_at.is_(None))
    .with_for_update()
)
_WAITING = (
    select(_line.line, _line.job_id, _line.wanted)
    .where(
        _line.batch_id == bindparam("batch"),
        _line.line > bindparam("after", type_=Integer),
        _IS_WAITING,
    )
    .order_by(_line.line)
    .limit(FED_AT_ONCE)
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
    """Whose batches have lines that wait for room; first who has the fewest jobs under way.

    In that order they get the same of what the service has room for, however much one of them waits for.
    """
    under_way = (
        select(func.count())
        .where(_job.owner == _batch.owner, _job.finished_at.is_(None))
        .scalar_subquery()
    )
    wanted = select(_batch.owner).where(_IS_UNFED).group_by(_batch.owner)
    return list(session.connection().execute(wanted.order_by(under_way, _batch.owner)).scalars())


def feed(session: Session, owner: str, *, max_queued: int, usual: Limits = NO_LIMITS) -> Fed:
    """Submit the next lines of an owner's batches for which there is room, and such as cost nothing among them.

    Raises `TooMany` where others took the room meanwhile: then none is submitted.
    """
    run = session.connection().execute
    batch = run(_NEXT, {"who": owner}).one_or_none()
    if batch is None:
        return Fed(0, Counter())
    room = _room(session, owner, max_queued, usual)
    if batch.stopped_at is None and room <= 0:
        return Fed(0, Counter())  # before any line is read: many wait, and it is asked often
    waiting = _waiting(session, batch.id)
    if not waiting:
        run(update(BATCHES).where(_batch.id == batch.id).values(fed_at=epoch()))
        return feed(session, owner, max_queued=max_queued, usual=usual)
    if batch.stopped_at is not None:
        jobs.add_cancelled(session, dict(waiting.values()))
        _settle(session, batch.id, waiting)
        return Fed(len(waiting), Counter())
    chosen = _chosen(session, waiting, room)
    return Fed(len(chosen), _submit(session, batch.id, chosen, max_queued, usual))


def feed_known(
    session: Session, batch_id: UUID, after: int, *, max_queued: int, usual: Limits = NO_LIMITS
) -> int | None:
    """Submit, of a batch's next lines that wait, those whose results are known: they take no room.

    However many lines before them wait, and whatever other batches. The last line that was looked at; None
    at the end. Raises as `feed` does.
    """
    if session.connection().execute(_GOES_ON, {"batch": batch_id}).one_or_none() is None:
        return None
    waiting = _waiting(session, batch_id, after)
    _submit(session, batch_id, _chosen(session, waiting, 0), max_queued, usual)
    return max(waiting, default=None)


def _waiting(session: Session, batch_id: UUID, after: int = 0) -> "dict[int, _Promised]":
    """The next lines of a batch that wait; such as cannot be read are refused, and wait no longer."""
    found: dict[int, _Promised] = {}
    unread: dict[int, str] = {}
    while not found:
        rows = session.connection().execute(_WAITING, {"batch": batch_id, "after": after}).all()
        for row in rows:
            try:
                submission = _submission.decode(row.wanted)
                submission.batch_key(row.job_id)  # reads the scan
            except msgspec.DecodeError as error:
                unread[row.line] = str(error)
            else:
                found[row.line] = _Promised(row.job_id, submission)
        if not rows:
            break
        after = rows[-1].line
    for line, why in unread.items():
        _refuse(session, batch_id, line, why)
    return found


def _refuse(session: Session, batch_id: UUID, line: int, why: str) -> None:
    """Have a line, and those that repeat it, become no job: of one that runs its worker would say the same."""
    problem = Unprocessable(
        f"another release has taken this scan, and this one cannot read it: {why}; send it again"
    )
    mine = (_line.batch_id == batch_id) & ((_line.line == line) | (_line.repeats == line))
    said = msgspec.json.encode(problem.document()).decode()
    refused = update(BATCH_LINES).where(mine).values(job_id=None, wanted=None, problem=said)
    session.connection().execute(refused)


def _submit(
    session: Session,
    batch_id: UUID,
    chosen: "Mapping[int, _Promised]",
    max_queued: int,
    usual: Limits,
) -> Counter[str]:
    """Have lines become jobs; how many of them wait, by queue."""
    if not chosen:
        return Counter()
    made = jobs.submit_many(
        session,
        [each.submission for each in chosen.values()],
        max_queued=max_queued,
        usual=usual,
        job_ids=[each.job_id for each in chosen.values()],
    )
    _settle(session, batch_id, chosen)
    return Counter(
        promised.submission.queue
        for promised, each in zip(chosen.values(), made, strict=True)
        if not each.cached
    )


class _Promised(NamedTuple):
    job_id: UUID
    submission: Submission


def _chosen(session: Session, waiting: Mapping[int, _Promised], room: int) -> dict[int, _Promised]:
    """The first lines for which there is room, and those whose results are known."""
    keys = {each.submission.scan_key for each in waiting.values() if each.submission.scan_key}
    known = jobs.known_results(session, keys)
    chosen = {}
    for line, promised in waiting.items():
        if promised.submission.scan_key in known:
            chosen[line] = promised
        elif room > 0:
            chosen[line] = promised
            room -= 1
    return chosen


def _settle(session: Session, batch_id: UUID, lines: Iterable[int]) -> None:
    """Have lines wait no longer."""
    there = (_line.batch_id == batch_id) & _line.line.in_(tuple(lines))
    session.connection().execute(update(BATCH_LINES).where(there).values(wanted=None))


def _room(session: Session, owner: str, max_queued: int, usual: Limits) -> int:
    """How many jobs more batches of the owner may have in the queues now."""
    room = _share(max_queued) - jobs.unfinished(session)
    if usual is not NO_LIMITS:
        own = limits.room(session, owner, usual, FED_SHARE)
        room = room if own is None else min(room, own)
    return room


def _share(limit: int) -> int:
    return max(1, int(limit * FED_SHARE))
