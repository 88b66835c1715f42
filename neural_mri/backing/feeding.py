"""From the lines of a batch to its jobs: as many as there is room for, the others as room comes.

A batch is one ask, however many scans it has, and is accepted as one; what limits are about is how many jobs
stand in the queues at once. A line that waits for room holds what its job is to be made of, and the id that it
will have. Lines are fed in order, and of a batch only once all of them are recorded: of half a batch nothing runs.
Those of a batch that has been stopped become jobs that are cancelled already, so that each line has one. Whoever has
recorded the batch feeds what there is room for, and all whose results are known; from then on the reaper does.

Lines for different queues, which is to say models, do not wait for one another: the queue in which their owner has
least under way is fed first. What stands in a queue that nobody serves takes no room from the others but of the
limit itself: of what it leaves of that, they fill the same share as they would of the whole.

Pure SQL on the caller's transaction.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import NamedTuple
from uuid import UUID

import msgspec
from sqlalchemy import Executable, Integer, bindparam, case, exists, func, select, update
from sqlalchemy.orm import Session

from neural_mri.backing import jobs, limits
from neural_mri.backing.access import lock_user
from neural_mri.backing.database import epoch
from neural_mri.backing.limits import NO_LIMITS, Limits
from neural_mri.backing.records import AnyRow, Submission
from neural_mri.backing.rows import BATCH_LINES, BATCHES, JOBS, QUEUE_CLOCKS
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
    "read_kept",
)

FED_SHARE = 0.75
"""How much of a limit batches may fill: the rest is left to what the same people ask for one by one."""
SERVED_SECONDS = 60.0
"""A queue of which somebody has a job, or had one so lately, is served."""
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
_UNFED = (
    select(_batch.id, _batch.stopped_at, _batch.lane)
    .where(_batch.owner == bindparam("who"), _IS_UNFED)
    # To cancel takes no room.
    .order_by(
        _batch.stopped_at.is_(None), _batch.lane != Lane.INTERACTIVE, _batch.created_at, _batch.id
    )
)
_HOLD = select(_batch.id).where(_batch.id == bindparam("batch"), _IS_UNFED).with_for_update()
"""Nobody else feeds the batch until the transaction ends. Parameter: batch."""
_QUEUES = (
    select(_line.batch_id, _line.queue)
    .where(_line.batch_id.in_(bindparam("batches", expanding=True)), _IS_WAITING)
    .distinct()
)
_UNDER_WAY = (
    select(
        _job.queue,
        func.count().label("jobs"),
        func.count(case((_job.owner == bindparam("who"), 1))).label("own"),
        func.count(_job.lease_owner).label("held"),
    )
    # As in `statements`: by queues it is an index's few entries.
    .where(_job.finished_at.is_(None), _job.queue.in_(select(QUEUE_CLOCKS.c.queue)))
    .group_by(_job.queue)
)
_SERVED_LATELY = select(QUEUE_CLOCKS.c.queue).where(
    QUEUE_CLOCKS.c.queue.in_(bindparam("names", expanding=True)),
    exists().where(
        _job.queue == QUEUE_CLOCKS.c.queue,
        _job.finished_at > epoch() - SERVED_SECONDS,
        _job.started_at.is_not(None),
    ),
)
_GOES_ON = (
    select(_batch.id)
    .where(_batch.id == bindparam("batch"), _IS_UNFED, _batch.stopped_at.is_(None))
    .with_for_update()
)
"""The same of one that is not stopped: whoever stops it just now is waited for, or waits. Parameter: batch."""
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
_WAITING_FOR = _WAITING.where(
    _line.queue.is_not_distinct_from(bindparam("name", type_=_line.queue.type))
)
"""Parameters: also name, a queue's."""


class Fed(NamedTuple):
    """What was fed at once."""

    lines: int
    queued: Counter[str]
    """New jobs that wait, by queue."""


def kept(submission: Submission) -> str:
    """A job to be, as its line holds it."""
    return msgspec.json.encode(submission).decode()


def read_kept(body: str) -> Submission:
    """The job to be that a line holds. Raises `msgspec.DecodeError` where another release has written it."""
    return _submission.decode(body)


def check_waiting(session: Session, owner: str, lines: int) -> None:
    """Whether so many lines more may wait. Raises `TooMany`.

    Whoever asks for the same owner meanwhile counts these: the owner's row is locked.
    """
    lock_user(session, owner)
    recorded = (
        select(func.count())
        .select_from(BATCH_LINES.join(BATCHES, _batch.id == _line.batch_id))
        .where(_batch.owner == owner, _IS_UNFED, _IS_WAITING)
    )
    # Lines of a batch that has begun are recorded some at a time.
    to_come = select(func.coalesce(func.sum(_batch.lines), 0)).where(
        _batch.owner == owner, _batch.filled_at.is_(None)
    )
    counts = [session.connection().execute(each).scalar_one() for each in (recorded, to_come)]
    waiting = sum(map(int, counts))
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
    """Submit some lines of an owner's batches for which there is room, and such as cost nothing among them.

    Raises `TooMany` where others took the room meanwhile: then none is submitted.
    """
    run = session.connection().execute
    unfed = run(_UNFED, {"who": owner}).all()
    if stopped := [batch.id for batch in unfed if batch.stopped_at is not None]:
        wait = {row.batch_id for row in _places(session, stopped)}
        for batch_id in filter(wait.__contains__, stopped):
            if cancelled := _cancel(session, batch_id):
                return Fed(cancelled, Counter())
        unfed = [batch for batch in unfed if batch.stopped_at is None]
    room = _room(session, owner, max_queued, usual) if unfed else None
    if room is None or room.is_none:
        return Fed(0, Counter())  # before any line is read: many wait, and it is asked often
    ids = [batch.id for batch in unfed]
    waiting = _places(session, ids)
    places = {batch.id: (batch.lane is not Lane.INTERACTIVE, at) for at, batch in enumerate(unfed)}

    def turn(row: AnyRow) -> tuple[bool, int, int, str]:
        in_no_hurry, at = places[row.batch_id]
        return in_no_hurry, room.own(row.queue), at, row.queue or ""

    for row in sorted(waiting, key=turn):
        if (free := room.of(row.queue)) <= 0 or not _has(session, _GOES_ON, row.batch_id):
            continue
        lines = _waiting(session, row.batch_id, queue=_Queue(row.queue))
        chosen = _chosen(session, lines, free)
        if chosen:
            return Fed(len(chosen), _submit(session, row.batch_id, chosen, max_queued, usual))
    return Fed(0, Counter())


