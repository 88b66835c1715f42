"""The statements of `backing.jobs`, built once.

On tables instead of mapped classes, and at import instead of at each call: building a statement costs
several times what SQLite takes to run it. Parameters bear names that no column has, because SQLAlchemy
keeps the columns' own for itself.
"""

from collections.abc import Mapping
from functools import cache
from typing import Any
from uuid import UUID

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    ColumnElement,
    Double,
    Integer,
    Select,
    String,
    UpdateBase,
    and_,
    bindparam,
    case,
    cast,
    func,
    insert,
    literal,
    or_,
    select,
    tuple_,
    update,
)
from sqlalchemy.dialects import postgresql, sqlite

from neural_mri.backing.database import epoch
from neural_mri.backing.prepared import Prepared
from neural_mri.backing.rows import JOBS, QUEUE_CLOCKS
from neural_mri.contract.jobs import HELD, TERMINAL, TRANSITIONS, JobKind, JobState, Lane

_job = JOBS.c
_clock = QUEUE_CLOCKS.c

_UNFINISHED = _job.finished_at.is_(None)
_WAITING = and_(_UNFINISHED, _job.state == JobState.QUEUED, _job.leader.is_(None))
"""For a turn of its own: followers wait for another's."""
_FAIR_ORDER = (_job.virtual_start, _job.id)

INSERT = Prepared(insert(JOBS).values(created_at=epoch()).returning(*_job))
"""A job that waits. Parameters: the columns."""

INSERT_FINISHED = Prepared(
    insert(JOBS).values(created_at=epoch(), finished_at=epoch()).returning(*_job)
)
"""A job born succeeded. Parameters: the columns."""

ADD = insert(JOBS).values(created_at=epoch())
ADD_FINISHED = insert(JOBS).values(created_at=epoch(), finished_at=epoch())
"""The same for many rows at once, none of which is read back."""


def _usable(job: Any) -> tuple[ColumnElement[bool], ...]:
    """Whether a row's result answers later jobs."""
    return job.state == JobState.SUCCEEDED, job.manifest.is_not(None), job.reusable


_USABLE = and_(*_usable(_job))


@cache
def known_results(dialect: str) -> Select[Any]:
    """The newest usable result of each of some keys: scan_key, manifest, id. Parameter: keys.

    Key by key: one that is asked for every night has thousands of them.
    """
    if dialect == "postgresql":
        array = bindparam("keys", type_=postgresql.ARRAY(String))
        wanted = func.unnest(array).table_valued("value").render_derived()
    else:
        wanted = func.json_each(bindparam("keys", type_=JSON)).table_valued("value")
    one = JOBS.alias("one").c
    newest = (
        select(one.id)
        .where(one.scan_key == wanted.c.value, *_usable(one))
        .order_by(one.finished_at.desc())
        .limit(1)
        .correlate(wanted)
        .scalar_subquery()
    )
    return select(_job.scan_key, _job.manifest, _job.id).select_from(
        wanted.join(JOBS, _job.id == newest)
    )


KEYS_UNDER_WAY = select(_job.scan_key).where(
    _job.scan_key.in_(bindparam("keys", expanding=True)), _UNFINISHED
)
"""Parameter: keys."""

EXISTING_RESULT = (
    select(_job.manifest)
    .where(
        _job.scan_key == bindparam("key"),
        _USABLE,
    )
    .order_by(_job.finished_at.desc())
    .limit(1)
)
"""The manifest of the newest usable result. Parameter: key."""

HOLD_RESULT = (
    select(_job.id)
    .where(_job.scan_key == bindparam("key"), _job.manifest == bindparam("path"), _USABLE)
    .limit(1)
    .with_for_update(read=True, key_share=True)
)
"""Keeps a job that names a result from being deleted until the transaction ends. Parameters: key, path."""

HOLD_JOBS = (
    select(_job.id)
    .where(_job.id.in_(bindparam("keys", expanding=True)))
    .order_by(_job.id)
    .with_for_update(read=True, key_share=True)
)
"""The same of jobs by their ids. Parameter: keys."""

WITHDRAW_RESULT = (
    update(JOBS)
    .where(_job.scan_key == bindparam("key"), _job.manifest == bindparam("path"), _job.reusable)
    .values(reusable=False)
)
"""Parameters: key, path."""

