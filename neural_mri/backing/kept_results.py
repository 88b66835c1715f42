"""Results that sessions keep, and when one is looked at that no session may need any more.

Pure SQL on the caller's transaction. A kept result belongs to its content: any number of sessions name it, and
it goes with the last of them. Who is about to keep one notes it first, and so does who deletes a session that
named it. When a note is due, the reaper looks: what no session names by then it takes away, the note locked
meanwhile, so that whoever comes to keep the same waits, and then puts it there anew.
"""

from collections.abc import Collection
from typing import Any, NamedTuple
from uuid import UUID

from sqlalchemy import delete, exists, func, or_, select
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import Session

from neural_mri.backing.database import epoch
from neural_mri.backing.limits import DAY_SECONDS
from neural_mri.backing.rows import KEPT_RESULTS, SESSION_RESULTS

__all__ = (
    "EXPECTED_SECONDS",
    "LINGER_SECONDS",
    "MOST_TAKEN",
    "Due",
    "due",
    "expect",
    "leave",
    "settle",
)

EXPECTED_SECONDS = 3600.0
"""How long a result is there for the session that is to name it: longer than any request lasts."""
LINGER_SECONDS = 600.0
"""How long it stays after its last session: who has begun to read it goes on."""
MOST_TAKEN = 20
"""Looked at in one transaction."""

_note = KEPT_RESULTS.c
_named = SESSION_RESULTS.c


class Due(NamedTuple):
    """A kept result that is to be looked at."""

    digest: str
    is_needed: bool
    """Whether some session names it."""


def expect(session: Session, digests: Collection[str]) -> None:
    """Note results that are about to be put in the store, and to be named by a session soon after.

    Waits for whoever takes one of them away just now.
    """
    for digest in sorted(
        set(digests)
    ):  # in one order: who notes others of them never waits in turn
        _note_all(session, {"digest": digest, "due": epoch() + EXPECTED_SECONDS})


def leave(session: Session, session_id: UUID) -> None:
    """Note everything that a session keeps, which is about to be deleted."""
    kept = select(_named.digest, (epoch() + LINGER_SECONDS).label("due"))
    # SQLite reads `ON` as a join's where no condition stands before it.
    _note_all(session, kept.where(_named.session_id == session_id).order_by(_named.digest))


def _note_all(session: Session, what: Any) -> None:
    """What is noted already is looked at when it is due last."""
    is_postgresql = session.get_bind().dialect.name == "postgresql"
    insertion: Any = (postgresql.insert if is_postgresql else sqlite.insert)(KEPT_RESULTS)
    if isinstance(what, dict):
        insertion = insertion.values(**what)
    else:
        insertion = insertion.from_select(("digest", "due"), what)
    last = func.greatest if is_postgresql else func.max
    later = {"due": last(_note.due, insertion.excluded.due)}
    session.connection().execute(
        insertion.on_conflict_do_update(index_elements=[_note.digest], set_=later)
    )


def due(session: Session, *, most: int = MOST_TAKEN) -> list[Due]:
    """Results whose time has come, nobody else's until the transaction ends."""
    is_named = exists().where(_named.digest == _note.digest)
    wanted = (
        select(_note.digest)
        # By a clock that was wrong: else it would wait until that time comes.
        .where(or_(_note.due < epoch(), _note.due > epoch() + DAY_SECONDS))
        .order_by(_note.due)
        .limit(most)
        .with_for_update(skip_locked=True)
    )
    run = session.connection().execute
    digests = run(wanted).scalars().all()
    # Seen only now: on PostgreSQL a statement sees what had been committed when it began.
    needed = set(run(select(_note.digest).where(_note.digest.in_(digests), is_named)).scalars())
    return [Due(digest, digest in needed) for digest in digests]


def settle(session: Session, digests: Collection[str]) -> None:
    """They have been seen to."""
    session.connection().execute(delete(KEPT_RESULTS).where(_note.digest.in_(digests)))
