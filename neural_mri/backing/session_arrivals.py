"""Scans on their way into sessions: noted while they run, and joined once they have succeeded.

Pure SQL on the caller's transaction. Whoever looks at a session next sees to those that have arrived; it is done
once, whoever does it, and nobody's save stands in the way of it.
"""

from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import NamedTuple
from uuid import UUID

import msgspec
from sqlalchemy import delete, func, insert, select, tuple_, update
from sqlalchemy.orm import Session

from neural_mri.backing.database import epoch
from neural_mri.backing.records import AnyRow
from neural_mri.backing.rows import JOBS, SESSION_ARRIVALS, SESSION_REVISIONS, SESSIONS
from neural_mri.backing.session_revisions import (
    Revisions,
    Saved,
    advance,
    decode_document,
    full,
    locked,
    run,
    said_of,
    view_of,
)
from neural_mri.contract.problems import ProblemDocument
from neural_mri.contract.sessions import MOST_SCANS, SavedScan, SessionDocument

__all__ = (
    "REFUSAL_SECONDS",
    "Settled",
    "Settling",
    "Waiting",
    "add",
    "arrived",
    "awaiting",
    "check_room",
    "forget",
    "of_session",
    "settle",
    "settle_all",
)

REFUSAL_SECONDS = 86_400.0
"""How long it is told why a scan has not joined."""

_session = SESSIONS.c
_revision = SESSION_REVISIONS.c
_arrival = SESSION_ARRIVALS.c
_job = JOBS.c


class Waiting(NamedTuple):
    """A scan on its way into a session."""

    session_id: UUID
    job_id: UUID
    author: str
    label: str
    problem: ProblemDocument | None = None
    """Why it joins no more."""


class Settling(NamedTuple):
    """A scan that was on its way and has arrived, or joins no more."""

    waiting: Waiting
    scan: SavedScan | None
    problem: ProblemDocument | None = None
    """Why it does not join, where that is to be told."""


class Settled(NamedTuple):
    """What became of a scan that was on its way."""

    is_ours: bool
    """False where another had seen to it."""
    saved: Saved | None = None
    problem: ProblemDocument | None = None
    """Why it does not join."""

    @property
    def is_joined(self) -> bool:
        """Whether nothing is left to be told of it."""
        return self.is_ours and self.problem is None


def add(session: Session, waiting: Waiting) -> None:
    """Note a scan that joins the session when it has succeeded, unless that is noted.

    Raises `UnknownSession`, and `LimitReached` where there would be no room for it.
    """
    row = locked(session, waiting.session_id)
    noted = select(_arrival.job_id).where(
        _arrival.session_id == waiting.session_id, _arrival.job_id == waiting.job_id
    )
    if run(session, noted).one_or_none() is not None:
        return
    check_room(session, row)
    values = {**waiting._asdict(), "problem": None, "created_at": epoch()}
    run(session, insert(SESSION_ARRIVALS).values(**values))


def check_room(session: Session, row: AnyRow) -> None:
    """Whether a scan may join a session whose row is locked. Raises `LimitReached`."""
    waiting = select(func.count()).where(_arrival.session_id == row.id, _arrival.problem.is_(None))
    coming: int = run(session, waiting).scalar_one()
    if row.scans + coming >= MOST_SCANS:
        raise full(row, coming)


def forget(session: Session, session_id: UUID, job_id: UUID) -> None:
    """Wait no longer for a job's scan, and tell no more why it could not join."""
    mine = (_arrival.session_id == session_id) & (_arrival.job_id == job_id)
    run(session, delete(SESSION_ARRIVALS).where(mine))


_IS_TOLD = _arrival.problem.is_(None) | (_arrival.created_at > epoch() - REFUSAL_SECONDS)
_WAITING = (
    select(_arrival.session_id, _arrival.job_id, _arrival.author, _arrival.label, _arrival.problem)
    .where(_IS_TOLD)
    .order_by(_arrival.created_at, _arrival.job_id)
)


def of_session(session: Session, session_id: UUID) -> list[Waiting]:
    """Scans on their way into a session, in the order in which they were added; and such as were refused."""
    rows = run(session, _WAITING.where(_arrival.session_id == session_id))
    return [_waiting(row) for row in rows]


def awaiting(session: Session, job_id: UUID) -> list[Waiting]:
    """Sessions that a scan is on its way into."""
    wanted = _WAITING.where(_arrival.job_id == job_id, _arrival.problem.is_(None))
    return [_waiting(row) for row in run(session, wanted)]


def arrived(session: Session, owner: str) -> list[Waiting]:
    """Scans on their way into an owner's sessions whose jobs have ended, or are there no more."""
    under_way = select(_job.id).where(_job.id == _arrival.job_id, _job.finished_at.is_(None))
    wanted = _WAITING.where(
        _arrival.session_id.in_(select(_session.id).where(_session.owner == owner)),
        _arrival.problem.is_(None),
        ~under_way.exists(),
    )
    return [_waiting(row) for row in run(session, wanted)]


def _waiting(row: AnyRow) -> Waiting:
    problem = None if row.problem is None else msgspec.json.decode(row.problem)
    return Waiting(row.session_id, row.job_id, row.author, row.label, problem)