_N_UNFINISHED = (
    select(func.count())
    .select_from(JOBS)
    # Every job's queue has a clock. By queues it is an index's few entries; without them SQLite goes through
    # those of every job there has ever been.
    .where(_UNFINISHED, _job.queue.in_(select(_clock.queue)))
)

UNFINISHED_AND_OWNER_FINISH = select(
    _N_UNFINISHED.scalar_subquery().label("unfinished"),
    select(func.max(_job.virtual_finish))
    .where(
        _job.queue == bindparam("name"),
        _job.owner == bindparam("who"),
        _job.lane == bindparam("in_lane"),
    )
    .scalar_subquery()
    .label("owner_finish"),
)
"""Jobs unfinished in all, and where the owner's last job of a queue and lane ends.

Parameters: name, who, in_lane.
"""


STANDING = Prepared(
    select(
        EXISTING_RESULT.scalar_subquery().label("manifest"),
        select(_job.id)
        .where(_job.scan_key == bindparam("key"), _UNFINISHED)
        .exists()
        .label("is_under_way"),
        select(_clock.virtual_clock)
        .where(_clock.queue == bindparam("name"))
        .scalar_subquery()
        .label("clock"),
        *UNFINISHED_AND_OWNER_FINISH.selected_columns,
    )
)
"""All that a new job is recorded by: what is known of its scan, and where its queue is.

Parameters: key, name, who, in_lane.
"""


@cache
def lock_clock(dialect: str) -> UpdateBase:
    """Reads a queue's clock, making it where there is none, and keeps its row locked. Parameter: name.

    Submissions to one queue take turns by it: two of one owner never start at the same virtual time.
    """
    insert_or = postgresql.insert if dialect == "postgresql" else sqlite.insert
    return (
        insert_or(QUEUE_CLOCKS)
        .values(queue=bindparam("name"), virtual_clock=0.0)
        .on_conflict_do_update(
            index_elements=[_clock.queue], set_={"virtual_clock": _clock.virtual_clock}
        )
        .returning(_clock.virtual_clock)
    )


HOLD_CLOCK = select(_clock.virtual_clock).where(_clock.queue == bindparam("name")).with_for_update()
"""Keeps a queue's clock locked, where there is one. Parameter: name."""

MOVE_CLOCK = Prepared(
    update(QUEUE_CLOCKS)
    .where(_clock.queue == bindparam("name"), _clock.virtual_clock < bindparam("start"))
    .values(virtual_clock=bindparam("start"))
)
"""Forward only. Parameters: name, start."""

GET = Prepared(select(*_job).where(_job.id == bindparam("job_id")))
"""Parameter: job_id."""

GET_ALL = select(*_job).where(_job.id.in_(bindparam("keys", expanding=True)))
"""Parameter: keys."""

GET_ENDED = select(*_job).where(
    _job.id.in_(bindparam("keys", expanding=True)), _job.finished_at.is_not(None)
)
"""Those of them that have ended. Parameter: keys."""

MADE = select(*_job).where(
    or_(_job.id == bindparam("job_id"), _job.leader == bindparam("job_id")),
    _job.attempt == bindparam("held_attempt"),
    _job.state == bindparam("to", type_=_job.state.type),
    _job.manifest.is_not_distinct_from(bindparam("path", type_=_job.manifest.type)),
)
"""The job as a move has left it. Parameters: job_id, held_attempt, to, path."""


@cache
def recent(*, before_one: bool, of_a_scan: bool) -> Select[Any]:
    """An owner's jobs, newest first; those older than one of them; those of a scan key that begins so.

    Parameters: who, most; last; key_from and key_to.
    """
    wanted = select(*_job).where(_job.owner == bindparam("who"))
    if before_one:
        last = JOBS.alias("last").c
        at = select(last.created_at).where(last.id == bindparam("last")).scalar_subquery()
        wanted = wanted.where(
            _job.created_at <= at, or_(_job.created_at < at, _job.id < bindparam("last"))
        )
    if of_a_scan:
        wanted = wanted.where(
            _job.scan_key >= bindparam("key_from"), _job.scan_key < bindparam("key_to")
        )
    return wanted.order_by(_job.created_at.desc(), _job.id.desc()).limit(
        bindparam("most", type_=Integer)
    )


QUEUED_BY_QUEUE = (
    select(_job.queue, func.count().label("waiting")).where(_WAITING).group_by(_job.queue)
)


