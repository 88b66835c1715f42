"""Saved sessions: made, saved, listed, forked, deleted.

Pure SQL on the caller's transaction. Who saves says which revision they had read: where another has been saved since,
nothing is written.
"""

import hashlib
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, NamedTuple
from uuid import UUID

import msgspec
from sqlalchemy import delete, func, insert, literal, select, tuple_, update
from sqlalchemy.orm import Session

from neural_mri.backing import kept_results, session_arrivals
from neural_mri.backing.access import lock_user
from neural_mri.backing.database import epoch
from neural_mri.backing.records import AnyRow, new_id
from neural_mri.backing.rows import (
    SESSION_ARRIVALS,
    SESSION_RESULTS,
    SESSION_REVISIONS,
    SESSIONS,
    SHARES,
)
from neural_mri.backing.session_revisions import (
    Opened,
    Revisions,
    Saved,
    advance,
    decode_document,
    locked,
    moment,
    of_document,
    opened,
    row_of,
    run,
    said_of,
    view_of,
    words,
)
from neural_mri.contract.problems import InvalidRequest, LimitReached
from neural_mri.contract.sessions import (
    MOST_SCANS,
    Origin,
    PreconditionFailed,
    RevisionView,
    SavedScan,
    SessionDocument,
    SessionPage,
    SessionView,
    UnknownRevision,
    UnknownSession,
)

__all__ = (
    "MOST_SESSIONS",
    "Made",
    "append",
    "change",
    "create",
    "delete_session",
    "find",
    "fork",
    "holds",
    "keeping",
    "page",
    "revisions",
    "save",
)

MOST_SESSIONS = 10_000
"""Of one owner."""

_session = SESSIONS.c
_revision = SESSION_REVISIONS.c
_result = SESSION_RESULTS.c


class Made(NamedTuple):
    """A session to be."""

    owner: str
    name: str
    document: bytes
    """Canonical JSON."""
    author: str
    message: str = ""
    origin: Origin = Origin.MADE
    forked_from: UUID | None = None


def create(session: Session, made: Made) -> SessionView:
    """Make a session of one revision. Raises `LimitReached` for who has more than enough of them."""
    lock_user(session, made.owner)
    count = select(func.count()).select_from(SESSIONS).where(_session.owner == made.owner)
    if run(session, count).scalar_one() >= MOST_SESSIONS:
        raise LimitReached(
            f"you have {MOST_SESSIONS} sessions, as many as anybody can: delete some first",
            limit=MOST_SESSIONS,
        )
    document = decode_document(made.document)
    session_id, digest = new_id(), hashlib.sha256(made.document).hexdigest()
    values = {
        "id": session_id,
        "owner": made.owner,
        "name": made.name,
        "pinned": False,
        "origin": made.origin.value,
        "forked_from": made.forked_from,
        "revision": 1,
        "created_at": epoch(),
        **of_document(made.name, digest, document),
    }
    row = run(session, insert(SESSIONS).values(values).returning(*_session)).one()
    first = Revisions()
    first.add(session_id, 1, digest, made.document, document, made.author, made.message)
    first.write(session)
    return view_of(row)


def find(session: Session, session_id: UUID) -> SessionView | None:
    """The session of that id."""
    row = row_of(session, session_id)
    return None if row is None else view_of(row)


def save(
    session: Session,
    session_id: UUID,
    content: SessionDocument,
    *,
    over: str | None,
    author: str,
    message: str = "",
) -> Saved:
    """Write a revision over the one that was read, or over whatever is there; none where nothing has changed.

    Scans that have come to it since are nobody's edit: they stay, behind those that are saved. Raises
    `PreconditionFailed`, which names the latest, where anything else is another by now.
    """
    row = locked(session, session_id)
    if over is not None and row.head != over:
        added = _added_since(session, row, over)
        named = {scan.result for scan in content.scans}
        scans = (*content.scans, *(scan for scan in added or () if scan.result not in named))
        if added is None or len(scans) > MOST_SCANS:
            raise PreconditionFailed(
                f"session {session_id} stands at revision {row.head} (number {row.revision}) by now, and "
                f"not at {over[:80]}: read it, and save over that",
                session=str(session_id),
                head=row.head,
                number=row.revision,
            )
        content = msgspec.structs.replace(content, scans=scans)
    return _save(session, row, content, author, message)


