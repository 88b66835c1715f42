"""Jobs: the only place where one is made, claimed, moved, renewed or taken back.

Pure SQL on the caller's transaction. Whatever changes a job returns it as it then stands, so that the
caller announces it (`events.Publisher.announce`) once the transaction is committed.

Every write of a held job names its attempt. A worker that lost its lease has an old one: its writes find
no row.

Fairness is start-time fair queueing (Goyal, Vin and Cheng 1997). A job starts, in virtual time, where the
queue is now or where its owner's last job of the same lane ends, whichever is later; it ends after its cost
over its lane's weight. The queue is where the job last claimed from it starts. Claims go by virtual start.

A scan that is under way already is not run again: see `following`.
"""

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import cache
from itertools import islice
from types import MappingProxyType
from typing import Any, NamedTuple
from uuid import UUID

import msgspec
from sqlalchemy import Executable, Select
from sqlalchemy.orm import Session

from neural_mri.backing import following, idempotency, limits, statements
from neural_mri.backing.leases import LeaseOwner
from neural_mri.backing.limits import NO_LIMITS, Limits
from neural_mri.backing.prepared import Prepared
from neural_mri.backing.records import LANE_WEIGHTS, AnyRow, Job, Submission, new_id
from neural_mri.contract.jobs import TERMINAL, JobState, Lane
from neural_mri.contract.problems import Problem, ProblemDocument, TooMany, UnknownJob

__all__ = (
    "MOST_EXPIRED",
    "Cancellation",
    "DeadlinePassed",
    "Job",
    "LeaseOwner",
    "Recorded",
    "Renewal",
    "Submission",
    "Submitted",
    "WaitedTooLong",
    "WorkersLost",
    "add_cancelled",
    "advance",
    "cancel_waiting",
    "claim",
    "ended",
    "expire",
    "found",
    "get",
    "known_results",
    "queue_of_short",
    "queued_by_queue",
    "reap",
    "recent",
    "reckon",
    "renew",
    "request_cancel",
    "result_of",
    "submit",
    "submit_many",
    "submit_once",
    "withdraw_result",
)


MOST_EXPIRED = 200
"""Jobs that end in one transaction because nobody took them: nobody writes to SQLite meanwhile."""


class WorkersLost(Problem):
    """Every worker that ran this job was lost."""

    status = 500


class DeadlinePassed(Problem):
    """The job ran longer than its deadline allows."""

    status = 504


class WaitedTooLong(Problem):
    """No worker took the job in time."""

    status = 504


class Renewal(NamedTuple):
    """What a worker learns of its jobs when it renews their leases."""

    lost: frozenset[UUID]
    """No longer its own: stop, and write nothing."""
    cancelled: frozenset[UUID]
    """Still its own; somebody asked to stop."""


class Submitted(NamedTuple):
    """What a request to make a job led to."""

    job: Job
    is_new: bool
    """False where an earlier request under the same Idempotency-Key had made it."""


class Recorded(NamedTuple):
    """What became of one of many submissions."""

    job_id: UUID
    cached: bool


class Cancellation(NamedTuple):
    """Where a job stands after it was asked to stop."""

    job: Job
    moved: bool
    """Whether it was cancelled just now; a held job is, by its worker, a little later."""


def submit_once(
    session: Session,
    submission: Submission,
    *,
    max_queued: int = 10_000,
    usual: Limits = NO_LIMITS,
    is_anew: bool = False,
    briefly: bool = False,
) -> Submitted:
    """Record a job, unless the submission's Idempotency-Key has made one: then that.

    `is_anew` makes another in place of one whose result is lost. Raises `IdempotencyKeyReused`, and as
    `submit` does; `briefly` says that it must take no longer than a few rows found by their keys, or raise `NotBrief`.
    """
    job_id = new_id()
    made = idempotency.job_made_by(session, submission, job_id, is_anew=is_anew)
    known = None if made is None else get(session, made)
    if known is not None:
        return Submitted(known, is_new=False)
    job = submit(
        session, submission, max_queued=max_queued, usual=usual, job_id=job_id, briefly=briefly
    )
    return Submitted(job, is_new=True)