_SHORT = and_(
    _WAITING,
    _job.kind == JobKind.SCAN,
    _job.lane == Lane.INTERACTIVE,
    _job.n_tokens > 0,
    _job.estimated_cost <= bindparam("most_cost", type_=Double),
)
"""Scans of prompts that somebody waits for, of at most so much work."""

QUEUE_OF_SHORT = (
    select(_job.queue)
    .where(_SHORT, _job.queue.in_(bindparam("names", expanding=True)))
    .order_by(*_FAIR_ORDER)
    .limit(1)
)
"""Parameters: names, most_cost."""


def _state(state: JobState) -> ColumnElement[JobState]:
    return literal(state, type_=_job.state.type)


def _least(one: Any, other: Any) -> ColumnElement[int]:
    return case((one < other, one), else_=other)


_TOKENS = case((_job.n_tokens > 1, _job.n_tokens), else_=1)
_BY_TOKENS = bindparam("pass_tokens", type_=BigInteger) // _TOKENS
# In sixteenths: both databases divide whole numbers alike.
_COST = cast(_job.estimated_cost * 16, BigInteger)
_BY_WORK = (
    bindparam("pass_forwards", type_=BigInteger) * _TOKENS * 16 // case((_COST > 1, _COST), else_=1)
)
_OF_ONE_PASS = _least(_BY_TOKENS, _BY_WORK)
_ROOM = _least(bindparam("most", type_=Integer), case((_OF_ONE_PASS > 1, _OF_ONE_PASS), else_=1))
"""Jobs like the head that one pass takes, about: others are for whoever comes next. Parameters: most, pass_tokens, pass_forwards."""


def _claim(waiting: ColumnElement[bool]) -> UpdateBase:
    of_queue = and_(waiting, _job.queue == bindparam("name"))
    head = (
        select(_job.id, _job.batch_key, _job.lane, _job.attempt, _ROOM.label("room"))
        .where(of_queue)
        .order_by(*_FAIR_ORDER)
        .limit(1)
        .with_for_update(skip_locked=True)
        .cte("head")
    )
    # Whoever looks on does not wait for rows that nobody waits for.
    in_no_hurry = select(head.c.lane).scalar_subquery() != Lane.INTERACTIVE
    # Whoever has lost a worker may be what ends them: it comes alone, and takes nobody along the next time.
    is_head = _job.id == select(head.c.id).scalar_subquery()
    lost_none = and_(_job.attempt == 0, select(head.c.attempt).scalar_subquery() == 0)
    batch = (
        select(_job.id, _job.estimated_cost)
        .where(
            of_queue,
            _job.batch_key == select(head.c.batch_key).scalar_subquery(),
            or_(in_no_hurry, _job.lane == Lane.INTERACTIVE),
            or_(is_head, lost_none),
        )
        .order_by(*_FAIR_ORDER)
        .limit(func.coalesce(select(head.c.room).scalar_subquery(), 0))
        .with_for_update(skip_locked=True)
        .cte("batch")
    )
    whole = select(func.sum(batch.c.estimated_cost)).scalar_subquery()
    comes_alone = select(func.count()).select_from(batch).scalar_subquery() == 1
    begins = and_(bindparam("starts", type_=Boolean), _job.kind == JobKind.SCAN, comes_alone)
    return (
        update(JOBS)
        .where(_job.id.in_(select(batch.c.id)))
        .values(
            state=case((begins, _state(JobState.RUNNING)), else_=_state(JobState.CLAIMED)),
            attempt=_job.attempt + 1,
            lease_owner=bindparam("holder"),
            lease_until=epoch() + bindparam("seconds", type_=Double),
            started_at=epoch(),
            claim_share=_job.estimated_cost / func.nullif(whole, 0.0),
        )
        .returning(*_job)
    )


CLAIM = Prepared(_claim(_WAITING))
"""Takes the head of a queue and its mates: of the interactive lane alone where the head is of it.

Parameters: name, most, pass_tokens, pass_forwards, holder, seconds, starts: whether a scan that comes alone is running when
it comes.

CTEs, because PostgreSQL may run a subquery with LIMIT and row locks more than once.
"""

CLAIM_SHORT = Prepared(_claim(_SHORT))
"""The same of short scans. Parameters: also most_cost."""