def _added_since(session: Session, row: AnyRow, over: str) -> tuple[SavedScan, ...] | None:
    """Scans that were added behind those of a revision; None where something else was changed, or there is no such."""
    try:
        before = decode_document(opened(session, row.id, over).document)
    except UnknownRevision:
        return None
    now = decode_document(opened(session, row.id, row.head).document)
    count = len(before.scans)
    as_it_was = msgspec.structs.replace(now, parent=before.parent, scans=now.scans[:count])
    return now.scans[count:] if as_it_was == before else None


def _save(
    session: Session, row: AnyRow, content: SessionDocument, author: str, message: str
) -> Saved:
    before = decode_document(opened(session, row.id, row.head).document)
    if msgspec.structs.replace(content, parent=before.parent) == before:
        return Saved(view_of(row), is_new=False)
    revisions = Revisions()
    after = advance(session, row, content, author, message, revisions)
    revisions.write(session)
    had = {scan.result for scan in before.scans}
    added = tuple(scan.result for scan in content.scans if scan.result not in had)
    return Saved(view_of(after), is_new=True, added=added)


def append(
    session: Session,
    session_id: UUID,
    scan: SavedScan,
    *,
    author: str,
    job_id: UUID | None = None,
) -> Saved:
    """Add a scan to whatever the session holds: nobody's save stands in the way of it.

    `job_id` is whose result it is: why that could not join before is told no more. Raises `UnknownSession`, and `LimitReached` where there is no room.
    """
    row = locked(session, session_id)
    document = decode_document(opened(session, session_id, row.head).document)
    is_there = any(each.result == scan.result for each in document.scans)
    if not is_there:
        session_arrivals.check_room(session, row)
    if job_id is not None:
        session_arrivals.forget(session, session_id, job_id)
    if is_there:
        return Saved(view_of(row), is_new=False)
    grown = msgspec.structs.replace(document, scans=(*document.scans, scan))
    return _save(session, row, grown, author, said_of([scan]))


def change(
    session: Session, session_id: UUID, *, name: str | None = None, pinned: bool | None = None
) -> SessionView:
    """Rename or pin a session. Raises `UnknownSession`."""
    row = locked(session, session_id)
    values: dict[str, Any] = {}
    if pinned is not None:
        values["pinned"] = pinned
    if name is not None:
        document = decode_document(opened(session, session_id, row.head).document)
        values |= {"name": name, "words": words(name, document)}
    if values:
        changed = update(SESSIONS).where(_session.id == session_id).values(values)
        row = run(session, changed.returning(*_session)).one()
    return view_of(row)


def fork(
    session: Session, source: Opened, *, owner: str, name: str | None, author: str
) -> SessionView:
    """A session of somebody's own that begins where another stands: its first revision is the same."""
    return create(
        session,
        Made(
            owner=owner,
            name=name or source.view.name,
            document=source.document,
            author=author,
            message=f"Forked from {source.view.id}",
            origin=Origin.FORKED,
            forked_from=source.view.id,
        ),
    )


def delete_session(session: Session, session_id: UUID) -> bool:
    """Forget a session, its revisions and its links; whether there was one."""
    with suppress(UnknownSession):
        locked(session, session_id)  # whoever adds to it just now does so before or not at all
    kept_results.leave(session, session_id)
    for table in (SHARES, SESSION_ARRIVALS, SESSION_RESULTS, SESSION_REVISIONS):
        run(session, delete(table).where(table.c.session_id == session_id))
    gone = delete(SESSIONS).where(_session.id == session_id).returning(_session.id)
    return run(session, gone).one_or_none() is not None


