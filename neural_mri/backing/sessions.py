"""Saved sessions: made, saved, listed, forked, deleted; and the scans that are on their way into one.

Pure SQL on the caller's transaction. A revision is written once and never changed; a session's row names the
latest. Who saves says which revision they had read: where another has been saved since, nothing is written.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from itertools import groupby
from typing import Any, NamedTuple
from uuid import UUID

import msgspec
from sqlalchemy import delete, func, insert, literal, select, tuple_, update
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import Session

from neural_mri.backing.database import epoch
from neural_mri.backing.records import AnyRow, new_id
from neural_mri.backing.rows import (
    JOBS,
    SESSION_ARRIVALS,
    SESSION_RESULTS,
    SESSION_REVISIONS,
    SESSIONS,
    SHARES,
)
from neural_mri.contract.archives import canonical
from neural_mri.contract.problems import InvalidRequest, LimitReached, ProblemDocument
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
    "Opened",
    "Saved",
    "Settled",
    "Settling",
    "Waiting",
    "add_arrival",
    "append",
    "arrivals",
    "arrived",
    "awaiting",
    "change",
    "create",
    "decode_document",
    "delete_session",
    "encode_document",
    "find",
    "fork",
    "holds",
    "keeping",
    "kept_results",
    "opened",
    "page",
    "revisions",
    "save",
    "settle",
    "settle_all",
    "unknown",
)

MOST_SESSIONS = 10_000
"""Of one owner."""
REFUSAL_SECONDS = 86_400.0
"""How long it is told why a scan has not joined."""

_session = SESSIONS.c
_revision = SESSION_REVISIONS.c
_result = SESSION_RESULTS.c
_arrival = SESSION_ARRIVALS.c
_job = JOBS.c

_document = msgspec.json.Decoder(SessionDocument)


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


class Opened(NamedTuple):
    """A session at one of its revisions."""

    view: SessionView
    revision: str
    document: bytes


class Saved(NamedTuple):
    """What a save led to."""

    view: SessionView
    is_new: bool
    """False where nothing had changed: no revision was written."""
    added: tuple[str, ...] = ()
    """Results that the revision before it had not."""


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


def encode_document(document: SessionDocument) -> bytes:
    """The bytes whose SHA-256 names the revision."""
    return canonical(document)


def decode_document(body: bytes | str) -> SessionDocument:
    """A document as it was saved."""
    return _document.decode(body)


def create(session: Session, made: Made) -> SessionView:
    """Make a session of one revision. Raises `LimitReached` for who has more than enough of them."""
    count = select(func.count()).select_from(SESSIONS).where(_session.owner == made.owner)
    if _run(session, count).scalar_one() >= MOST_SESSIONS:
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
        **_of_document(made.name, digest, document),
    }
    row = _run(session, insert(SESSIONS).values(values).returning(*_session)).one()
    first = _Revisions()
    first.add(session_id, 1, digest, made.document, document, made.author, made.message)
    first.write(session)
    return _view(row)


def _of_document(name: str, digest: str, document: SessionDocument) -> dict[str, Any]:
    """What a session's row says of its latest revision."""
    models = sorted({scan.model for scan in document.scans})
    return {
        "head": digest,
        "scans": len(document.scans),
        "models": "".join(f"\n{model}" for model in models) + "\n",
        "words": _words(name, document),
        "updated_at": epoch(),
    }


def _words(name: str, document: SessionDocument) -> str:
    """What a search looks through: the name, notes, captions, labels, models, and every text of a request."""
    texts = [name]
    for scan in document.scans:
        texts += [scan.label, scan.model, scan.kind.value, *_texts(scan.request)]
    texts += [note.text for note in document.notes]
    texts += [image.caption for image in document.key_images]
    return "\n".join(text for text in texts if text).replace("\0", "").casefold()


def _texts(value: Any) -> Iterator[str]:
    match value:
        case str():
            yield value
        case dict():
            for inner in value.values():
                yield from _texts(inner)
        case list() | tuple():
            for inner in value:
                yield from _texts(inner)


