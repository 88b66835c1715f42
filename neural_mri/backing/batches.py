"""Batches: made, filled, looked at, stopped.

Pure SQL on the caller's transaction. The jobs are the truth about how far a batch has come: a batch keeps no
count of its own. A line is a row, so that what was refused, and what was asked twice, stays told.
"""

from collections.abc import Iterable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple
from uuid import UUID

import msgspec
from sqlalchemy import ColumnElement, bindparam, case, delete, func, insert, or_, select, update
from sqlalchemy.orm import Session

from neural_mri.backing import jobs
from neural_mri.backing.database import epoch
from neural_mri.backing.idempotency import REMEMBERED_SECONDS, IdempotencyKeyReused
from neural_mri.backing.jobs import Cancellation
from neural_mri.backing.limits import NO_LIMITS, Limits
from neural_mri.backing.records import AnyRow, Submission, new_id
from neural_mri.backing.rows import BATCH_LINES, BATCHES, JOBS
from neural_mri.contract.batches import BatchCounts, BatchLine, BatchState, BatchView
from neural_mri.contract.jobs import HELD, JobState, Lane
from neural_mri.contract.problems import ProblemDocument

__all__ = (
    "CALLER",
    "FAILED",
    "Batch",
    "Begun",
    "EndedLine",
    "Line",
    "NewBatch",
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
    "view",
)

_batch = BATCHES.c
_line = BATCH_LINES.c
_job = JOBS.c

FAILURES = frozenset({JobState.FAILED, JobState.EXPIRED, JobState.QUARANTINED})

LONGEST_FILLING = timedelta(minutes=10)
"""Recording a batch takes seconds."""

CALLER, FAILED = "caller", "failures"
"""Who stops a batch."""

_state = _job.state
_COUNTS = (
    select(
        func.count(case((_state == JobState.QUEUED, 1))).label("queued"),
        func.count(case((_state.in_(HELD), 1))).label("running"),
        func.count(case((_state == JobState.SUCCEEDED, 1))).label("succeeded"),
        func.count(case((_state.in_(FAILURES), 1))).label("failed"),
        func.count(case((_state == JobState.CANCELLED, 1))).label("cancelled"),
        func.count(case((_job.cached, 1))).label("cached"),
    )
    .select_from(BATCH_LINES.join(JOBS, _job.id == _line.job_id))
    .where(_line.batch_id == bindparam("batch"), _line.repeats.is_(None))
)
_REPORT = select(
    func.count().label("recorded"),
    func.count(case((_line.job_id.is_(None), 1))).label("refused"),
    func.count(_line.repeats).label("repeated"),
).where(_line.batch_id == bindparam("batch"))


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
        )


class Begun(NamedTuple):
    """What a request to make a batch led to."""

    batch: Batch
    is_new: bool
    """False where an earlier request under the same Idempotency-Key had made it."""


class Line(NamedTuple):
    """A line to be recorded: a scan, an earlier line's scan again, or a refusal."""

    number: int
    submission: Submission | None = None
    repeats: int | None = None
    problem: ProblemDocument | None = None


def begin(
    session: Session,
    wanted: NewBatch,
    *,
    waiting: int = 0,
    max_queued: int = 10_000,
    usual: Limits = NO_LIMITS,
) -> Begun:
    """Record a batch without its lines, unless its Idempotency-Key has made one: then that.

    Raises `IdempotencyKeyReused`, and `TooMany` where there is no room for `waiting` jobs more.
    """
    run = session.connection().execute
    if wanted.word is not None:
        mine = (_batch.owner == wanted.owner) & (_batch.word == wanted.word)
        forgotten = _batch.created_at < epoch() - REMEMBERED_SECONDS
        run(update(BATCHES).where(mine, forgotten).values(word=None))
        row = run(select(*_batch).where(mine)).one_or_none()
        if row is not None:
            if row.digest != wanted.digest:
                raise IdempotencyKeyReused(
                    f"the Idempotency-Key {wanted.word!r} was sent with another batch within the last "
                    f"{REMEMBERED_SECONDS / 3600:.0f} hours: a new batch needs a new key",
                    key=wanted.word,
                    batch=str(row.id),
                )
            return Begun(Batch.of_row(row), is_new=False)
    jobs.check_room(session, wanted.owner, waiting, max_queued=max_queued, usual=usual)
    made = insert(BATCHES).values(
        id=new_id(), **wanted._asdict(), created_at=epoch(), stopped_at=None, ended_at=None
    )
    return Begun(Batch.of_row(run(made.returning(*_batch)).one()), is_new=True)


