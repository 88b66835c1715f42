"""Users, API keys and sessions of the viewer: made, looked up, ended.

Pure SQL on the caller's transaction. Of a key or a session's token only its HMAC-SHA-256 under the
service's pepper is kept: who reads the database cannot make one that fits. A fast keyed hash is right for
256 random bits; passwords would need another.
"""

import hashlib
import hmac
import os
import secrets
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime
from ipaddress import ip_address
from typing import Any

from sqlalchemy import ColumnElement, bindparam, delete, func, insert, or_, select, update
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import Session

from neural_mri.backing.audit import Deed
from neural_mri.backing.database import epoch
from neural_mri.backing.prepared import Prepared
from neural_mri.backing.records import AnyRow
from neural_mri.backing.rows import API_KEYS, LOGINS, USERS
from neural_mri.backing.settings import InvalidSettings, Settings
from neural_mri.contract.auth import (
    ALL_SCOPES,
    KEY_PATTERN,
    AuditAction,
    CreatedKey,
    Identity,
    KeyView,
    Scope,
)
from neural_mri.contract.problems import LimitReached

__all__ = (
    "LOCAL",
    "authenticate",
    "check_bind",
    "close_login",
    "create_key",
    "ensure_user",
    "get_key",
    "key_created",
    "keys_of",
    "load_pepper",
    "lock_user",
    "login_identity",
    "open_login",
    "revoke_key",
)

LOCAL = Identity(user="local", scopes=ALL_SCOPES)
"""Whoever asks, where the service asks for no key: one person at their own machine."""

PEPPER_BYTES = 32
SHORTEST_PEPPER = 16
MOST_KEYS = 100
"""Good ones of one user."""

_key = API_KEYS.c
_login = LOGINS.c
_NO_DIGEST = "0" * 64


def check_bind(settings: Settings) -> None:
    """Without keys the service serves this machine only. Raises `InvalidSettings`."""
    if settings.auth == "off" and not _is_loopback(settings.host):
        raise InvalidSettings(
            f"NEURAL_MRI_HOST is {settings.host!r} and NEURAL_MRI_AUTH is 'off': whoever reaches this "
            "address could do everything. Set NEURAL_MRI_AUTH=keys, or listen on 127.0.0.1"
        )


def _is_loopback(host: str) -> bool:
    with suppress(ValueError):
        return ip_address(host.strip("[]")).is_loopback
    return host == "localhost"