class _Revisions:
    """Revisions, and the results that they keep, to be written together."""

    def __init__(self) -> None:
        self._rows: list[dict[str, Any]] = []
        self._kept: dict[tuple[UUID, str], None] = {}

    def add(
        self,
        session_id: UUID,
        number: int,
        digest: str,
        body: bytes,
        document: SessionDocument,
        author: str,
        message: str,
    ) -> None:
        self._rows.append(
            {
                "session_id": session_id,
                "number": number,
                "digest": digest,
                "document": body.decode(),
                "author": author,
                "message": message,
            }
        )
        self._kept |= dict.fromkeys((session_id, scan.result) for scan in document.scans)

    def write(self, session: Session) -> None:
        """The sessions must be there."""
        run = session.connection().execute
        if self._rows:
            run(insert(SESSION_REVISIONS).values(created_at=epoch()), self._rows)
        if self._kept:
            is_postgresql = session.get_bind().dialect.name == "postgresql"
            insert_or = postgresql.insert if is_postgresql else sqlite.insert
            rows = [{"session_id": each, "digest": digest} for each, digest in sorted(self._kept)]
            run(insert_or(SESSION_RESULTS).on_conflict_do_nothing(), rows)


def find(session: Session, session_id: UUID) -> SessionView | None:
    """The session of that id."""
    row = _row(session, session_id)
    return None if row is None else _view(row)


def _row(session: Session, session_id: UUID, *, lock: bool = False) -> AnyRow | None:
    wanted = select(*_session).where(_session.id == session_id)
    row: AnyRow | None = _run(session, wanted.with_for_update() if lock else wanted).one_or_none()
    return row


def opened(session: Session, session_id: UUID, revision: str | None = None) -> Opened:
    """A session at a revision, the latest where none is named. Raises `UnknownSession`, `UnknownRevision`."""
    row = _row(session, session_id)
    if row is None:
        raise unknown(session_id)
    wanted = revision or row.head
    found = (
        select(_revision.document)
        .where(_revision.session_id == session_id, _revision.digest == wanted)
        .order_by(_revision.number)
        .limit(1)
    )
    document: str | None = _run(session, found).scalar_one_or_none()
    if document is None:
        raise UnknownRevision(
            f"session {session_id} has no revision {wanted[:80]}; the latest is {row.head}",
            session=str(session_id),
            head=row.head,
        )
    return Opened(_view(row), wanted, document.encode())


def unknown(session_id: UUID) -> UnknownSession:
    """What is said of a session that is not there, or is another's."""
    return UnknownSession(f"there is no session {session_id}", session=str(session_id))


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
    row = _row(session, session_id, lock=True)
    if row is None:
        raise unknown(session_id)
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
        return Saved(_view(row), is_new=False)
    revisions = _Revisions()
    after = _advance(session, row, content, author, message, revisions)
    revisions.write(session)
    had = {scan.result for scan in before.scans}
    added = tuple(scan.result for scan in content.scans if scan.result not in had)
    return Saved(_view(after), is_new=True, added=added)


def _advance(
    session: Session,
    row: AnyRow,
    content: SessionDocument,
    author: str,
    message: str,
    revisions: _Revisions,
) -> AnyRow:
    """Have a session stand at a new revision, which is to be written; its row from then on."""
    body = encode_document(msgspec.structs.replace(content, parent=row.head))
    digest, number = hashlib.sha256(body).hexdigest(), row.revision + 1
    document = decode_document(body)
    values = {"revision": number, **_of_document(row.name, digest, document)}
    changed = update(SESSIONS).where(_session.id == row.id).values(values).returning(*_session)
    after: AnyRow = _run(session, changed).one()
    revisions.add(row.id, number, digest, body, document, author, message)
    return after


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
    row = _row(session, session_id, lock=True)
    if row is None:
        raise unknown(session_id)
    document = decode_document(opened(session, session_id, row.head).document)
    is_there = any(each.result == scan.result for each in document.scans)
    if not is_there:
        _check_room(session, row)
    if job_id is not None:
        mine = (_arrival.session_id == session_id) & (_arrival.job_id == job_id)
        _run(session, delete(SESSION_ARRIVALS).where(mine))
    if is_there:
        return Saved(_view(row), is_new=False)
    grown = msgspec.structs.replace(document, scans=(*document.scans, scan))
    return _save(session, row, grown, author, _said_of([scan]))


def _check_room(session: Session, row: AnyRow) -> None:
    """Whether a scan may join a session whose row is locked. Raises `LimitReached`."""
    waiting = select(func.count()).where(_arrival.session_id == row.id, _arrival.problem.is_(None))
    coming: int = _run(session, waiting).scalar_one()
    if row.scans + coming >= MOST_SCANS:
        raise _full(row, coming)


