"""Results that sessions keep, and when one is looked at that no session may need any more.

Pure SQL on the caller's transaction. A kept result belongs to its content: any number of sessions name it, and
it goes with the last of them. Who is about to keep one notes it first, and so does who deletes a session that
named it. When a note is due, the reaper looks, and takes away what no session names by then: it says so in the
note, deletes the bytes, and then the note. Meanwhile nobody can keep the same, and what is neither noted nor
named can be named by nobody: whoever was delayed for so long keeps it anew.
"""

from collections.abc import Collection
from typing import Any
from uuid import UUID

from sqlalchemy import bindparam, delete, func, or_, select, update
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import Session

from neural_mri.backing.database import epoch
from neural_mri.backing.limits import DAY_SECONDS
from neural_mri.backing.rows import KEPT_RESULTS, SESSION_RESULTS
from neural_mri.contract.problems import Unavailable

__all__ = (
    "EXPECTED_SECONDS",
    "LINGER_SECONDS",
    "TAKEN_SECONDS",
    "check_kept",
    "expect",
    "leave",
    "settle",
    "take",
)

EXPECTED_SECONDS = 3600.0
"""How long a result is there for the session that is to name it."""
LINGER_SECONDS = 600.0
"""How long it stays after its last session: who has begun to read it goes on."""
TAKEN_SECONDS = 900.0
"""How long whoever takes it away has for that, before another does; it stops well before."""

_note = KEPT_RESULTS.c
_named = SESSION_RESULTS.c


def expect(session: Session, digests: Collection[str]) -> None:
    """Note results that are about to be put in the store, and to be named by a session soon after.

    Raises `Unavailable` where one of them is being taken away just now.
    """
    if not digests:
        return
    insertion = _insertion(session).values(
        digest=bindparam("digest"), due=epoch() + EXPECTED_SECONDS
    )
    # In one order: who notes others of them never waits in turn.
    rows = [{"digest": digest} for digest in sorted(set(digests))]
    session.connection().execute(_or_later(session, insertion), rows)
    taken = select(_note.digest).where(_note.digest.in_(digests), _note.taken_at.is_not(None))
    if found := session.connection().execute(taken.limit(1)).scalar_one_or_none():
        raise _being_taken(found)


def leave(session: Session, session_id: UUID) -> None:
    """Note everything that a session keeps, which is about to be deleted."""
    kept = select(_named.digest, (epoch() + LINGER_SECONDS).label("due"))
    # SQLite reads `ON` as a join's where no condition stands before it.
    kept = kept.where(_named.session_id == session_id).order_by(_named.digest)
    insertion = _insertion(session).from_select(("digest", "due"), kept)
    session.connection().execute(_or_later(session, insertion))


def _insertion(session: Session) -> Any:
    is_postgresql = session.get_bind().dialect.name == "postgresql"
    return (postgresql.insert if is_postgresql else sqlite.insert)(KEPT_RESULTS)


def _or_later(session: Session, insertion: Any) -> Any:
    """What is noted already is looked at when it is due last."""
    last = func.greatest if session.get_bind().dialect.name == "postgresql" else func.max
    later = {"due": last(_note.due, insertion.excluded.due)}
    return insertion.on_conflict_do_update(index_elements=[_note.digest], set_=later)


def check_kept(session: Session, digests: Collection[str]) -> None:
    """See that results are there for a session that names them from this transaction on.

    Raises `Unavailable` for one that is neither noted nor named: it was taken away meanwhile.
    """
    run = session.connection().execute
    noted = select(_note.digest).where(_note.digest.in_(digests), _note.taken_at.is_(None))
    # So that nobody takes one away who does not see that it is named.
    there = set(run(noted.with_for_update(read=True, key_share=True)).scalars())
    if left := set(digests) - there:
        there |= set(run(select(_named.digest).where(_named.digest.in_(left))).scalars())
    if gone := sorted(set(digests) - there):
        raise _being_taken(gone[0])


def _being_taken(digest: str) -> Unavailable:
    return Unavailable(
        f"the result {digest} was no session's any more and is being taken away: send the request again in "
        "a moment",
        result=digest,
    )


def take(session: Session, *, most: int) -> list[str]:
    """Say of some results that are due, and that no session names, that they are being taken away from now on.

    Of those that are needed after all, the notes are deleted. What somebody began to take away long ago is
    taken away as well.
    """
    run = session.connection().execute
    wanted = (
        select(_note.digest)
        .where(
            or_(
                # By a clock that was wrong: else it would wait until that time comes.
                _note.taken_at.is_(None)
                & or_(_note.due < epoch(), _note.due > epoch() + DAY_SECONDS),
                _note.taken_at < epoch() - TAKEN_SECONDS,
                _note.taken_at > epoch() + DAY_SECONDS,
            )
        )
        .order_by(_note.due)
        .limit(most)
        .with_for_update(skip_locked=True)
    )
    nobodys: list[str] = []
    while not nobodys and (due := run(wanted).scalars().all()):
        # Only now: on PostgreSQL a statement sees what had been committed when it began.
        named = select(_named.digest).where(_named.digest.in_(due)).distinct()
        needed = run(named).scalars().all()
        settle(session, needed)
        nobodys = sorted(set(due) - set(needed))
    run(update(KEPT_RESULTS).where(_note.digest.in_(nobodys)).values(taken_at=epoch()))
    return nobodys


def settle(session: Session, digests: Collection[str]) -> None:
    """They have been seen to."""
    session.connection().execute(delete(KEPT_RESULTS).where(_note.digest.in_(digests)))
