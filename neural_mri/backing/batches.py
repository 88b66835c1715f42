"""Batches: made, filled, looked at, stopped.

Pure SQL on the caller's transaction. The jobs are the truth about how far a batch has come: a batch keeps no
count of its own. A line is a row, so that what was refused, and what was asked twice, stays told.

Lines are recorded some at a time, by whoever was asked for the batch: by several at once where the request was
sent again under its Idempotency-Key. They take turns by the batch's row, and each records what it does not find.
Once all are recorded they become jobs as there is room (`feeding`). A batch that is not filled was accepted by
nobody; where nobody goes on with it, it is undone.
"""

from collections.abc import Collection, Iterable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple
from uuid import UUID

import msgspec
from sqlalchemy import (
    ColumnElement,
    Integer,
    and_,
    bindparam,
    case,
    delete,
    exists,
    func,
    insert,
    or_,
    select,
    update,
)
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import Session

from neural_mri.backing import feeding, jobs
from neural_mri.backing.database import epoch
from neural_mri.backing.idempotency import REMEMBERED_SECONDS, IdempotencyKeyReused
from neural_mri.backing.jobs import Cancellation
from neural_mri.backing.records import AnyRow, Submission, new_id
from neural_mri.backing.rows import BATCH_LINES, BATCHES, JOBS
from neural_mri.contract.batches import BatchCounts, BatchLine, BatchState, BatchView
from neural_mri.contract.jobs import HELD, JobState, Lane
from neural_mri.contract.problems import ProblemDocument

__all__ = (
    "CALLER",
    "FAILED",
    "Batch",
    "EndedLine",
    "Line",
    "NewBatch",
    "Undone",
    "abandon",
    "begin",
    "cancel_held",
    "ended_since",
    "fill",
    "find",
    "lines",
    "recent",
    "stop",
    "stop_failing",
    "to_settle",
    "undo_unfilled",
    "view",
)

_batch = BATCHES.c
_line = BATCH_LINES.c
_job = JOBS.c

FAILURES = frozenset({JobState.FAILED, JobState.EXPIRED, JobState.QUARANTINED})

LONGEST_FILLING = timedelta(minutes=10)
"""Recording a batch takes seconds: whoever has not done it by then is gone, and nobody has asked again."""
UNDONE_AT_ONCE = 10

CALLER, FAILED = "caller", "failures"
"""Who stops a batch."""

_state = _job.state
_OF_BATCH = and_(_line.batch_id == bindparam("batch"), _line.repeats.is_(None))
_ITS_JOBS = BATCH_LINES.join(JOBS, _job.id == _line.job_id)
_COUNTS = (
    select(
        func.count(case((_state == JobState.QUEUED, 1))).label("queued"),
        func.count(case((_state.in_(HELD), 1))).label("running"),
        func.count(case((_state == JobState.SUCCEEDED, 1))).label("succeeded"),
        func.count(case((_state.in_(FAILURES), 1))).label("failed"),
        func.count(case((_state == JobState.CANCELLED, 1))).label("cancelled"),
        func.count(case((_job.cached, 1))).label("cached"),
    )
    .select_from(_ITS_JOBS)
    .where(_OF_BATCH)
)
_FAILED = select(func.count()).select_from(
    select(_job.id)
    .select_from(_ITS_JOBS)
    .where(_OF_BATCH, _state.in_(FAILURES))
    .limit(bindparam("most", type_=Integer))
    .subquery()
)
"""How many scans have failed, as far as it matters. Parameters: batch, most."""
_UNDER_WAY = select(
    or_(
        exists().where(_OF_BATCH, _line.wanted.is_not(None)),
        select(_job.id)
        .select_from(_ITS_JOBS)
        .where(_OF_BATCH, _job.finished_at.is_(None))
        .exists(),
    )
)
"""Whether a line waits, or a scan has not ended. Parameter: batch."""
_REPORT = select(
    func.count().label("recorded"),
    func.count(case((_line.job_id.is_(None), _line.problem))).label("refused"),
    # Whoever repeats it is counted there.
    func.count(case((_line.job_id.is_not(None) & _line.repeats.is_(None), _line.problem))).label(
        "deleted"
    ),
    func.count(_line.repeats).label("repeated"),
    func.count(_line.wanted).label("waiting"),
).where(_line.batch_id == bindparam("batch"))


class Undone(Exception):
    """The batch is not there any more: another who recorded it has given it up, or the reaper has."""


class NewBatch(NamedTuple):
    """A batch to be made."""

    owner: str
    name: str
    lane: Lane
    lines: int
    digest: str
    """Of the request."""
    max_failures: int | None = None
    word: str | None = None
    """The caller's Idempotency-Key."""