def _full(row: AnyRow, coming: int = 0) -> LimitReached:
    on_their_way = f", and {coming} are on their way" if coming else ""
    return LimitReached(
        f"session {row.id} holds {row.scans} scans{on_their_way}: {MOST_SCANS} is as many as one can "
        "hold",
        limit=MOST_SCANS,
    )


def change(
    session: Session, session_id: UUID, *, name: str | None = None, pinned: bool | None = None
) -> SessionView:
    """Rename or pin a session. Raises `UnknownSession`."""
    row = _row(session, session_id, lock=True)
    if row is None:
        raise unknown(session_id)
    values: dict[str, Any] = {}
    if pinned is not None:
        values["pinned"] = pinned
    if name is not None:
        document = decode_document(opened(session, session_id, row.head).document)
        values |= {"name": name, "words": _words(name, document)}
    if values:
        changed = update(SESSIONS).where(_session.id == session_id).values(values)
        row = _run(session, changed.returning(*_session)).one()
    return _view(row)


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
    _row(session, session_id, lock=True)  # whoever adds to it just now does so before or not at all
    for table in (SHARES, SESSION_ARRIVALS, SESSION_RESULTS, SESSION_REVISIONS):
        _run(session, delete(table).where(table.c.session_id == session_id))
    gone = delete(SESSIONS).where(_session.id == session_id).returning(_session.id)
    return _run(session, gone).one_or_none() is not None


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
    rows = _run(session, wanted.order_by(*order).limit(limit + 1)).all()
    more = len(rows) > limit
    shown = rows[:limit]
    last = shown[-1] if more else None
    return SessionPage(
        sessions=tuple(map(_view, shown)),
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
    rows: Sequence[AnyRow] = _run(session, ordered).all()
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
            created_at=_moment(row.created_at),
        )
        for row, parent in zip(rows, parents, strict=False)
    ]


def holds(session: Session, session_id: UUID, result: str) -> bool:
    """Whether some revision of a session names the result."""
    wanted = select(_result.digest).where(
        _result.session_id == session_id, _result.digest == result
    )
    return _run(session, wanted).one_or_none() is not None


def keeping(session: Session, owner: str, result: str) -> list[UUID]:
    """Sessions of an owner some revision of which names the result, those made first before others."""
    wanted = (
        select(_session.id)
        .select_from(SESSION_RESULTS.join(SESSIONS, _session.id == _result.session_id))
        .where(_result.digest == result, _session.owner == owner)
        .order_by(_session.created_at, _session.id)
    )
    return list(_run(session, wanted).scalars())


def kept_results(session: Session) -> frozenset[str]:
    """Every result that some session names: whoever sweeps the store leaves these and their tables."""
    return frozenset(_run(session, select(_result.digest).distinct()).scalars())


# Scans on their way


def add_arrival(session: Session, waiting: Waiting) -> None:
    """Note a scan that joins the session when it has succeeded, unless that is noted.

    Raises `UnknownSession`, and `LimitReached` where there would be no room for it.
    """
    row = _row(session, waiting.session_id, lock=True)
    if row is None:
        raise unknown(waiting.session_id)
    noted = select(_arrival.job_id).where(
        _arrival.session_id == waiting.session_id, _arrival.job_id == waiting.job_id
    )
    if _run(session, noted).one_or_none() is not None:
        return
    _check_room(session, row)
    values = {**waiting._asdict(), "problem": None, "created_at": epoch()}
    _run(session, insert(SESSION_ARRIVALS).values(**values))


_IS_TOLD = _arrival.problem.is_(None) | (_arrival.created_at > epoch() - REFUSAL_SECONDS)
_WAITING = (
    select(_arrival.session_id, _arrival.job_id, _arrival.author, _arrival.label, _arrival.problem)
    .where(_IS_TOLD)
    .order_by(_arrival.created_at, _arrival.job_id)
)


def arrivals(session: Session, session_id: UUID) -> list[Waiting]:
    """Scans on their way into a session, in the order in which they were added; and such as were refused."""
    rows = _run(session, _WAITING.where(_arrival.session_id == session_id))
    return [_waiting(row) for row in rows]