def submit(
    session: Session,
    submission: Submission,
    *,
    max_queued: int = 10_000,
    usual: Limits = NO_LIMITS,
    job_id: UUID | None = None,
    briefly: bool = False,
) -> Job:
    """Record a job; one whose result exists is born succeeded.

    `usual` are the limits of a user who has none of their own. Raises `TooMany` beyond them, and when
    `max_queued` jobs are unfinished.
    """
    row = _row(submission, job_id or new_id())
    found = _standing(session, submission)
    if _is_held(session, submission, found.manifest):
        return _born_succeeded(session, row, found.manifest)
    if usual is not NO_LIMITS:
        limits.check(session, submission.owner, usual, briefly=briefly)
    dialect = session.get_bind().dialect.name
    if found.clock is None or dialect != "sqlite":
        # From here on submissions to this queue take turns, as on SQLite from the transaction's beginning: of
        # two equal ones the second sees the first.
        _run(session, statements.lock_clock(dialect), {"name": submission.queue})
        found = _standing(session, submission)
    turn = _turn(found, submission, max_queued)
    row |= {**_WAITING, "virtual_start": turn.start, "virtual_finish": turn.finish}
    if found.is_under_way and submission.scan_key is not None:
        if leader := following.leader(session, submission.scan_key):
            following.lift(session, leader, turn.start)
            row |= {"leader": leader.work, "virtual_finish": None}
        else:  # it has just ended, or has been asked to stop
            found = _standing(session, submission)
    if _is_held(session, submission, found.manifest):
        return _born_succeeded(session, row, found.manifest)
    return Job.of_row(_run(session, statements.INSERT, row).one())


def submit_many(
    session: Session,
    submissions: Sequence[Submission],
    *,
    max_queued: int = 10_000,
    usual: Limits = NO_LIMITS,
    job_ids: Sequence[UUID] | None = None,
) -> list[Recorded]:
    """Record different scans of one owner, as `submit` does one, with a few statements for all of them.

    `job_ids` are given where they have been promised. Raises `TooMany` where there is no room for all: then none is recorded.
    """
    clocks = _clocks(session, submissions)
    # From here on nobody else submits to these queues: what is found now stays so.
    keys = {submission.scan_key for submission in submissions if submission.scan_key}
    known = known_results(session, keys, hold=True)
    under_way = _keys_among(session, statements.KEYS_UNDER_WAY, keys)
    waiting = [each for each in submissions if each.scan_key not in known]
    if waiting and usual is not NO_LIMITS:
        limits.check(session, waiting[0].owner, usual, count=len(waiting))
    ids = job_ids or [new_id() for _ in submissions]
    recorded: dict[int, Recorded] = {}
    for index, submission in enumerate(submissions):
        if submission.scan_key in under_way and submission.scan_key not in known:
            job = submit(session, submission, max_queued=max_queued, job_id=ids[index])
            recorded[index] = Recorded(job.id, job.cached)
    rest = len(waiting) - len(recorded)
    turns = {
        flow: _next_turn(session, flow, clock, rest, max_queued) for flow, clock in clocks.items()
    }
    born, queued = [], []
    for index, submission in enumerate(submissions):
        if index in recorded:
            continue
        row = _row(submission, ids[index])
        recorded[index] = Recorded(row["id"], submission.scan_key in known)
        if submission.scan_key in known:
            born.append({**row, **_SUCCEEDED, "manifest": known[submission.scan_key]})
            continue
        flow = _Flow.of(submission)
        start = turns[flow]
        finish = start + submission.estimated_cost / LANE_WEIGHTS[submission.lane]
        turns[flow] = finish
        queued.append({**row, **_WAITING, "virtual_start": start, "virtual_finish": finish})
    for statement, rows in ((statements.ADD, queued), (statements.ADD_FINISHED, born)):
        if rows:
            session.connection().execute(statement, rows)
    return [recorded[index] for index in range(len(submissions))]