class Batch(NamedTuple):
    """A batch, without its lines."""

    id: UUID
    owner: str
    name: str
    lane: Lane
    lines: int
    max_failures: int | None
    created_at: datetime
    stopped_by: str | None
    is_filled: bool
    """Whether every line was recorded."""

    @classmethod
    def of_row(cls, row: AnyRow) -> "Batch":
        """The batch that a full row of `batches` describes."""
        return cls(
            row.id,
            row.owner,
            row.name,
            row.lane,
            row.lines,
            row.max_failures,
            datetime.fromtimestamp(row.created_at, UTC),
            row.stopped_by,
            row.filled_at is not None,
        )


class Line(NamedTuple):
    """A line to be recorded: a scan, an earlier line's scan again, or a refusal."""

    number: int
    submission: Submission | None = None
    repeats: int | None = None
    problem: ProblemDocument | None = None


def begin(session: Session, wanted: NewBatch) -> Batch:
    """Record a batch without its lines, unless its Idempotency-Key has made one: then that.

    Raises `IdempotencyKeyReused`, and `TooMany` where too many lines of its owner wait already.
    """
    run = session.connection().execute
    if wanted.word is not None:
        mine = (_batch.owner == wanted.owner) & (_batch.word == wanted.word)
        forgotten = _batch.created_at < epoch() - REMEMBERED_SECONDS
        run(update(BATCHES).where(mine, forgotten).values(word=None))
        if (known := _made_by(session, wanted)) is not None:
            return known
    feeding.check_waiting(session, wanted.owner, wanted.lines)
    is_postgresql = session.get_bind().dialect.name == "postgresql"
    insert_or = postgresql.insert if is_postgresql else sqlite.insert
    making = insert_or(BATCHES).values(
        id=new_id(),
        **wanted._asdict(),
        created_at=epoch(),
        stopped_at=None,
        ended_at=None,
        filled_at=None,
        fed_at=None,
    )
    # Of two who send the same key at once, one waits here for the other.
    making = making.on_conflict_do_nothing(index_elements=[_batch.owner, _batch.word])
    row = run(making.returning(*_batch)).one_or_none()
    made = _made_by(session, wanted) if row is None else Batch.of_row(row)
    if made is None:
        raise Undone
    return made


def _made_by(session: Session, wanted: NewBatch) -> Batch | None:
    """The batch that the Idempotency-Key has made. Raises `IdempotencyKeyReused`."""
    mine = select(*_batch).where(_batch.owner == wanted.owner, _batch.word == wanted.word)
    row = session.connection().execute(mine).one_or_none()
    if row is None:
        return None
    if row.digest != wanted.digest:
        raise IdempotencyKeyReused(
            f"the Idempotency-Key {wanted.word!r} was sent with another batch within the last "
            f"{REMEMBERED_SECONDS / 3600:.0f} hours: a new batch needs a new key",
            key=wanted.word,
            batch=str(row.id),
        )
    return Batch.of_row(row)


def fill(session: Session, batch_id: UUID, some: Sequence[Line]) -> None:
    """Record those of some lines, given in order, that are not. Raises `Undone`."""
    batch = _locked(session, batch_id)
    if batch is None:
        raise Undone
    run = session.connection().execute
    among = _line.line.between(some[0].number, some[-1].number)
    there = set(run(select(_line.line).where(_line.batch_id == batch_id, among)).scalars())
    missing = [line for line in some if line.number not in there]
    promised = {line.number: new_id() for line in missing if line.submission is not None}
    repeated = [line.repeats for line in missing if line.repeats is not None]
    earlier = select(_line.line, _line.job_id).where(
        _line.batch_id == batch_id, _line.line.in_(repeated)
    )
    promised |= {row.line: row.job_id for row in run(earlier)} if repeated else {}
    rows = [
        {
            "batch_id": batch_id,
            "line": line.number,
            "job_id": promised.get(line.repeats or line.number),
            "repeats": line.repeats,
            "problem": None if line.problem is None else msgspec.json.encode(line.problem).decode(),
            "wanted": None if line.submission is None else feeding.kept(line.submission),
            "queue": None if line.submission is None else line.submission.queue,
        }
        for line in missing
    ]
    if rows:
        run(insert(BATCH_LINES), rows)
    if not batch.is_filled and _recorded(session, batch_id) == batch.lines:
        run(update(BATCHES).where(_batch.id == batch_id).values(filled_at=epoch()))


def _locked(session: Session, batch_id: UUID) -> Batch | None:
    """The batch, which nobody else changes until the transaction ends."""
    wanted = select(*_batch).where(_batch.id == batch_id).with_for_update()
    row = session.connection().execute(wanted).one_or_none()
    return None if row is None else Batch.of_row(row)