def fill(
    session: Session,
    batch_id: UUID,
    some: Sequence[Line],
    jobs_by_line: dict[int, UUID],
    *,
    max_queued: int,
    usual: Limits = NO_LIMITS,
) -> dict[int, UUID]:
    """Record some lines, and submit their scans; the job of each line recorded so far.

    Raises `TooMany` where there is no room for all of them: then none is recorded.
    """
    wanted = [line for line in some if line.submission is not None]
    recorded = jobs.submit_many(
        session,
        [line.submission for line in wanted if line.submission is not None],
        max_queued=max_queued,
        usual=usual,
    )
    known = {
        **jobs_by_line,
        **{line.number: made.job_id for line, made in zip(wanted, recorded, strict=True)},
    }
    rows = [
        {
            "batch_id": batch_id,
            "line": line.number,
            "job_id": known.get(line.repeats or line.number),
            "repeats": line.repeats,
            "problem": None if line.problem is None else msgspec.json.encode(line.problem).decode(),
        }
        for line in some
    ]
    session.connection().execute(insert(BATCH_LINES), rows)
    return known


def abandon(session: Session, batch_id: UUID) -> None:
    """Forget a batch that could not be filled, and cancel what was submitted of it."""
    stop(session, batch_id, by=CALLER)
    run = session.connection().execute
    run(delete(BATCH_LINES).where(_line.batch_id == batch_id))
    run(delete(BATCHES).where(_batch.id == batch_id))


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
    counts = _counts(session, batch.id)
    home = f"/api/batches/{batch.id}"
    return BatchView(
        id=batch.id,
        name=batch.name,
        state=_state_of(batch, counts, is_filled=_is_filled(batch, report.recorded)),
        lane=batch.lane,
        lines=batch.lines,
        refused=report.refused,
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


def _is_filled(batch: Batch, recorded: int) -> bool:
    """Whether no line will come any more: all are there, or whoever recorded them is gone since long."""
    return recorded == batch.lines or datetime.now(UTC) - batch.created_at > LONGEST_FILLING


def _counts(session: Session, batch_id: UUID) -> BatchCounts:
    row = session.connection().execute(_COUNTS, {"batch": batch_id}).one()
    return BatchCounts(**row._asdict())


def _state_of(batch: Batch, counts: BatchCounts, *, is_filled: bool) -> BatchState:
    if counts.queued or counts.running or not is_filled:
        return BatchState.RUNNING
    if batch.stopped_by is None or not counts.cancelled:
        return BatchState.ENDED
    return BatchState.STOPPED if batch.stopped_by == FAILED else BatchState.CANCELLED


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
        among: ColumnElement[bool] = _job.state.in_(tuple(only))
        wanted = wanted.where(among | _line.job_id.is_(None) if refused else among)
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
    return BatchLine(
        line=row.line,
        job=row.job_id,
        state=row.state,
        cached=bool(row.cached),
        repeats=row.repeats,
        problem=None if problem is None else msgspec.json.decode(problem),
    )


def _jobs_of(batch_id: UUID) -> Any:
    return select(_line.job_id).where(_line.batch_id == batch_id, _line.job_id.is_not(None))


def stop(session: Session, batch_id: UUID, *, by: str) -> int:
    """Let no scan of a batch begin any more; how many were cancelled.

    Scans that a worker holds, or that others wait for, are `cancel_held`'s.
    """
    session.connection().execute(
        update(BATCHES)
        .where(_batch.id == batch_id, _batch.stopped_at.is_(None))
        .values(stopped_at=epoch(), stopped_by=by)
    )
    return jobs.cancel_waiting(session, _jobs_of(batch_id))


def cancel_held(session: Session, batch_id: UUID) -> list[Cancellation]:
    """Ask what is left of a stopped batch to stop."""
    left = select(_job.id).where(_job.id.in_(_jobs_of(batch_id)), _job.finished_at.is_(None))
    return [
        jobs.request_cancel(session, row.id) for row in session.connection().execute(left).all()
    ]


def stop_failing(session: Session) -> list[Cancellation]:
    """Stop the batches of which too many scans have failed; what became of those that had begun."""
    run = session.connection().execute
    bounded = select(*_batch).where(
        _batch.max_failures.is_not(None), _batch.stopped_at.is_(None), _batch.ended_at.is_(None)
    )
    asked = []
    for row in run(bounded).all():
        seen = view(session, Batch.of_row(row))
        if seen.counts.failed >= row.max_failures:
            stop(session, row.id, by=FAILED)
            asked += cancel_held(session, row.id)
        elif seen.state is not BatchState.RUNNING:
            run(update(BATCHES).where(_batch.id == row.id).values(ended_at=epoch()))
    return asked