def awaiting(session: Session, job_id: UUID) -> list[Waiting]:
    """Sessions that a scan is on its way into."""
    wanted = _WAITING.where(_arrival.job_id == job_id, _arrival.problem.is_(None))
    return [_waiting(row) for row in _run(session, wanted)]


def arrived(session: Session, owner: str) -> list[Waiting]:
    """Scans on their way into an owner's sessions whose jobs have ended, or are there no more."""
    under_way = select(_job.id).where(_job.id == _arrival.job_id, _job.finished_at.is_(None))
    wanted = _WAITING.where(
        _arrival.session_id.in_(select(_session.id).where(_session.owner == owner)),
        _arrival.problem.is_(None),
        ~under_way.exists(),
    )
    return [_waiting(row) for row in _run(session, wanted)]


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
    revisions = _Revisions()
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
    rows: Sequence[AnyRow] = _run(session, wanted.with_for_update()).all()
    still = select(_arrival.session_id, _arrival.job_id).where(
        _arrival.session_id.in_(ids),
        _arrival.job_id.in_({each.job_id for each in waiting}),
        _arrival.problem.is_(None),
    )
    jobs: dict[UUID, set[UUID]] = {}
    for found in _run(session, still):
        jobs.setdefault(found.session_id, set()).add(found.job_id)
    heads = [(row.id, row.head) for row in rows if row.id in jobs]
    at = tuple_(_revision.session_id, _revision.digest)
    written = select(_revision.session_id, _revision.document).where(at.in_(heads))
    documents = {found.session_id: found.document for found in _run(session, written)}
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
        _run(session, delete(SESSION_ARRIVALS).where(key.in_(joined)))
    refused = [(waiting, each.problem) for waiting, each in ours if each.problem is not None]
    for waiting, problem in refused:
        that = (_arrival.session_id == waiting.session_id) & (_arrival.job_id == waiting.job_id)
        why = msgspec.json.encode(problem).decode()
        told = update(SESSION_ARRIVALS).where(that).values(problem=why, created_at=epoch())
        _run(session, told)
    if refused:
        there = _arrival.session_id.in_({waiting.session_id for waiting, _ in refused})
        _run(session, delete(SESSION_ARRIVALS).where(there, ~_IS_TOLD))


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
    revisions: _Revisions,
) -> _Joined:
    """Add what one author's scans measured to a session that is locked, by one revision, which is to be written."""
    there = {scan.result for scan in document.scans}
    settled: dict[int, Settled] = {}
    added: list[SavedScan] = []
    for number, (_, scan, problem) in arrived.items():
        if scan is None:
            settled[number] = Settled(is_ours=True, problem=problem)
        elif scan.result not in there and len(there) >= MOST_SCANS:
            settled[number] = Settled(is_ours=True, problem=_full(row).document())
        else:
            added += () if scan.result in there else (scan,)
            there.add(scan.result)
    if added:
        grown = msgspec.structs.replace(document, parent=row.head, scans=(*document.scans, *added))
        row = _advance(session, row, grown, author, _said_of(added), revisions)
        document = grown
    results = tuple(scan.result for scan in added)
    joined = Settled(is_ours=True, saved=Saved(_view(row), is_new=bool(added), added=results))
    return _Joined(row, document, {number: settled.get(number, joined) for number in arrived})


def _said_of(added: Sequence[SavedScan]) -> str:
    """The message of a revision that adds scans."""
    if len(added) > 1:
        return f"Added {len(added)} scans"
    return f"Added {added[0].label or added[0].kind.value}"


def _view(row: AnyRow) -> SessionView:
    home = f"/api/sessions/{row.id}"
    return SessionView(
        id=row.id,
        name=row.name,
        owner=row.owner,
        pinned=row.pinned,
        head=row.head,
        revision=row.revision,
        scans=row.scans,
        models=tuple(row.models.split("\n")[1:-1]),
        origin=Origin(row.origin),
        forked_from=row.forked_from,
        created_at=_moment(row.created_at),
        updated_at=_moment(row.updated_at),
        links={
            "self": home,
            "results": f"{home}/results",
            "events": f"{home}/events",
            "export": f"{home}/export",
        },
    )


def _moment(seconds: float) -> datetime:
    return datetime.fromtimestamp(seconds, UTC)


def _run(session: Session, statement: Any) -> Any:
    return session.connection().execute(statement)