class _Flow(NamedTuple):
    """Jobs that wait for one another: an owner's, of one lane and queue. Names are the statements'."""

    name: str
    who: str
    in_lane: Lane

    @classmethod
    def of(cls, submission: Submission) -> "_Flow":
        return cls(submission.queue, submission.owner, submission.lane)


def _clocks(session: Session, submissions: Sequence[Submission]) -> dict[_Flow, float]:
    """The clock of each queue that is submitted to, locked."""
    locking = statements.lock_clock(session.get_bind().dialect.name)
    # In one order, so that two who do the same never wait for each other.
    flows = sorted({_Flow.of(each) for each in submissions})
    return {flow: _run(session, locking, {"name": flow.name}).scalar_one() for flow in flows}


def _next_turn(session: Session, flow: _Flow, clock: float, count: int, max_queued: int) -> float:
    """The virtual start of the owner's next job, where there is room for `count`. Raises `TooMany`."""
    found = _run(session, statements.UNFINISHED_AND_OWNER_FINISH, flow._asdict()).one()
    _check_queued(found.unfinished, count, max_queued)
    return clock if found.owner_finish is None else max(clock, found.owner_finish)


def _check_queued(unfinished: int, count: int, max_queued: int) -> None:
    if count and unfinished + count > max_queued:
        raise TooMany(
            f"{unfinished} jobs are unfinished, {max_queued} may be: there is no room for {count} more; "
            "try again when some have ended",
            unfinished=unfinished,
            limit=max_queued,
        )


def add_cancelled(session: Session, promised: Mapping[UUID, Submission]) -> None:
    """Record jobs that nobody wants any more, as they would be had they been cancelled while they waited."""
    rows = [{**_row(submission, job_id), **_CANCELLED} for job_id, submission in promised.items()]
    session.connection().execute(statements.ADD_FINISHED, rows)


def known_results(session: Session, keys: Iterable[str], *, hold: bool = False) -> dict[str, str]:
    """The manifests of the newest usable results of scan keys; if they are to be named, held by who names them."""
    dialect = session.get_bind().dialect.name
    rows = _run(session, statements.known_results(dialect), {"keys": sorted(keys)})
    newest = {row.scan_key: row for row in rows}
    if hold and dialect == "postgresql":
        ids = {row.id for row in newest.values()}
        held = {row.id for row in _chunked(session, statements.HOLD_JOBS, ids)}
        newest = {key: row for key, row in newest.items() if row.id in held}
    return {key: row.manifest for key, row in newest.items()}


def result_of(session: Session, scan_key: str) -> str | None:
    """The manifest of a scan key's newest usable result, while a job names one."""
    return known_results(session, [scan_key]).get(scan_key)


def _is_held(session: Session, submission: Submission, manifest: str | None) -> bool:
    """Whether a result that was found may be named: a job that names it stays until the new one is there.

    One that is deleted just now is waited for, and then there is none. On SQLite nobody else writes meanwhile.
    """
    if manifest is None or session.get_bind().dialect.name == "sqlite":
        return manifest is not None
    held = {"key": submission.scan_key, "path": manifest}
    return _run(session, statements.HOLD_RESULT, held).one_or_none() is not None


def _keys_among(session: Session, statement: Executable, keys: Iterable[str]) -> set[str]:
    return {row.scan_key for row in _chunked(session, statement, keys)}


def _chunked(session: Session, statement: Executable, keys: Iterable[Any]) -> Iterator[AnyRow]:
    """Rows for keys, so many at a time as every database takes parameters."""
    wanted = iter(sorted(keys))
    while some := tuple(islice(wanted, 500)):
        yield from _run(session, statement, {"keys": some}).all()


_WAITING: Mapping[str, Any] = MappingProxyType(
    {"state": JobState.QUEUED, "cached": False, "manifest": None}
)
_SUCCEEDED: Mapping[str, Any] = MappingProxyType(
    {"state": JobState.SUCCEEDED, "cached": True, "virtual_start": 0.0, "virtual_finish": None}
)

_CANCELLED: Mapping[str, Any] = MappingProxyType(
    {**_SUCCEEDED, "state": JobState.CANCELLED, "cached": False, "manifest": None}
)


