"""Who holds which weights, who may load more, and what is asked of each: what placement stands on.

Pure SQL on the caller's transaction. Heartbeats tell others what a worker holds, quickly, and may be lost;
a *residence* is the claim itself. It is made before loading begins, in a transaction that only one worker
has at a time for one set of weights, is renewed while the model is held, and ends with its process: at once
where that is provably dead on its own host, else when nobody has renewed it. One that is withdrawn (`ask_to_let_go`)
is its worker's to notice when it renews.
"""

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping
from types import MappingProxyType
from typing import NamedTuple
from uuid import UUID

from sqlalchemy import (
    Integer,
    cast,
    delete,
    func,
    insert,
    literal,
    select,
    union_all,
    update,
)
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import Session

from neural_mri.backing import keys
from neural_mri.backing.database import epoch
from neural_mri.backing.leases import LeaseOwner
from neural_mri.backing.placement import Cost, Demand, faded
from neural_mri.backing.rows import JOBS, MODEL_COSTS, MODELS, RESIDENCES
from neural_mri.contract.jobs import JobKind, JobState

__all__ = (
    "LEASE_SECONDS",
    "Claim",
    "ask_to_let_go",
    "claim",
    "costs",
    "demands",
    "estimate",
    "forget_guess",
    "guess_memory",
    "holders",
    "next_load",
    "release",
    "renew",
    "settle",
)

LEASE_SECONDS = 30.0
"""How long a claim holds without being renewed: longer than a job's, as more is lost with it."""

REMEMBERED = 5.0
"""Requests older than so many time constants count for nothing."""

STEPS = 8
"""Ages within a time constant that are told apart."""

WAITING = -1
"""In place of an age: the job waits."""

READ_BYTES_A_SECOND = 3e8
SETUP_SECONDS = 1.0
"""What loading is taken to need where it was never measured."""

DTYPE_BYTES: Mapping[str, int] = MappingProxyType({"float32": 4, "bfloat16": 2, "float16": 2})
BESIDE_WEIGHTS = 1.1
"""A loaded model's share of its parameters: projections that had to be split, the heads' output maps."""

_job, _held, _cost, _model = JOBS.c, RESIDENCES.c, MODEL_COSTS.c, MODELS.c


class Claim(NamedTuple):
    """What came of asking to load something."""

    is_granted: bool
    losses: int
    """Workers lost while they loaded it, since it was last loaded."""


def claim(
    session: Session,
    revision: str,
    owner: LeaseOwner,
    *,
    copies: int | None,
    dead_owners: Callable[[LeaseOwner], bool] = LeaseOwner.is_dead_here,
) -> Claim:
    """Ask to load a set of weights, of which there may be `copies` in all; None: however many.

    A claim of a worker that is lost makes way for another; where it was loading, that is counted.
    """
    losses = _in_turn(session, revision)
    standing = 0
    gone = list[str]()
    rows = session.execute(
        select(_held.owner, _held.loaded, (_held.until < epoch()).label("is_over")).where(
            _held.revision == revision
        )
    )
    for row in rows.all():
        if row.owner == str(owner):
            continue
        if row.is_over or dead_owners(LeaseOwner.parse(row.owner)):
            gone.append(row.owner)
            losses += not row.loaded
        else:
            standing += 1
    if gone:
        session.execute(delete(RESIDENCES).where(_held.revision == revision, _held.owner.in_(gone)))
        session.execute(update(MODEL_COSTS).where(_cost.revision == revision).values(losses=losses))
    if copies is not None and standing >= copies:
        return Claim(is_granted=False, losses=losses)
    _put(session, revision, owner, is_loaded=False)
    return Claim(is_granted=True, losses=losses)


def _in_turn(session: Session, revision: str) -> int:
    """Losses so far; the row stays locked, so that claims on one set of weights take turns."""
    dialect = session.get_bind().dialect.name
    insert_or = postgresql.insert if dialect == "postgresql" else sqlite.insert
    losses: int = session.execute(
        insert_or(MODEL_COSTS)
        .values(revision=revision, losses=0)
        .on_conflict_do_update(index_elements=[_cost.revision], set_={"losses": _cost.losses})
        .returning(_cost.losses)
    ).scalar_one()
    return losses


