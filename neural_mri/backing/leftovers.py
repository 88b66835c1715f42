"""Results of attempts that came to nothing: files that no job names, and that none ever will.

A worker names its attempt's result in the transaction that ends the job, while the attempt holds it; who follows
the job names the same in the same transaction, and who finds the result later finds it by a row of its scan that
names it. So once an attempt holds nothing, what no row names is left over. Of a job that this database does not
know, nothing is: the store may be another's as well, or the database older than the store. What becomes of a
result whose job is deleted says `deletion`.

Earlier releases stored a calibration on somebody's texts twice, as its job's result and among models' own. That copy
nobody reads any more.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from itertools import chain
from typing import NamedTuple
from uuid import UUID

from sqlalchemy import bindparam, or_, select
from sqlalchemy.orm import Session

from neural_mri.backing import keys, stored
from neural_mri.backing.keys import Attempt
from neural_mri.backing.rows import JOBS
from neural_mri.backing.storage import Damaged, Missing, Store

__all__ = (
    "Works",
    "aged_calibrations",
    "aged_results",
    "is_nobodys",
    "left_over",
    "works",
)

_job = JOBS.c
_OF_WORKS = select(
    _job.id, _job.leader, _job.attempt, _job.lease_owner, _job.manifest, _job.scan_key
).where(
    or_(
        _job.id.in_(bindparam("works", expanding=True)),
        _job.leader.in_(bindparam("works", expanding=True)),
    )
)
"""Jobs, and whoever followed them or inherited an attempt of theirs. Parameter: works."""
_NAMED = (
    select(_job.manifest)
    .where(
        _job.scan_key.in_(bindparam("scan_keys", expanding=True)),
        _job.manifest.in_(bindparam("paths", expanding=True)),
    )
    .distinct()
)
"""Parameters: scan_keys, paths."""


class Works(NamedTuple):
    """What is known of jobs whose attempts may have left something, and of all who had to do with them."""

    claims: Mapping[UUID, int]
    """Of those that are there: how often they were claimed."""
    held: frozenset[Attempt]
    """Attempts under way, by the ids under which their workers know them."""
    named: frozenset[str]
    """Results, of those asked about, that a job names."""

    def need(self, attempt: Attempt, path: str) -> bool:
        """Whether somebody names the result that a file is part of, or may come to."""
        return attempt in self.held or keys.result_of(path) in self.named


def aged_results(store: Store, older_seconds: float) -> Iterator[str]:
    """Files of attempts' results that have stood for so long; looked for as they are asked for."""
    return chain.from_iterable(store.aged(folder, older_seconds) for folder in keys.ATTEMPTS)


def aged_calibrations(store: Store, older_seconds: float) -> Iterator[list[str]]:
    """Copies of calibrations on somebody's texts that have stood for so long, a folder's at a time."""
    for folder in keys.CALIBRATIONS:
        yield [path for path in store.aged(folder, older_seconds) if _has_texts(store, path)]


def _has_texts(store: Store, path: str) -> bool:
    """Whether a calibration is on texts that somebody gave, or may be: a model's own is measured again."""
    try:
        return bool(stored.load_manifest(store, path).request.get("texts"))
    except Missing:
        return False
    except Damaged:
        return True


def left_over(session: Session, paths: Sequence[str]) -> list[str]:
    """Those of the files that are attempts' which came to nothing.

    An attempt that holds nothing by now never will again.
    """
    attempts = {path: attempt for path in paths if (attempt := keys.attempt_of(path))}
    known = works(session, {attempt.job_id for attempt in attempts.values()}, attempts)
    return [
        path
        for path, attempt in attempts.items()
        if attempt.number <= known.claims.get(attempt.job_id, 0) and not known.need(attempt, path)
    ]


def is_nobodys(session: Session, path: str, scan_key: str | None) -> bool:
    """Whether an attempt that has lost its job leaves a result that nobody names, though the job be deleted by now.

    Only its own worker may ask: to others an unknown job may be another database's.
    """
    attempt = keys.attempt_of(path)
    if attempt is None:
        return False
    scan_keys = () if scan_key is None else (scan_key,)
    return not works(session, {attempt.job_id}, [path], scan_keys).need(attempt, path)


def works(
    session: Session,
    job_ids: AbstractSet[UUID],
    paths: Iterable[str],
    scan_keys: Iterable[str] = (),
) -> Works:
    """What is known of jobs, and which of the results that files are part of a job names.

    `scan_keys` are those of jobs that may be there no more. In a transaction that sees one state.
    """
    run = session.connection().execute
    rows = run(_OF_WORKS, {"works": list(job_ids)}).all()
    scans = {*scan_keys, *(row.scan_key for row in rows if row.scan_key is not None)}
    results = {keys.result_of(path) for path in paths}
    named = run(_NAMED, {"scan_keys": list(scans), "paths": list(results)}).scalars()
    return Works(
        {row.id: row.attempt for row in rows if row.id in job_ids},
        frozenset(
            Attempt(work, row.attempt)
            for row in rows
            if row.lease_owner is not None
            for work in (row.id, row.leader)
            if work is not None
        ),
        frozenset({*named, *(row.manifest for row in rows if row.manifest is not None)}),
    )