def _row(submission: Submission, job_id: UUID) -> dict[str, Any]:
    """What is known of a job whatever becomes of it."""
    return {
        "id": job_id,
        "owner": submission.owner,
        "kind": submission.kind,
        "model": submission.model,
        "revision": submission.revision,
        "queue": submission.queue,
        "lane": submission.lane,
        "request": submission.request.decode(),
        "tokens": _json(submission.tokens),
        "operands": _json(submission.operands),
        "n_tokens": len(submission.tokens) if submission.tokens else 0,
        "scan_key": submission.scan_key,
        "reusable": True,
        "batch_key": submission.batch_key(job_id),
        "estimated_cost": submission.estimated_cost,
        "attempt": 0,
        "cancel_requested": False,
        "deadline_seconds": submission.deadline_seconds,
        "traceparent": submission.traceparent,
        "leader": None,
    }


def _born_succeeded(session: Session, row: dict[str, Any], manifest: str) -> Job:
    row |= {**_SUCCEEDED, "manifest": manifest}
    return Job.of_row(_run(session, statements.INSERT_FINISHED, row).one())


def _standing(session: Session, submission: Submission) -> AnyRow:
    """What a new job is recorded by, as `statements.STANDING` finds it."""
    parameters = {"key": submission.scan_key, **_Flow.of(submission)._asdict()}
    found: AnyRow = _run(session, statements.STANDING, parameters).one()
    return found


class _Turn(NamedTuple):
    start: float
    finish: float


def _turn(found: AnyRow, submission: Submission, max_queued: int) -> _Turn:
    """The virtual start and finish of a new job. Raises `TooMany`."""
    if found.unfinished >= max_queued:
        raise TooMany(
            f"{found.unfinished} jobs are unfinished, the limit is {max_queued}: try again when some "
            "have ended",
            unfinished=found.unfinished,
            limit=max_queued,
        )
    start = found.clock if found.owner_finish is None else max(found.clock, found.owner_finish)
    return _Turn(start, start + submission.estimated_cost / LANE_WEIGHTS[submission.lane])


def withdraw_result(session: Session, scan_key: str | None, manifest: str) -> None:
    """Answer no later job of that scan with this result: its bytes are missing or damaged."""
    _run(session, statements.WITHDRAW_RESULT, {"key": scan_key, "path": manifest})


def get(session: Session, job_id: UUID) -> Job | None:
    """The job of that id."""
    return _job_of(_run(session, statements.GET, {"job_id": job_id}))


def found(session: Session, job_ids: Collection[UUID]) -> dict[UUID, Job]:
    """Those of the jobs that are there."""
    rows = _chunked(session, statements.GET_ALL, job_ids)
    return {row.id: Job.of_row(row) for row in rows}


def ended(session: Session, job_ids: Collection[UUID]) -> list[Job]:
    """Those of the jobs that have ended, however many are asked for: of the others nothing is read."""
    return [Job.of_row(row) for row in _chunked(session, statements.GET_ENDED, job_ids)]


def recent(
    session: Session,
    owner: str,
    limit: int = 50,
    *,
    after: UUID | None = None,
    scan_key: str | None = None,
) -> list[Job]:
    """An owner's latest jobs, newest first, of those older than one of them.

    A scan key may be given by its first digits. Nothing is older than a job that is not there.
    """
    parameters: dict[str, Any] = {"who": owner, "most": limit}
    if after is not None:
        parameters["last"] = after
    if scan_key is not None:
        # Beyond every hexadecimal digit: a range, which an index serves where LIKE may not be.
        parameters |= {"key_from": scan_key, "key_to": f"{scan_key}g"}
    wanted = statements.recent(before_one=after is not None, of_a_scan=scan_key is not None)
    rows = _run(session, wanted, parameters)
    return [Job.of_row(row) for row in rows]


def queued_by_queue(session: Session) -> dict[str, int]:
    """How many jobs wait in each queue that has some."""
    return {row.queue: row.waiting for row in _run(session, statements.QUEUED_BY_QUEUE)}