def _put(session: Session, revision: str, owner: LeaseOwner, *, is_loaded: bool) -> None:
    ours = (_held.revision == revision, _held.owner == str(owner))
    session.execute(delete(RESIDENCES).where(*ours))
    session.execute(
        insert(RESIDENCES).values(
            revision=revision,
            owner=str(owner),
            loaded=is_loaded,
            claimed_at=epoch(),
            until=epoch() + LEASE_SECONDS,
        )
    )


def settle(
    session: Session, revision: str, owner: LeaseOwner, *, memory_bytes: int, load_seconds: float
) -> None:
    """Say that the weights are loaded, and what that took."""
    _in_turn(session, revision)
    _put(session, revision, owner, is_loaded=True)
    session.execute(
        update(MODEL_COSTS)
        .where(_cost.revision == revision)
        .values(memory_bytes=memory_bytes, load_seconds=load_seconds, losses=0)
    )


def guess_memory(session: Session, revision: str, memory_bytes: int) -> None:
    """Take a model to need so much, because loading it has run out of memory, until it is loaded.

    Memory without a time to load is such a guess: what is measured has both.
    """
    _in_turn(session, revision)
    session.execute(
        update(MODEL_COSTS)
        .where(_cost.revision == revision)
        .values(memory_bytes=memory_bytes, load_seconds=None)
    )


def forget_guess(session: Session, revision: str) -> bool:
    """Take a model for as large as it was before loading it ran out of memory; whether that was guessed."""
    forgotten = session.execute(
        update(MODEL_COSTS)
        .where(
            _cost.revision == revision,
            _cost.load_seconds.is_(None),
            _cost.memory_bytes.is_not(None),
        )
        .values(memory_bytes=None)
        .returning(_cost.revision)
    )
    return forgotten.one_or_none() is not None


def renew(session: Session, owner: LeaseOwner, revisions: Collection[str]) -> frozenset[str]:
    """Go on holding these; those of them that somebody has asked to let go, or taken for lost."""
    rows = session.execute(
        update(RESIDENCES)
        .where(_held.owner == str(owner))
        .values(until=epoch() + LEASE_SECONDS)
        .returning(_held.revision)
    )
    return frozenset(revisions) - {row.revision for row in rows}


def release(session: Session, revision: str, owner: LeaseOwner) -> None:
    """Hold these weights no longer."""
    session.execute(delete(RESIDENCES).where(_held.revision == revision, _held.owner == str(owner)))


def ask_to_let_go(session: Session, revision: str) -> None:
    """Withdraw every claim on these weights: whoever holds them lets them go, unless they are pinned."""
    session.execute(delete(RESIDENCES).where(_held.revision == revision))


def holders(
    session: Session,
    revision: str,
    *,
    dead_owners: Callable[[LeaseOwner], bool] = LeaseOwner.is_dead_here,
) -> list[LeaseOwner]:
    """Workers that hold these weights, or are loading them."""
    rows = session.execute(
        select(_held.owner).where(_held.revision == revision, _held.until >= epoch())
    )
    return [
        owner for owner in (LeaseOwner.parse(row.owner) for row in rows) if not dead_owners(owner)
    ]


