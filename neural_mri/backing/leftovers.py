"""Results of attempts that came to nothing: files that no job names, and that none ever will.

A worker names its attempt's file in the transaction that ends the job, while the attempt holds it; who follows
the job names the same file in the same transaction, and who finds the result later finds it by that row. So once
an attempt holds nothing, what no row names is left over. Of a job that this database does not know, nothing is:
the store may be another's as well, or the database older than the store.
"""

from collections.abc import Iterator, Sequence
from itertools import chain

from sqlalchemy import bindparam, or_, select
from sqlalchemy.orm import Session

from neural_mri.backing import keys
from neural_mri.backing.keys import Attempt
from neural_mri.backing.rows import JOBS
from neural_mri.backing.storage import Store

__all__ = ("aged_results", "left_over")

_job = JOBS.c
_OF_WORKS = select(_job.id, _job.leader, _job.attempt, _job.lease_owner, _job.manifest).where(
    or_(
        _job.id.in_(bindparam("works", expanding=True)),
        _job.leader.in_(bindparam("works", expanding=True)),
    )
)
"""Jobs, and whoever followed them or inherited an attempt of theirs. Parameter: works."""


def aged_results(store: Store, older_seconds: float) -> Iterator[str]:
    """Files of attempts' results that have stood for so long; looked for as they are asked for."""
    return chain.from_iterable(store.aged(folder, older_seconds) for folder in keys.ATTEMPTS)


def left_over(session: Session, paths: Sequence[str]) -> list[str]:
    """Those of the files that are attempts' which came to nothing.

    One statement sees it all: an attempt that holds nothing by now never will again.
    """
    attempts = {path: attempt for path in paths if (attempt := keys.attempt_of(path))}
    works = {attempt.job_id for attempt in attempts.values()}
    rows = session.connection().execute(_OF_WORKS, {"works": list(works)}).all()
    claims = {row.id: row.attempt for row in rows if row.id in works}
    held = {
        Attempt(work, row.attempt)
        for row in rows
        if row.lease_owner is not None
        for work in (row.id, row.leader)
    }
    named = {row.manifest for row in rows}
    return [
        path
        for path, attempt in attempts.items()
        if attempt.number <= claims.get(attempt.job_id, 0)
        and attempt not in held
        and path not in named
    ]