def _places(session: Session, ids: Collection[UUID]) -> Sequence[AnyRow]:
    """For which queues lines of batches wait; the batches of which none does are fed."""
    run = session.connection().execute
    waiting: Sequence[AnyRow] = run(_QUEUES, {"batches": ids}).all()
    if done := set(ids) - {row.batch_id for row in waiting}:
        run(update(BATCHES).where(_batch.id.in_(done)).values(fed_at=epoch()))
    return waiting


def _has(session: Session, held: Executable, batch_id: UUID) -> bool:
    """Whether a batch is still one that a statement holds."""
    return session.connection().execute(held, {"batch": batch_id}).one_or_none() is not None


def _cancel(session: Session, batch_id: UUID) -> int:
    """Have some lines of a stopped batch become cancelled jobs; how many they were."""
    waiting = _waiting(session, batch_id) if _has(session, _HOLD, batch_id) else {}
    if waiting:
        jobs.add_cancelled(session, dict(waiting.values()))
        _settle(session, batch_id, waiting)
    return len(waiting)


def feed_known(
    session: Session, batch_id: UUID, after: int, *, max_queued: int, usual: Limits = NO_LIMITS
) -> int | None:
    """Submit, of a batch's next lines that wait, those whose results are known: they take no room.

    However many lines before them wait, and whatever other batches. The last line that was looked at; None
    at the end. Raises as `feed` does.
    """
    if not _has(session, _GOES_ON, batch_id):
        return None
    waiting = _waiting(session, batch_id, after)
    _submit(session, batch_id, _chosen(session, waiting, 0), max_queued, usual)
    return max(waiting, default=None)


class _Queue(NamedTuple):
    """Lines of one queue alone; of a release that did not say, None."""

    name: str | None


def _waiting(
    session: Session, batch_id: UUID, after: int = 0, *, queue: _Queue | None = None
) -> "dict[int, _Promised]":
    """The next lines of a batch that wait; such as cannot be read are refused, and wait no longer."""
    wanted = _WAITING if queue is None else _WAITING_FOR
    name = {} if queue is None else queue._asdict()
    found: dict[int, _Promised] = {}
    unread: dict[int, str] = {}
    while not found:
        some = {"batch": batch_id, "after": after, **name}
        rows = session.connection().execute(wanted, some).all()
        for row in rows:
            try:
                submission = read_kept(row.wanted)
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
    refused = (
        update(BATCH_LINES).where(mine).values(job_id=None, wanted=None, queue=None, problem=said)
    )
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
    session.connection().execute(update(BATCH_LINES).where(there).values(wanted=None, queue=None))


class _Room(NamedTuple):
    """What there is under way, and how much more may be."""

    rows: Mapping[str | None, AnyRow]
    """Jobs that have not ended, by their queue: `jobs` of all, and `own` ones."""
    standing: AbstractSet[str | None]
    """Queues that nobody serves."""
    max_queued: int
    max_own: int | None
    """None: any number."""

    @property
    def is_none(self) -> bool:
        """Whether no job of any queue could be added: nowhere is more room than where nothing stands."""
        return self.of(None) <= 0

    def own(self, queue: str | None) -> int:
        """How many jobs the owner has in a queue."""
        return self.rows[queue].own if queue in self.rows else 0

    def of(self, queue: str | None) -> int:
        """How many jobs more batches of the owner may have in a queue now."""
        jobs_of = {name: row.jobs for name, row in self.rows.items()}
        free = self._free(queue, jobs_of, self.max_queued)
        if self.max_own is None:
            return free
        own = {name: row.own for name, row in self.rows.items()}
        return min(free, self._free(queue, own, self.max_own))

    def _free(self, queue: str | None, counts: Mapping[str | None, int], limit: int) -> int:
        beside = sum(counts[name] for name in self.standing if name != queue)
        if limit <= beside:
            return 0
        return max(1, int((limit - beside) * FED_SHARE)) - (sum(counts.values()) - beside)


def _room(session: Session, owner: str, max_queued: int, usual: Limits) -> _Room:
    run = session.connection().execute
    rows = {row.queue: row for row in run(_UNDER_WAY, {"who": owner})}
    idle = [queue for queue, row in rows.items() if not row.held]
    served = set(run(_SERVED_LATELY, {"names": idle}).scalars()) if idle else set()
    own = None if usual is NO_LIMITS else limits.most_jobs(session, owner, usual)
    return _Room(rows, set(idle) - served, max_queued, own)