def settle_all(session: Session, arrived: Iterable[Settling]) -> list[Settled]:
    """`settle` several, in the order in which they were given.

    Those of one session and author that come one after another are one revision.
    """
    given = list(arrived)
    settled = dict.fromkeys(range(len(given)), Settled(is_ours=False))
    coming = _coming(session, [each.waiting for each in given])
    revisions = Revisions()
    numbered = sorted(enumerate(given), key=lambda each: (each[1].waiting.session_id, each[0]))
    for session_id, some in groupby(numbered, lambda each: each[1].waiting.session_id):
        if (found := coming.get(session_id)) is None:
            continue
        row, document, jobs = found
        ours = [each for each in some if each[1].waiting.job_id in jobs]
        for author, joining in groupby(ours, lambda each: each[1].waiting.author):
            join = _join(session, row, document, author, dict(joining), revisions)
            row, document = join.row, join.document
            settled |= join.settled
    revisions.write(session)
    _note(session, [(given[number].waiting, each) for number, each in settled.items()])
    return [settled[number] for number in sorted(settled)]


class _Coming(NamedTuple):
    """A session that is locked, and which of the scans given it still waits for."""

    row: AnyRow
    document: SessionDocument
    jobs: frozenset[UUID]


def _coming(session: Session, waiting: Sequence[Waiting]) -> dict[UUID, _Coming]:
    """Sessions by their ids, those that wait for none of the scans left out."""
    ids = sorted({each.session_id for each in waiting})
    # In one order, so that two who do the same never wait for each other.
    wanted = select(*_session).where(_session.id.in_(ids)).order_by(_session.id)
    rows: Sequence[AnyRow] = run(session, wanted.with_for_update()).all()
    still = select(_arrival.session_id, _arrival.job_id).where(
        _arrival.session_id.in_(ids),
        _arrival.job_id.in_({each.job_id for each in waiting}),
        _arrival.problem.is_(None),
    )
    jobs: dict[UUID, set[UUID]] = {}
    for found in run(session, still):
        jobs.setdefault(found.session_id, set()).add(found.job_id)
    heads = [(row.id, row.head) for row in rows if row.id in jobs]
    at = tuple_(_revision.session_id, _revision.digest)
    written = select(_revision.session_id, _revision.document).where(at.in_(heads))
    documents = {found.session_id: found.document for found in run(session, written)}
    return {
        row.id: _Coming(row, decode_document(documents[row.id]), frozenset(jobs[row.id]))
        for row in rows
        if row.id in jobs
    }


def _note(session: Session, settled: Iterable[tuple[Waiting, Settled]]) -> None:
    """Wait no longer for what was settled; why a scan does not join is told for a while, from now on."""
    ours = [(waiting, each) for waiting, each in settled if each.is_ours]
    key = tuple_(_arrival.session_id, _arrival.job_id)
    joined = [(waiting.session_id, waiting.job_id) for waiting, each in ours if each.is_joined]
    if joined:
        run(session, delete(SESSION_ARRIVALS).where(key.in_(joined)))
    refused = [(waiting, each.problem) for waiting, each in ours if each.problem is not None]
    for waiting, problem in refused:
        that = (_arrival.session_id == waiting.session_id) & (_arrival.job_id == waiting.job_id)
        why = msgspec.json.encode(problem).decode()
        told = update(SESSION_ARRIVALS).where(that).values(problem=why, created_at=epoch())
        run(session, told)
    if refused:
        there = _arrival.session_id.in_({waiting.session_id for waiting, _ in refused})
        run(session, delete(SESSION_ARRIVALS).where(there, ~_IS_TOLD))


def settle(
    session: Session,
    waiting: Waiting,
    scan: SavedScan | None,
    problem: ProblemDocument | None = None,
) -> Settled:
    """Add a scan that was on its way; or wait for it no longer, and remember why where there is a problem."""
    [settled] = settle_all(session, [Settling(waiting, scan, problem)])
    return settled


class _Joined(NamedTuple):
    """What came of adding scans to a session, and where it stands then."""

    row: AnyRow
    document: SessionDocument
    settled: dict[int, Settled]


def _join(
    session: Session,
    row: AnyRow,
    document: SessionDocument,
    author: str,
    arrived: Mapping[int, Settling],
    revisions: Revisions,
) -> _Joined:
    """Add what one author's scans measured to a session that is locked, by one revision, which is to be written."""
    there = {scan.result for scan in document.scans}
    settled: dict[int, Settled] = {}
    added: list[SavedScan] = []
    for number, (_, scan, problem) in arrived.items():
        if scan is None:
            settled[number] = Settled(is_ours=True, problem=problem)
        elif scan.result not in there and len(there) >= MOST_SCANS:
            settled[number] = Settled(is_ours=True, problem=full(row).document())
        else:
            added += () if scan.result in there else (scan,)
            there.add(scan.result)
    if added:
        grown = msgspec.structs.replace(document, parent=row.head, scans=(*document.scans, *added))
        row = advance(session, row, grown, author, said_of(added), revisions)
        document = grown
    results = tuple(scan.result for scan in added)
    joined = Settled(is_ours=True, saved=Saved(view_of(row), is_new=bool(added), added=results))
    return _Joined(row, document, {number: settled.get(number, joined) for number in arrived})