def _recorded(session: Session, batch_id: UUID) -> int:
    counted = select(func.count()).where(_line.batch_id == batch_id)
    found: int = session.connection().execute(counted).scalar_one()
    return found


def abandon(session: Session, batch_id: UUID) -> bool:
    """Forget a batch that could not be filled; whether there was one.

    One that another has filled meanwhile stays: it may have been accepted.
    """
    batch = _locked(session, batch_id)
    if batch is None or batch.is_filled:
        return False
    # A process that knows no better has submitted what it recorded.
    jobs.cancel_waiting(session, _jobs_of(batch_id))
    run = session.connection().execute
    run(delete(BATCH_LINES).where(_line.batch_id == batch_id))
    run(delete(BATCHES).where(_batch.id == batch_id))
    return True


def undo_unfilled(session: Session) -> int:
    """Abandon batches that nobody has filled in all that time: half a batch is none; how many they were."""
    run = session.connection().execute
    late = epoch() - LONGEST_FILLING.total_seconds()
    forsaken = select(_batch.id).where(_batch.filled_at.is_(None), _batch.created_at < late)
    count = 0
    for row in run(forsaken.order_by(_batch.created_at).limit(UNDONE_AT_ONCE)).all():
        batch = _locked(session, row.id)
        if batch is not None and _recorded(session, row.id) == batch.lines:
            # Recorded whole by a process that does not note it.
            run(update(BATCHES).where(_batch.id == row.id).values(filled_at=epoch()))
        else:
            count += abandon(session, row.id)
    return count


def find(session: Session, batch_id: UUID) -> Batch | None:
    """The batch of that id."""
    row = session.connection().execute(select(*_batch).where(_batch.id == batch_id)).one_or_none()
    return None if row is None else Batch.of_row(row)


def recent(session: Session, owner: str, limit: int, *, after: UUID | None = None) -> list[Batch]:
    """An owner's latest batches, newest first, of those older than one of them."""
    wanted = (
        select(*_batch)
        .where(_batch.owner == owner)
        .order_by(_batch.created_at.desc(), _batch.id.desc())
        .limit(limit)
    )
    if after is not None:
        last = BATCHES.alias("last").c
        at = select(last.created_at).where(last.id == after).scalar_subquery()
        wanted = wanted.where(
            _batch.created_at <= at, or_(_batch.created_at < at, _batch.id < after)
        )
    return [Batch.of_row(row) for row in session.connection().execute(wanted)]


def view(session: Session, batch: Batch) -> BatchView:
    """A batch as its owner sees it."""
    run = session.connection().execute
    report = run(_REPORT, {"batch": batch.id}).one()
    jobs_of_it = BatchCounts(**run(_COUNTS, {"batch": batch.id}).one()._asdict())
    counts = msgspec.structs.replace(jobs_of_it, queued=jobs_of_it.queued + report.waiting)
    home = f"/api/batches/{batch.id}"
    return BatchView(
        id=batch.id,
        name=batch.name,
        state=_state_of(batch, counts, is_filled=batch.is_filled or report.recorded == batch.lines),
        lane=batch.lane,
        lines=batch.lines,
        refused=report.refused,
        deleted=report.deleted,
        repeated=report.repeated,
        counts=counts,
        max_failures=batch.max_failures,
        created_at=batch.created_at,
        links={
            "self": home,
            "events": f"{home}/events",
            "lines": f"{home}/lines",
            "results": f"{home}/results",
        },
    )


def _state_of(batch: Batch, counts: BatchCounts, *, is_filled: bool) -> BatchState:
    if counts.queued or counts.running or not is_filled:
        return BatchState.RUNNING
    if batch.stopped_by is None or not counts.cancelled:
        return BatchState.ENDED
    return BatchState.STOPPED if batch.stopped_by == FAILED else BatchState.CANCELLED


_WAITS = _job.id.is_(None) & _line.problem.is_(None)
"""A line that waits for room, or that repeats such a one: its job is only promised."""
_LINES = (
    select(_line.line, _line.job_id, _line.repeats, _line.problem, _job.state, _job.cached)
    .add_columns(_job.problem.label("ended_with"), _job.finished_at)
    .select_from(BATCH_LINES.outerjoin(JOBS, _job.id == _line.job_id))
)


def lines(
    session: Session,
    batch_id: UUID,
    *,
    after: int,
    limit: int,
    only: Iterable[JobState] | None = None,
    refused: bool = True,
) -> list[BatchLine]:
    """Lines in order, of those after a number; only those whose scan is in some state, or were refused."""
    wanted = _LINES.where(_line.batch_id == batch_id, _line.line > after)
    if only is not None:
        states = frozenset(only)
        among: ColumnElement[bool] = _job.state.in_(states)
        if JobState.QUEUED in states:
            among |= _WAITS
        wanted = wanted.where(among | _line.problem.is_not(None) if refused else among)
    rows = session.connection().execute(wanted.order_by(_line.line).limit(limit))
    return [_line_of(row) for row in rows]


