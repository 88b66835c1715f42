"""Idempotency keys: a request that is sent again, because its answer was lost, makes no second job.

A key is its caller's own, and is remembered for a day. It stands for the request as it was understood:
sent again with another one it is refused, because one of the two cannot be what was meant.
"""

import hashlib
from functools import cache
from uuid import UUID

import msgspec
from sqlalchemy import bindparam, delete, select
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import Session

from neural_mri.backing.database import epoch
from neural_mri.backing.prepared import Prepared
from neural_mri.backing.records import Submission
from neural_mri.backing.rows import IDEMPOTENCY_KEYS
from neural_mri.contract.problems import Unprocessable

__all__ = ("REMEMBERED_SECONDS", "IdempotencyKeyReused", "job_made_by")

REMEMBERED_SECONDS = 86_400.0
FORGETS_ONE_IN = 256
"""Submissions, of which one looks through its caller's keys for old ones: they only take room, and the client sends a
key with each."""

_key = IDEMPOTENCY_KEYS.c
_IS_FORGOTTEN = _key.created_at < epoch() - REMEMBERED_SECONDS


class IdempotencyKeyReused(Unprocessable):
    """This Idempotency-Key has been sent with another request."""


@cache
def _take(dialect: str, *, is_anew: bool) -> Prepared:
    """Lets a key stand for a job, unless it stands for one; waits for who is doing the same.

    Parameters: who, word, digest, made.
    """
    insert_or = postgresql.insert if dialect == "postgresql" else sqlite.insert
    insertion = insert_or(IDEMPOTENCY_KEYS).values(
        owner=bindparam("who"),
        key=bindparam("word"),
        request_digest=bindparam("digest"),
        job_id=bindparam("made"),
        created_at=epoch(),
    )
    new = insertion.excluded
    taking = insertion.on_conflict_do_update(
        index_elements=[_key.owner, _key.key],
        set_={
            "request_digest": new.request_digest,
            "job_id": new.job_id,
            "created_at": new.created_at,
        },
        where=None if is_anew else _IS_FORGOTTEN,
    )
    return Prepared(taking.returning(_key.job_id))


_KNOWN = Prepared(
    select(_key.request_digest, _key.job_id).where(
        _key.owner == bindparam("who"), _key.key == bindparam("word")
    )
)
_FORGET = delete(IDEMPOTENCY_KEYS).where(_key.owner == bindparam("who"), _IS_FORGOTTEN)


def job_made_by(
    session: Session, submission: Submission, job_id: UUID, *, is_anew: bool = False
) -> UUID | None:
    """The job that the submission's key has made; None where it may make `job_id` now.

    `is_anew` lets it make another in place of one whose result is lost. Raises `IdempotencyKeyReused`.
    """
    word = submission.idempotency_key
    if word is None:
        return None
    key = {"who": submission.owner, "word": word}
    digest = _digest(submission)
    taking = _take(session.get_bind().dialect.name, is_anew=is_anew)
    taken = taking.run(session, key | {"digest": digest, "made": job_id})
    if taken.scalar_one_or_none() is not None:
        if job_id.int % FORGETS_ONE_IN == 0:
            session.connection().execute(_FORGET, {"who": submission.owner})
        return None
    known = _KNOWN.run(session, key).one()
    if known.request_digest != digest:
        raise IdempotencyKeyReused(
            f"the Idempotency-Key {word!r} was sent with another request within the last "
            f"{REMEMBERED_SECONDS / 3600:.0f} hours: a new request needs a new key",
            key=word,
            job=str(known.job_id),
        )
    made: UUID = known.job_id
    return made


def _digest(submission: Submission) -> str:
    """What the request asks for, with its defaults written out."""
    asked = (submission.kind, submission.lane, submission.request.decode())
    return hashlib.sha256(msgspec.json.encode(asked)).hexdigest()