def queue_of_short(session: Session, queues: Sequence[str], most_cost: float) -> str | None:
    """Where a scan waits that somebody looks for and that is at most so much work."""
    parameters = {"names": queues, "most_cost": most_cost}
    found: str | None = _run(session, statements.QUEUE_OF_SHORT, parameters).scalar()
    return found


MOST_TOKENS, MOST_FORWARDS = 1 << 20, 1 << 10
"""As many as any pass takes."""


def claim(
    session: Session,
    *,
    queue: str,
    owner: LeaseOwner,
    limit: int,
    lease_seconds: float,
    tokens: int = MOST_TOKENS,
    forwards: int = MOST_FORWARDS,
    most_cost: float | None = None,
    starts: bool = False,
) -> list[Job]:
    """Take the queue's first job in fair order, and up to `limit` - 1 that may share its pass.

    Of such as are as much work as the first, no more than make about one pass: so many `tokens`, and as much work
    as so many plain `forwards` of its prompt.

    In fair order; empty when nothing waits. Two workers never get the same job. With `most_cost`, of the
    scans alone that somebody looks for and that are at most so much work. `starts` says that a scan which
    comes alone is begun at once: then it is running when it comes.
    """
    if session.get_bind().dialect.name == "postgresql":
        # Who submits locks the clock, and then the job that theirs will follow: in that order here as well.
        _run(session, statements.HOLD_CLOCK, {"name": queue})
    parameters = {
        "name": queue,
        "most": limit,
        "pass_tokens": tokens,
        "pass_forwards": forwards,
        "holder": str(owner),
        "seconds": lease_seconds,
        "starts": starts,
    }
    if most_cost is None:
        rows = _run(session, statements.CLAIM, parameters)
    else:
        rows = _run(session, statements.CLAIM_SHORT, parameters | {"most_cost": most_cost})
    claimed = sorted((Job.of_row(row) for row in rows), key=lambda job: (job.virtual_start, job.id))
    if claimed:
        # The clock goes with the head alone: mates from further back came along for nothing.
        head = {"name": queue, "start": claimed[0].virtual_start}
        _run(session, statements.MOVE_CLOCK, head)
    return claimed


def renew(
    session: Session, owner: LeaseOwner, attempts: Mapping[UUID, int], lease_seconds: float
) -> Renewal:
    """Hold jobs, given as id and attempt, for `lease_seconds` from now."""
    if not attempts:
        return Renewal(frozenset(), frozenset())
    renewed = {
        row.id: row.cancel_requested
        for row in _run(session, statements.renew(attempts, str(owner), lease_seconds))
    }
    if missing := {known: attempts[known] for known in attempts.keys() - renewed.keys()}:
        heirs = following.renew_heirs(session, missing, str(owner), lease_seconds)
        renewed |= {row.id: row.cancel_requested for row in heirs}
    return Renewal(
        lost=frozenset(attempts.keys() - renewed.keys()),
        cancelled=frozenset(job_id for job_id, cancelled in renewed.items() if cancelled),
    )


def reckon(
    session: Session,
    owner: LeaseOwner,
    attempts: Mapping[UUID, int],
    *,
    deadline_seconds: float,
    begun_seconds: float,
) -> None:
    """Move the deadline and the beginning of attempts that stand still while others have their worker.

    So that what they lend is neither held against them nor counted as computed.
    """
    moved = statements.reckon(
        attempts, str(owner), deadline_seconds=deadline_seconds, begun_seconds=begun_seconds
    )
    _run(session, moved)


