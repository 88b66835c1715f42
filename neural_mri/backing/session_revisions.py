"""What a session's row and its revisions hold: read, and written under the row's lock.

Pure SQL on the caller's transaction. A revision is written once and never changed; a session's row names the
latest. What changes a session (`sessions`) and what comes into it by itself (`session_arrivals`) both stand on this.
"""

import hashlib
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from typing import Any, NamedTuple
from uuid import UUID

import msgspec
from sqlalchemy import insert, select, update
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import Session

from neural_mri.backing.database import epoch
from neural_mri.backing.kept_results import check_kept
from neural_mri.backing.records import AnyRow
from neural_mri.backing.rows import SESSION_RESULTS, SESSION_REVISIONS, SESSIONS
from neural_mri.contract.archives import canonical
from neural_mri.contract.problems import LimitReached
from neural_mri.contract.sessions import (
    MOST_SCANS,
    Origin,
    SavedScan,
    SessionDocument,
    SessionView,
    UnknownRevision,
    UnknownSession,
)

__all__ = (
    "Opened",
    "Revisions",
    "Saved",
    "advance",
    "decode_document",
    "encode_document",
    "full",
    "locked",
    "moment",
    "of_document",
    "opened",
    "row_of",
    "run",
    "said_of",
    "unknown",
    "view_of",
    "words",
)

_session = SESSIONS.c
_revision = SESSION_REVISIONS.c

_document = msgspec.json.Decoder(SessionDocument)


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


def encode_document(document: SessionDocument) -> bytes:
    """The bytes whose SHA-256 names the revision."""
    return canonical(document)


def decode_document(body: bytes | str) -> SessionDocument:
    """A document as it was saved."""
    return _document.decode(body)


def run(session: Session, statement: Any) -> Any:
    """What a statement gives, within the caller's transaction."""
    return session.connection().execute(statement)


def row_of(session: Session, session_id: UUID) -> AnyRow | None:
    """A session's row."""
    return _row(session, select(*_session).where(_session.id == session_id))


def locked(session: Session, session_id: UUID) -> AnyRow:
    """The same, nobody else's until the transaction ends. Raises `UnknownSession`."""
    row = _row(session, select(*_session).where(_session.id == session_id).with_for_update())
    if row is None:
        raise unknown(session_id)
    return row


def _row(session: Session, wanted: Any) -> AnyRow | None:
    row: AnyRow | None = run(session, wanted).one_or_none()
    return row


def opened(session: Session, session_id: UUID, revision: str | None = None) -> Opened:
    """A session at a revision, the latest where none is named. Raises `UnknownSession`, `UnknownRevision`."""
    row = row_of(session, session_id)
    if row is None:
        raise unknown(session_id)
    wanted = revision or row.head
    found = (
        select(_revision.document)
        .where(_revision.session_id == session_id, _revision.digest == wanted)
        .order_by(_revision.number)
        .limit(1)
    )
    document: str | None = run(session, found).scalar_one_or_none()
    if document is None:
        raise UnknownRevision(
            f"session {session_id} has no revision {wanted[:80]}; the latest is {row.head}",
            session=str(session_id),
            head=row.head,
        )
    return Opened(view_of(row), wanted, document.encode())


def unknown(session_id: UUID) -> UnknownSession:
    """What is said of a session that is not there, or is another's."""
    return UnknownSession(f"there is no session {session_id}", session=str(session_id))


def view_of(row: AnyRow) -> SessionView:
    """The session that a row describes."""
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
        created_at=moment(row.created_at),
        updated_at=moment(row.updated_at),
        links={
            "self": home,
            "results": f"{home}/results",
            "events": f"{home}/events",
            "export": f"{home}/export",
        },
    )


def moment(seconds: float) -> datetime:
    """A time as a row has it."""
    return datetime.fromtimestamp(seconds, UTC)


def of_document(name: str, digest: str, document: SessionDocument) -> dict[str, Any]:
    """What a session's row says of its latest revision."""
    models = sorted({scan.model for scan in document.scans})
    return {
        "head": digest,
        "scans": len(document.scans),
        "models": "".join(f"\n{model}" for model in models) + "\n",
        "words": words(name, document),
        "updated_at": epoch(),
    }


def words(name: str, document: SessionDocument) -> str:
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


class Revisions:
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
        """One more, and what its document keeps."""
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
        """The sessions must be there. Raises `Unavailable` where what they keep was taken away meanwhile."""
        run = session.connection().execute
        if self._rows:
            run(insert(SESSION_REVISIONS).values(created_at=epoch()), self._rows)
        if self._kept:
            check_kept(session, {digest for _, digest in self._kept})
            is_postgresql = session.get_bind().dialect.name == "postgresql"
            insert_or = postgresql.insert if is_postgresql else sqlite.insert
            rows = [{"session_id": each, "digest": digest} for each, digest in sorted(self._kept)]
            run(insert_or(SESSION_RESULTS).on_conflict_do_nothing(), rows)


def advance(
    session: Session,
    row: AnyRow,
    content: SessionDocument,
    author: str,
    message: str,
    revisions: Revisions,
) -> AnyRow:
    """Have a session stand at a new revision, which is to be written; its row from then on."""
    body = encode_document(msgspec.structs.replace(content, parent=row.head))
    digest, number = hashlib.sha256(body).hexdigest(), row.revision + 1
    document = decode_document(body)
    values = {"revision": number, **of_document(row.name, digest, document)}
    changed = update(SESSIONS).where(_session.id == row.id).values(values).returning(*_session)
    after: AnyRow = run(session, changed).one()
    revisions.add(row.id, number, digest, body, document, author, message)
    return after


def said_of(added: Sequence[SavedScan]) -> str:
    """The message of a revision that adds scans."""
    if len(added) > 1:
        return f"Added {len(added)} scans"
    return f"Added {added[0].label or added[0].kind.value}"


def full(row: AnyRow, coming: int = 0) -> LimitReached:
    """What is said where a session has no room for another scan."""
    on_their_way = f", and {coming} are on their way" if coming else ""
    return LimitReached(
        f"session {row.id} holds {row.scans} scans{on_their_way}: {MOST_SCANS} is as many as one can "
        "hold",
        limit=MOST_SCANS,
    )