def load_pepper(settings: Settings) -> bytes:
    """The pepper: the setting's, or the data folder's own, made when it is first asked for."""
    if settings.key_pepper:
        if len(settings.key_pepper) < SHORTEST_PEPPER:
            raise InvalidSettings(
                f"NEURAL_MRI_KEY_PEPPER has {len(settings.key_pepper)} characters: expected "
                f"{SHORTEST_PEPPER} random ones or more"
            )
        return settings.key_pepper.encode()
    path = settings.folder / "keys.pepper"
    if not path.exists():
        settings.folder.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(f"{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
        descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(secrets.token_hex(PEPPER_BYTES))
        # Whole or not at all, and the first of two wins.
        with suppress(FileExistsError):
            os.link(beside, path)
        beside.unlink()
    return path.read_text().strip().encode()


def _digest(pepper: bytes, kind: str, text: str) -> str:
    return hmac.new(pepper, f"{kind}:{text}".encode(), hashlib.sha256).hexdigest()


def ensure_user(session: Session, name: str) -> None:
    """Know a user of that name from now on."""
    dialect = session.get_bind().dialect.name
    insert_or = postgresql.insert if dialect == "postgresql" else sqlite.insert
    known = insert_or(USERS).values(name=name, created_at=epoch()).on_conflict_do_nothing()
    session.connection().execute(known)


def lock_user(session: Session, name: str) -> None:
    """Know a user, and let nobody else do so until the transaction ends: what the user has can be counted."""
    ensure_user(session, name)
    own = select(USERS.c.name).where(USERS.c.name == name).with_for_update(key_share=True)
    session.connection().execute(own)


def create_key(
    session: Session,
    pepper: bytes,
    *,
    user: str,
    scopes: Sequence[Scope],
    label: str = "",
    seconds: float | None = None,
    not_after: datetime | None = None,
) -> CreatedKey:
    """Make a key. It expires after `seconds`, and not after `not_after`.

    Raises `LimitReached` for somebody who has more than enough of them.
    """
    # Who makes another for the same user meanwhile counts this one.
    lock_user(session, user)
    good = select(func.count()).select_from(API_KEYS).where(_key.user == user, _is_good())
    if session.connection().execute(good).scalar_one() >= MOST_KEYS:
        raise LimitReached(
            f"{user} has {MOST_KEYS} good API keys, as many as anybody can: revoke some first",
            limit=MOST_KEYS,
        )
    key_id = secrets.token_hex(6)
    text = f"nmri_{key_id}_{secrets.token_urlsafe(32)}"
    ends: list[Any] = [] if seconds is None else [epoch() + seconds]
    if not_after is not None:
        ends.append(not_after.timestamp())
    first = func.least if session.get_bind().dialect.name == "postgresql" else func.min
    row = (
        session.connection()
        .execute(
            insert(API_KEYS)
            .values(
                id=key_id,
                user=user,
                label=label,
                digest=_digest(pepper, "key", text),
                scopes=" ".join(sorted(set(scopes))),
                created_at=epoch(),
                expires_at=(first(*ends) if len(ends) > 1 else ends[0]) if ends else None,
            )
            .returning(*_key)
        )
        .one()
    )
    view = _view(row)
    return CreatedKey(
        id=view.id,
        user=view.user,
        label=view.label,
        scopes=view.scopes,
        created_at=view.created_at,
        expires_at=view.expires_at,
        key=text,
    )


def key_created(key: CreatedKey) -> Deed:
    """The deed that making a key is."""
    details = {"user": key.user, "label": key.label, "scopes": key.scopes}
    return Deed(AuditAction.KEY_CREATED, key.id, details)


def _is_good() -> ColumnElement[bool]:
    return _key.revoked_at.is_(None) & or_(_key.expires_at.is_(None), _key.expires_at > epoch())


_GOOD = Prepared(select(*_key).where(_key.id == bindparam("wanted"), _is_good()))
"""Parameter: wanted. Built once, because every request asks."""


def authenticate(session: Session, pepper: bytes, text: str) -> Identity | None:
    """Whose key this is; None where it is no key, or one unknown, expired or revoked.

    An unknown id takes the same time as a wrong secret.
    """
    match = KEY_PATTERN.fullmatch(text)
    key_id = match[1] if match else ""
    row = _GOOD.run(session, {"wanted": key_id}).one_or_none()
    known = _NO_DIGEST if row is None else row.digest
    fits = hmac.compare_digest(known, _digest(pepper, "key", text))
    if row is None or not fits:
        return None
    return Identity(
        user=row.user, scopes=_scopes(row), key=row.id, expires_at=_moment(row.expires_at)
    )


def keys_of(session: Session, user: str | None = None) -> list[KeyView]:
    """A user's keys, or everybody's, newest first; revoked and expired ones among them."""
    wanted = select(*_key).order_by(_key.created_at.desc(), _key.id)
    if user is not None:
        wanted = wanted.where(_key.user == user)
    return [_view(row) for row in session.connection().execute(wanted)]


def get_key(session: Session, key_id: str) -> KeyView | None:
    """The key of that id."""
    row = session.connection().execute(select(*_key).where(_key.id == key_id)).one_or_none()
    return None if row is None else _view(row)


def revoke_key(session: Session, key_id: str) -> KeyView | None:
    """End a key for good, and every session opened with it; None where there is none of that id."""
    session.connection().execute(delete(LOGINS).where(_login.key_id == key_id))
    row = (
        session.connection()
        .execute(
            update(API_KEYS)
            .where(_key.id == key_id)
            .values(revoked_at=func.coalesce(_key.revoked_at, epoch()))
            .returning(*_key)
        )
        .one_or_none()
    )
    return None if row is None else _view(row)


def open_login(session: Session, pepper: bytes, key_id: str, seconds: float) -> str:
    """A token that stands for the key for so long. Sessions that have ended are forgotten."""
    token = secrets.token_urlsafe(32)
    session.connection().execute(delete(LOGINS).where(_login.expires_at < epoch()))
    session.connection().execute(
        insert(LOGINS).values(
            digest=_digest(pepper, "login", token),
            key_id=key_id,
            created_at=epoch(),
            expires_at=epoch() + seconds,
        )
    )
    return token


def login_identity(session: Session, pepper: bytes, token: str) -> Identity | None:
    """Whose session this is; None once it, or the key it was opened with, has ended."""
    row = (
        session.connection()
        .execute(
            select(*_key, _login.expires_at.label("login_ends"))
            .join(LOGINS, _login.key_id == _key.id)
            .where(
                # Looked up by a keyed hash: what the time tells of it says nothing of the token.
                _login.digest == _digest(pepper, "login", token),
                _login.expires_at > epoch(),
                _is_good(),
            )
        )
        .one_or_none()
    )
    if row is None:
        return None
    ends = row.login_ends if row.expires_at is None else min(row.login_ends, row.expires_at)
    return Identity(user=row.user, scopes=_scopes(row), key=row.id, expires_at=_moment(ends))


def close_login(session: Session, pepper: bytes, token: str) -> None:
    """End a session."""
    ended = _login.digest == _digest(pepper, "login", token)
    session.connection().execute(delete(LOGINS).where(ended))


def _view(row: AnyRow) -> KeyView:
    return KeyView(
        id=row.id,
        user=row.user,
        label=row.label,
        scopes=_scopes(row),
        created_at=datetime.fromtimestamp(row.created_at, UTC),
        expires_at=_moment(row.expires_at),
        revoked_at=_moment(row.revoked_at),
    )


def _scopes(row: AnyRow) -> tuple[Scope, ...]:
    return tuple(Scope(scope) for scope in row.scopes.split())


def _moment(seconds: float | None) -> datetime | None:
    return None if seconds is None else datetime.fromtimestamp(seconds, UTC)
