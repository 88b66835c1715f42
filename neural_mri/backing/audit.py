"""The record of who did what to things that are others' as well: keys, models, limits, running work.

An entry is written in the transaction of the deed: neither is there without the other. Entries are only
ever added. Scans themselves are no entries: the jobs are their own record.
"""

from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, Concatenate, NamedTuple, ParamSpec, TypeVar
from uuid import UUID

import msgspec
from sqlalchemy import insert, select
from sqlalchemy.orm import Session

from neural_mri.backing.database import epoch
from neural_mri.backing.records import new_id
from neural_mri.backing.rows import AUDIT
from neural_mri.contract.auth import ALL_SCOPES, AuditAction, AuditEntry, Identity

__all__ = ("CONSOLE", "Deed", "audited", "entries", "record")

P = ParamSpec("P")
T = TypeVar("T")

CONSOLE = Identity(user="(console)", scopes=ALL_SCOPES)
"""Who works on the server's own machine and needs no key: no user can bear that name."""

_entry = AUDIT.c
_details = msgspec.json.Decoder(dict[str, Any])


class Deed(NamedTuple):
    """What was done, to what."""

    action: AuditAction
    subject: str
    details: dict[str, Any]


def record(session: Session, who: Identity, deed: Deed) -> None:
    """Add an entry."""
    session.connection().execute(
        insert(AUDIT).values(
            id=new_id(),
            at=epoch(),
            user=who.user,
            key_id=who.key,
            action=deed.action,
            subject=deed.subject,
            details=msgspec.json.encode(deed.details).decode(),
        )
    )


def audited(
    session: Session,
    who: Identity,
    deed: Callable[[T], Deed | None],
    work: Callable[Concatenate[Session, P], T],
    *args: P.args,
    **kwargs: P.kwargs,
) -> T:
    """What `work(session, ...)` returns, once the deed that its result tells of is recorded."""
    result = work(session, *args, **kwargs)
    if (done := deed(result)) is not None:
        record(session, who, done)
    return result


def entries(
    session: Session,
    *,
    limit: int,
    before: UUID | None = None,
    user: str | None = None,
    action: AuditAction | None = None,
) -> list[AuditEntry]:
    """The latest entries, newest first, of those before another."""
    wanted = select(*_entry).order_by(_entry.id.desc()).limit(limit)
    if before is not None:
        wanted = wanted.where(_entry.id < before)
    if user is not None:
        wanted = wanted.where(_entry.user == user)
    if action is not None:
        wanted = wanted.where(_entry.action == action)
    return [
        AuditEntry(
            id=row.id,
            at=datetime.fromtimestamp(row.at, UTC),
            user=row.user,
            key=row.key_id,
            action=row.action,
            subject=row.subject,
            details=_details.decode(row.details),
        )
        for row in session.connection().execute(wanted)
    ]