def advance(
    session: Session,
    job_id: UUID,
    to: JobState,
    *,
    attempt: int | None = None,
    manifest: str | None = None,
    scan_key: str | None = None,
    problem: ProblemDocument | None = None,
) -> Job | None:
    """Move a job, unless it has moved elsewhere; the moved job, or None.

    `attempt` is the mover's; None moves only a job that nobody holds. `scan_key` is the result's, where the job
    succeeds with one: it may be another than the job was made for. A job asked to stop does not go back to the
    queue. An attempt that was handed over moves whom it was handed to: the answer bears the id that the mover
    knows. Who follows the job goes with it, or on without it (`following`).
    """
    if to is JobState.CLAIMED:
        raise ValueError("a job is claimed by claim(), which gives it an owner and an attempt")
    end = _End(manifest, scan_key, problem)
    moved = _move(session, job_id, to, attempt=attempt, end=end)
    if moved is None and attempt is not None and (heir := following.heir(session, job_id, attempt)):
        moved = _move(session, heir, to, attempt=attempt, end=end)
    if moved is None:
        return None
    if attempt is not None or moved.leader is None:  # else it only followed
        _settle(session, moved, was_held=attempt is not None)
    leads_itself = moved.state is JobState.QUEUED
    return msgspec.structs.replace(moved, id=job_id, leader=None if leads_itself else moved.leader)


def made(
    session: Session, job_id: UUID, to: JobState, *, attempt: int, manifest: str | None = None
) -> Job | None:
    """The job where `advance` has made that move for that attempt already; None where nobody has.

    For whoever was not told whether a transaction was committed.
    """
    parameters = {"job_id": job_id, "held_attempt": attempt, "to": to, "path": manifest}
    moved = _job_of(_run(session, statements.MADE, parameters))
    return moved and msgspec.structs.replace(moved, id=job_id)


def _settle(session: Session, job: Job, *, was_held: bool) -> None:
    """See to the followers of a job that does not go on as it was."""
    match job.state:
        case JobState.SUCCEEDED | JobState.QUARANTINED:
            # What may be what ends workers ends no more of them.
            following.share(
                session,
                job.source,
                job.state,
                manifest=job.manifest,
                scan_key=job.scan_key,
                problem=_json(job.problem),
            )
        case JobState.QUEUED if job.leader is not None:
            following.give_back(session, job.id, job.leader)
        case JobState.FAILED | JobState.CANCELLED | JobState.EXPIRED:
            following.promote(session, job, was_held=was_held)


class _End(NamedTuple):
    """What a job ends with."""

    manifest: str | None = None
    scan_key: str | None = None
    problem: ProblemDocument | None = None


_NOTHING = _End()


def _move(
    session: Session, job_id: UUID, to: JobState, *, attempt: int | None, end: _End = _NOTHING
) -> Job | None:
    parameters: dict[str, Any] = {"job_id": job_id}
    if attempt is not None:
        parameters["held_attempt"] = attempt
    if to in TERMINAL:
        parameters |= {"path": end.manifest, "why": _json(end.problem)}
    if to is JobState.SUCCEEDED:
        parameters["true_key"] = end.scan_key
    return _job_of(_run(session, statements.move(to, is_held=attempt is not None), parameters))


def request_cancel(session: Session, job_id: UUID) -> Cancellation:
    """Ask a job to stop: at once when it waits, by a flag its worker sees when it is held.

    One that others follow is cancelled at once, and its work goes on for them. A job that has ended stays
    as it is. Raises `UnknownJob`.
    """
    if cancelled := advance(session, job_id, JobState.CANCELLED) or _hand_over(session, job_id):
        return Cancellation(cancelled, moved=True)
    flagged = _job_of(_run(session, statements.FLAG_CANCEL, {"job_id": job_id}))
    job = flagged or get(session, job_id)
    if job is None:
        raise UnknownJob(f"there is no job {job_id}", job=str(job_id))
    return Cancellation(job, moved=False)


def cancel_waiting(session: Session, chosen: Select[tuple[UUID]]) -> int:
    """Cancel those of the jobs that only wait, and that nobody follows, at once; how many they were.

    Their streams tell nothing of it: who reads one hears of the end from the database.
    """
    if session.get_bind().dialect.name == "postgresql":
        # Who is about to follow has locked the job. Met by the cancellation itself, which has looked for followers
        # by then, they would be left to follow one that has ended.
        session.connection().execute(statements.hold_waiting(chosen)).all()
    moved: int = session.connection().execute(statements.cancel_waiting(chosen)).rowcount
    return moved