def demands(
    session: Session,
    demand_seconds: float,
    *,
    also_unwanted: bool = True,
    pinned: Iterable[str] = (),
) -> list[Demand]:
    """What is asked of every model that scans wait for, or waited for lately.

    Of registered ones, of those alone that a worker is asked to hold, unless `also_unwanted`. Jobs that follow
    another ask for nothing, nor do those whose result was known.
    """
    step = demand_seconds / STEPS
    age = epoch() - _job.created_at
    asks = (
        _job.kind == JobKind.SCAN,
        _job.queue != keys.CPU_QUEUE,
        _job.leader.is_(None),
        ~_job.cached,
    )
    # Each half is a range of an index of its own, however many jobs have ended.
    waiting = select(
        _job.revision, _job.model, age.label("waited"), literal(WAITING).label("step")
    ).where(_job.finished_at.is_(None), _job.state == JobState.QUEUED, *asks)
    served = select(
        _job.revision, _job.model, literal(0.0).label("waited"), cast(age / step, Integer)
    ).where(
        _job.id >= _id_of(session, REMEMBERED * demand_seconds),
        _job.state != JobState.QUEUED,
        *asks,
    )
    asked = union_all(waiting, served).subquery().c
    grouped = select(
        asked.revision,
        asked.step,
        func.max(asked.model).label("model"),
        func.count().label("jobs"),
        func.max(asked.waited).label("oldest"),
    ).group_by(asked.revision, asked.step)
    unwanted = frozenset[str]() if also_unwanted else _unwanted(session, pinned)
    found: defaultdict[str, list[Demand]] = defaultdict(list)
    for row in session.execute(grouped):
        if row.revision in unwanted:
            continue
        is_waiting = row.step == WAITING
        middle = (row.step + 0.5) * step
        found[row.revision].append(
            Demand(
                revision=row.revision,
                model=row.model,
                waiting=row.jobs if is_waiting else 0,
                oldest_seconds=max(0.0, row.oldest or 0.0) if is_waiting else 0.0,
                recent=0.0 if is_waiting else row.jobs * faded(middle, demand_seconds),
            )
        )
    return [
        Demand(
            revision=revision,
            model=max(parts, key=lambda part: part.waiting).model,
            waiting=sum(part.waiting for part in parts),
            oldest_seconds=max(part.oldest_seconds for part in parts),
            recent=sum(part.recent for part in parts),
        )
        for revision, parts in found.items()
    ]


def next_load(session: Session) -> Demand | None:
    """The model that somebody next has loaded by name, or let go, and how long they have waited."""
    row = session.execute(
        select(_job.revision, _job.model, (epoch() - _job.created_at).label("waited"))
        .where(
            _job.queue == keys.CONTROL_QUEUE,
            _job.finished_at.is_(None),
            _job.state == JobState.QUEUED,
            _job.leader.is_(None),
        )
        .order_by(_job.virtual_start, _job.id)
        .limit(1)
    ).one_or_none()
    return None if row is None else Demand(row.revision, row.model, 1, row.waited, 0.0)


def _unwanted(session: Session, pinned: Iterable[str]) -> frozenset[str]:
    """Registered weights that no worker is asked to hold, by any of their names."""
    rows = session.execute(select(_model.revision, _model.name, _model.wanted)).all()
    pinned = frozenset(pinned)
    wanted = {row.revision for row in rows if row.wanted or row.name in pinned}
    return frozenset(row.revision for row in rows) - wanted


def _id_of(session: Session, seconds_ago: float) -> UUID:
    """The least id of a job that was made no longer ago: ids stand in the order they were made.

    So what was asked lately is one range of the primary key.
    """
    now: float = session.execute(select(epoch())).scalar_one()
    return UUID(int=int((now - seconds_ago) * 1000) << 80)


def costs(session: Session, dtype: str, *, also_guessed: bool = True) -> dict[str, Cost]:
    """What holding each registered model takes, in a data type where it was never measured.

    Also as it was guessed since loading it ran out of memory, unless that is not `also_guessed`.
    """
    rows = session.execute(
        select(
            _model.revision,
            _model.n_parameters,
            _model.weights_bytes,
            _cost.memory_bytes,
            _cost.load_seconds,
        ).outerjoin(MODEL_COSTS, _cost.revision == _model.revision)
    )
    known = {}
    for row in rows:
        estimated = estimate(row.n_parameters, row.weights_bytes, dtype)
        is_guess = row.load_seconds is None
        memory_bytes = None if is_guess and not also_guessed else row.memory_bytes
        known[row.revision] = Cost(
            memory_bytes or estimated.memory_bytes,
            row.load_seconds or estimated.load_seconds,
        )
    return known


def estimate(n_parameters: int, weights_bytes: int, dtype: str) -> Cost:
    """What a model will take that was never loaded."""
    return Cost(
        memory_bytes=int(n_parameters * DTYPE_BYTES[dtype] * BESIDE_WEIGHTS),
        load_seconds=SETUP_SECONDS + weights_bytes / READ_BYTES_A_SECOND,
    )