@cache
def move(to: JobState, *, is_held: bool) -> Prepared:
    """Moves one job to a state, from those that lead there and are held, or are not.

    Parameters: job_id; held_attempt if it is held; path and why if the state is terminal, true_key where it succeeds.
    """
    sources = {state for state, following in TRANSITIONS.items() if to in following}
    allowed = [_job.id == bindparam("job_id")]
    if is_held:
        allowed += [_job.state.in_(sources & HELD), _job.attempt == bindparam("held_attempt")]
    else:
        allowed += [_job.state.in_(sources - HELD)]
    values: dict[str, Any] = {"state": to}
    if to is JobState.QUEUED:
        allowed += [~_job.cancel_requested]
        # It may end as it waits, and to wait costs nothing.
        values |= {"claim_share": 0.0, "waiting_since": epoch()}
    if to not in HELD:
        values |= {"lease_owner": None, "lease_until": None}
    if to in TERMINAL:
        values |= {
            "finished_at": epoch(),
            "manifest": bindparam("path"),
            "problem": bindparam("why"),
            # Who never had a turn gets back what it would have cost.
            "virtual_finish": case((_job.attempt > 0, _job.virtual_finish), else_=None),
        }
    if to is JobState.SUCCEEDED:
        values |= {"scan_key": func.coalesce(bindparam("true_key", type_=String), _job.scan_key)}
    return Prepared(update(JOBS).where(*allowed).values(values).returning(*_job))


def hold_waiting(chosen: Select[tuple[UUID]]) -> Select[tuple[UUID]]:
    """Locks those of the jobs that wait: from then on nobody comes to follow one."""
    return (
        select(_job.id)
        .where(_job.id.in_(chosen), _job.state == JobState.QUEUED)
        .order_by(_job.id)
        .with_for_update()
    )


def cancel_waiting(chosen: Select[tuple[UUID]]) -> UpdateBase:
    """Cancels those of the jobs that wait, and that nobody follows."""
    follower = JOBS.alias("follower").c
    followed = select(follower.id).where(follower.leader == _job.id, follower.finished_at.is_(None))
    return (
        update(JOBS)
        .where(_job.id.in_(chosen), _job.state == JobState.QUEUED, ~followed.exists())
        .values(
            state=JobState.CANCELLED,
            finished_at=epoch(),
            virtual_finish=case((_job.attempt > 0, _job.virtual_finish), else_=None),
        )
    )


def renew(attempts: Mapping[UUID, int], holder: str, seconds: float) -> UpdateBase:
    """Prolongs the leases of jobs given by id and attempt."""
    return (
        update(JOBS)
        .where(
            tuple_(_job.id, _job.attempt).in_(list(attempts.items())),
            _job.lease_owner == holder,
        )
        .values(lease_until=epoch() + seconds)
        .returning(_job.id, _job.cancel_requested)
    )


def reckon(
    attempts: Mapping[UUID, int], holder: str, *, deadline_seconds: float, begun_seconds: float
) -> UpdateBase:
    """Moves the deadline and the beginning of attempts, given by the ids under which they are known."""
    held = list(attempts.items())
    return (
        update(JOBS)
        .where(
            or_(
                tuple_(_job.id, _job.attempt).in_(held),
                tuple_(_job.leader, _job.attempt).in_(held),
            ),
            _job.lease_owner == holder,
        )
        .values(
            deadline_seconds=_job.deadline_seconds + deadline_seconds,
            started_at=_job.started_at + begun_seconds,
        )
    )


FLAG_CANCEL = (
    update(JOBS)
    .where(_job.id == bindparam("job_id"), _job.state.in_(HELD))
    .values(cancel_requested=True)
    .returning(*_job)
)
"""Parameter: job_id."""

LEASES = (
    select(
        _job.id,
        _job.attempt,
        _job.state,
        _job.lease_owner,
        _job.cancel_requested,
        _job.deadline_seconds,
        (_job.lease_until < epoch()).label("lease_expired"),
        (epoch() - _job.started_at).label("seconds"),
    )
    .where(_job.lease_owner.is_not(None))
    .with_for_update(skip_locked=True)
)
"""Every held job, and how its lease stands."""

WAITING_FROM = case(
    (_job.waiting_since > _job.created_at, _job.waiting_since), else_=_job.created_at
)
"""Since when a queued job waits: one that came back waits anew. Who has come to follow such a one took over what
that had waited, and was not there for all of it."""

WAITING_TOO_LONG = (
    select(_job.id)
    .where(
        _WAITING,
        epoch() - bindparam("seconds", type_=Double) > WAITING_FROM,
    )
    .limit(bindparam("most", type_=Integer))
    .with_for_update(skip_locked=True)
)
"""Parameters: seconds, most."""
