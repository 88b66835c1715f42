"""Links to sessions: made, followed, listed, revoked.

Of a link's token only its HMAC-SHA-256 under the service's pepper is kept: who reads the database cannot
follow one. A fast keyed hash is right for 128 random bits.
"""

import hashlib
import hmac
import secrets
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

from sqlalchemy import func, insert, or_, select, update
from sqlalchemy.orm import Session

from neural_mri.backing import session_revisions
from neural_mri.backing.database import epoch
from neural_mri.backing.records import AnyRow
from neural_mri.backing.rows import SESSIONS, SHARES
from neural_mri.contract.problems import LimitReached
from neural_mri.contract.sessions import CreatedShare, NewShare, ShareAccess, ShareView

__all__ = ("MOST_SHARES", "create", "followed", "of_session", "pseudonym", "revoke")

MOST_SHARES = 100
"""Good ones of one session."""
TOKEN_BYTES = 16

_share = SHARES.c
_session = SESSIONS.c


def _digest(pepper: bytes, text: str) -> str:
    return hmac.new(pepper, f"share:{text}".encode(), hashlib.sha256).hexdigest()


def pseudonym(pepper: bytes, share_id: str, name: str) -> str:
    """What a redacted link calls a result instead of its hash, which a guessed prompt would confirm."""
    return hmac.new(pepper, f"redacted:{share_id}:{name}".encode(), hashlib.sha256).hexdigest()


def create(session: Session, pepper: bytes, session_id: UUID, wanted: NewShare) -> CreatedShare:
    """Make a link. Raises `UnknownSession`, and `LimitReached` for one that has more than enough of them."""
    run = session.connection().execute
    is_there = select(_session.id).where(_session.id == session_id).with_for_update(key_share=True)
    if run(is_there).one_or_none() is None:
        raise session_revisions.unknown(session_id)  # deleted since the caller saw it
    good = (
        select(func.count()).select_from(SHARES).where(_share.session_id == session_id, _is_good())
    )
    if run(good).scalar_one() >= MOST_SHARES:
        raise LimitReached(
            f"session {session_id} has {MOST_SHARES} links, as many as one can: revoke some first",
            limit=MOST_SHARES,
        )
    token = secrets.token_urlsafe(TOKEN_BYTES)
    seconds = wanted.expires_in_seconds
    row = run(
        insert(SHARES)
        .values(
            id=secrets.token_hex(6),
            session_id=session_id,
            digest=_digest(pepper, token),
            access=wanted.access.value,
            redacted=wanted.redact,
            label=wanted.label,
            created_at=epoch(),
            expires_at=None if seconds is None else epoch() + seconds,
            revoked_at=None,
        )
        .returning(*_share)
    ).one()
    return CreatedShare(**_fields(row), token=token, path=f"/#shared={token}")


def _is_good() -> Any:
    return _share.revoked_at.is_(None) & or_(
        _share.expires_at.is_(None), _share.expires_at > epoch()
    )


def followed(session: Session, pepper: bytes, token: str) -> ShareView | None:
    """The link that a token is of; None where it is none, or has expired or been revoked."""
    # Looked up by a keyed hash: what the time tells of it says nothing of the token.
    wanted = select(*_share).where(_share.digest == _digest(pepper, token), _is_good())
    row = session.connection().execute(wanted).one_or_none()
    return None if row is None else ShareView(**_fields(row))


def of_session(session: Session, session_id: UUID) -> list[ShareView]:
    """A session's links, newest first; revoked and expired ones among them."""
    wanted = (
        select(*_share)
        .where(_share.session_id == session_id)
        .order_by(_share.created_at.desc(), _share.id)
    )
    return [ShareView(**_fields(row)) for row in session.connection().execute(wanted)]


def revoke(session: Session, session_id: UUID, share_id: str) -> ShareView | None:
    """End a link for good; None where the session has none of that id."""
    ended = (
        update(SHARES)
        .where(_share.session_id == session_id, _share.id == share_id)
        .values(revoked_at=func.coalesce(_share.revoked_at, epoch()))
        .returning(*_share)
    )
    row = session.connection().execute(ended).one_or_none()
    return None if row is None else ShareView(**_fields(row))


def _fields(row: AnyRow) -> dict[str, Any]:
    return {
        "id": row.id,
        "session": row.session_id,
        "access": ShareAccess(row.access),
        "redacted": row.redacted,
        "label": row.label,
        "created_at": datetime.fromtimestamp(row.created_at, UTC),
        "expires_at": _moment(row.expires_at),
        "revoked_at": _moment(row.revoked_at),
    }


def _moment(seconds: float | None) -> datetime | None:
    return None if seconds is None else datetime.fromtimestamp(seconds, UTC)