def page(
    session: Session,
    owner: str,
    *,
    limit: int,
    query: str = "",
    model: str | None = None,
    pinned: bool | None = None,
    after: str | None = None,
) -> SessionPage:
    """Some of an owner's sessions: the pinned ones, then those saved last.

    Each word of a query must stand in the session's name, notes, prompts, labels or models. Raises
    `InvalidRequest` for an `after` that no page has named.
    """
    place = tuple_(_session.pinned, _session.updated_at, _session.id)
    wanted = select(*_session).where(_session.owner == owner)
    # Not by LIKE: to SQLite's small letters and capitals are the same, but gpt2 and GPT2 are two models.
    is_postgresql = session.get_bind().dialect.name == "postgresql"
    position = func.strpos if is_postgresql else func.instr
    for word in query.casefold().split():
        wanted = wanted.where(position(_session.words, word) > 0)
    if model is not None:
        wanted = wanted.where(position(_session.models, f"\n{model}\n") > 0)
    if pinned is not None:
        wanted = wanted.where(_session.pinned.is_(pinned))
    if after is not None:
        wanted = wanted.where(place < _place_of(after))
    order = (_session.pinned.desc(), _session.updated_at.desc(), _session.id.desc())
    rows = run(session, wanted.order_by(*order).limit(limit + 1)).all()
    more = len(rows) > limit
    shown = rows[:limit]
    last = shown[-1] if more else None
    return SessionPage(
        sessions=tuple(map(view_of, shown)),
        next=None if last is None else f"{int(last.pinned)}_{last.updated_at!r}_{last.id}",
    )


def _place_of(text: str) -> Any:
    parts = text.split("_")
    try:
        pinned, updated_at, session_id = parts
        place = (bool(int(pinned)), float(updated_at), UUID(session_id))
    except ValueError as error:
        raise InvalidRequest(
            f"after is {text[:100]!r}: expected what a page of sessions gives as `next`"
        ) from error
    types = (_session.pinned.type, _session.updated_at.type, _session.id.type)
    return tuple_(*(literal(value, kind) for value, kind in zip(place, types, strict=True)))


def revisions(
    session: Session, session_id: UUID, *, limit: int, before: int | None = None
) -> list[RevisionView]:
    """Saves of a session, the latest first, of those before a number. Reads no document but the first."""
    columns = (_revision.number, _revision.digest, _revision.author, _revision.message)
    wanted = select(*columns, _revision.created_at).where(_revision.session_id == session_id)
    if before is not None:
        wanted = wanted.where(_revision.number < before)
    # One more, to know what the last of them was saved over.
    ordered = wanted.order_by(_revision.number.desc()).limit(limit + 1)
    rows: Sequence[AnyRow] = run(session, ordered).all()
    parents = [row.digest for row in rows[1:]]
    if rows and len(rows) <= limit:
        first = opened(session, session_id, rows[-1].digest)
        parents.append(decode_document(first.document).parent)
    return [
        RevisionView(
            number=row.number,
            revision=row.digest,
            parent=parent,
            author=row.author,
            message=row.message,
            created_at=moment(row.created_at),
        )
        for row, parent in zip(rows, parents, strict=False)
    ]


def holds(session: Session, session_id: UUID, result: str) -> bool:
    """Whether some revision of a session names the result."""
    wanted = select(_result.digest).where(
        _result.session_id == session_id, _result.digest == result
    )
    return run(session, wanted).one_or_none() is not None


def keeping(session: Session, owner: str, result: str) -> list[UUID]:
    """Sessions of an owner some revision of which names the result, those made first before others."""
    wanted = (
        select(_session.id)
        .select_from(SESSION_RESULTS.join(SESSIONS, _session.id == _result.session_id))
        .where(_result.digest == result, _session.owner == owner)
        .order_by(_session.created_at, _session.id)
    )
    return list(run(session, wanted).scalars())