def _hand_over(session: Session, job_id: UUID) -> Job | None:
    """Cancel a held job whose attempt a follower inherits; None where it is not held or not followed."""
    job = get(session, job_id)
    attempt = None if job is None else following.inherit(session, job)
    if attempt is None:
        return None
    return _move(session, job_id, JobState.CANCELLED, attempt=attempt)


def reap(
    session: Session,
    *,
    max_attempts: int,
    dead_owners: Callable[[LeaseOwner], bool] = LeaseOwner.is_dead_here,
    watched_seconds: Callable[[UUID, int], float] = lambda _job_id, _attempt: math.inf,
) -> list[Job]:
    """Take back jobs whose worker is lost or past the deadline; the jobs as they then stand.

    Past it is an attempt that `watched_seconds` has seen held for as long as well: the database's clock may
    have been set meanwhile. Lost is who let a lease expire, and at once who is provably dead. The job goes back to the queue,
    unless it was asked to stop (`cancelled`), ran too long (`expired`), or has now lost `max_attempts`
    workers (`quarantined`, with what is known of them).
    """
    is_dead = cache(dead_owners)
    taken = []
    for row in _run(session, statements.LEASES).all():
        watched = watched_seconds(row.id, row.attempt)
        is_late = min(row.seconds, watched) > row.deadline_seconds
        if is_late or row.lease_expired or is_dead(LeaseOwner.parse(row.lease_owner)):
            fate = _after_loss(row, is_late=is_late, max_attempts=max_attempts)
            moved = advance(session, row.id, fate.to, attempt=row.attempt, problem=fate.problem)
            if moved is not None:
                taken.append(moved)
    return taken


class _Fate(NamedTuple):
    to: JobState
    problem: ProblemDocument | None = None


def _after_loss(row: AnyRow, *, is_late: bool, max_attempts: int) -> _Fate:
    """Where a job goes whose worker is lost."""
    if row.cancel_requested:
        return _Fate(JobState.CANCELLED)
    if is_late:
        late = DeadlinePassed(
            f"attempt {row.attempt} ran for {row.seconds:.1f} s, {row.deadline_seconds:.1f} s are "
            f"allowed; it was {row.state.value}",
            deadline_seconds=row.deadline_seconds,
            attempt=row.attempt,
        )
        return _Fate(JobState.EXPIRED, late.document())
    if row.attempt >= max_attempts:
        lost = WorkersLost(
            f"{row.attempt} workers were lost while they held this job, the last of them "
            f"({row.lease_owner}) {row.seconds:.1f} s after it took it, {row.state.value}. It is set "
            "aside, because it may be what ends them",
            attempts=row.attempt,
            last_state=row.state.value,
        )
        return _Fate(JobState.QUARANTINED, lost.document())
    return _Fate(JobState.QUEUED)


def expire(session: Session, *, waiting_seconds: float) -> list[Job]:
    """End up to `MOST_EXPIRED` jobs that no worker took for `waiting_seconds`; the jobs as they then stand.

    One whose worker was lost has waited since it came back, one that followed what failed since it leads.
    """
    problem = WaitedTooLong(
        f"no worker took the job within {waiting_seconds:.0f} s: is one running that holds its model?"
    )
    bounds = {"seconds": waiting_seconds, "most": MOST_EXPIRED}
    late = _run(session, statements.WAITING_TOO_LONG, bounds).all()
    moved = (advance(session, row.id, JobState.EXPIRED, problem=problem.document()) for row in late)
    return [job for job in moved if job is not None]


def _run(
    session: Session,
    statement: Executable | Prepared,
    parameters: Mapping[str, Any] = MappingProxyType({}),
) -> Any:
    """Run a statement on the transaction's connection, past the mapped classes it does not need."""
    if isinstance(statement, Prepared):
        return statement.run(session, parameters)
    return session.connection().execute(statement, parameters)


def _job_of(result: Any) -> Job | None:
    row = result.one_or_none()
    return None if row is None else Job.of_row(row)


def _json(value: object) -> str | None:
    return None if value is None else msgspec.json.encode(value).decode()