class EndedLine(NamedTuple):
    """A line whose scan has ended."""

    line: BatchLine
    at: float
    """When, seconds since 1970."""


def ended_since(session: Session, batch_id: UUID, since: float, limit: int) -> list[EndedLine]:
    """Lines whose scans have ended at a moment or later, in the order in which they did."""
    wanted = (
        _LINES.where(_line.batch_id == batch_id, _job.finished_at >= since)
        .order_by(_job.finished_at, _line.line)
        .limit(limit)
    )
    return [
        EndedLine(_line_of(row), row.finished_at) for row in session.connection().execute(wanted)
    ]


def _line_of(row: AnyRow) -> BatchLine:
    problem = row.problem or row.ended_with
    waits = row.state is None and row.problem is None
    return BatchLine(
        line=row.line,
        # One that only waits is promised a job, and one whose job was deleted had it.
        job=None if row.state is None else row.job_id,
        state=JobState.QUEUED if waits else row.state,
        cached=bool(row.cached),
        repeats=row.repeats,
        problem=None if problem is None else msgspec.json.decode(problem),
    )


def _jobs_of(batch_id: UUID) -> Any:
    there = _line.job_id.is_not(None) & _line.wanted.is_(None)
    return select(_line.job_id).where(_line.batch_id == batch_id, there)


def stop(session: Session, batch_id: UUID, *, by: str) -> int:
    """Let no scan of a batch begin any more; how many were cancelled. One that has ended stays as it is.

    Scans that a worker holds, or that others wait for, are `cancel_held`'s; lines that wait for room
    become cancelled jobs by `feeding`.
    """
    batch = _locked(session, batch_id)
    if batch is not None and batch.stopped_by is None and not _has_ended(session, batch):
        stopped = update(BATCHES).where(_batch.id == batch_id)
        session.connection().execute(stopped.values(stopped_at=epoch(), stopped_by=by))
    return jobs.cancel_waiting(session, _jobs_of(batch_id)) + _waiting(session, batch_id)


def _waiting(session: Session, batch_id: UUID) -> int:
    counted = select(func.count(_line.wanted)).where(_line.batch_id == batch_id)
    found: int = session.connection().execute(counted).scalar_one()
    return found


def cancel_held(session: Session, batch_id: UUID) -> list[Cancellation]:
    """Ask what is left of a stopped batch to stop."""
    left = select(_job.id).where(_job.id.in_(_jobs_of(batch_id)), _job.finished_at.is_(None))
    return [
        jobs.request_cancel(session, row.id) for row in session.connection().execute(left).all()
    ]


def to_settle(session: Session) -> list[UUID]:
    """Bounded batches of which too many scans have failed, or all have ended, and that do not say so yet.

    For a transaction that only reads: a batch has ten thousand lines, and meanwhile nobody writes to SQLite.
    """
    bounded = select(*_batch).where(
        _batch.max_failures.is_not(None), _batch.stopped_at.is_(None), _batch.ended_at.is_(None)
    )
    found = [Batch.of_row(row) for row in session.connection().execute(bounded).all()]
    return [
        batch.id for batch in found if _is_failing(session, batch) or _has_ended(session, batch)
    ]


def stop_failing(session: Session, among: Collection[UUID] | None = None) -> list[Cancellation]:
    """Stop the batches of which too many scans have failed; what became of those that had begun.

    Of all bounded ones, or of those that `to_settle` has found.
    """
    asked = []
    for batch_id in sorted(to_settle(session) if among is None else among):
        batch = _locked(session, batch_id)
        if batch is None or batch.stopped_by is not None:
            continue
        if _has_ended(session, batch):
            ended = update(BATCHES).where(_batch.id == batch.id).values(ended_at=epoch())
            session.connection().execute(ended)
        elif _is_failing(session, batch):
            stop(session, batch.id, by=FAILED)
            asked += cancel_held(session, batch.id)
    return asked


def _is_failing(session: Session, batch: Batch) -> bool:
    """Whether as many scans as may have failed; where there is no bound none may be too many."""
    if batch.max_failures is None:
        return False
    bounds = {"batch": batch.id, "most": batch.max_failures}
    failed: int = session.connection().execute(_FAILED, bounds).scalar_one()
    return failed >= batch.max_failures


def _has_ended(session: Session, batch: Batch) -> bool:
    is_under_way = session.connection().execute(_UNDER_WAY, {"batch": batch.id}).scalar_one()
    return not is_under_way and (batch.is_filled or _recorded(session, batch.id) == batch.lines)
