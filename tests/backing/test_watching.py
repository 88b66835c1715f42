"""A reaper on a server, where a transaction locks a row and not the whole database."""

import time

from sqlalchemy import update

from neural_mri.backing import jobs
from neural_mri.backing.broker import SyncRedis
from neural_mri.backing.database import Sessions
from neural_mri.backing.jobs import LeaseOwner
from neural_mri.backing.rows import JOBS
from neural_mri.backing.settings import Settings
from neural_mri.backing.storage import open_store
from neural_mri.contract.jobs import JobState
from tests.backing.making import QUEUE, on_postgresql, submission
from worker.reaper import Reaper


@on_postgresql
def test_whom_another_transaction_has_locked_for_a_moment_is_late_none_the_later(
    settings: Settings, sessions: Sessions, redis: SyncRedis
) -> None:
    """As each renewal of a lease does, of which there are many before a deadline."""
    reaper = Reaper(settings, sessions, redis, open_store(settings))
    job = sessions.write(jobs.submit, submission())
    here = LeaseOwner.here()
    sessions.write(jobs.claim, queue=QUEUE, owner=here, limit=1, lease_seconds=60.0)
    reaper.round()
    seen_at = time.monotonic()
    with sessions.writing() as session:
        session.execute(update(JOBS).values(started_at=JOBS.c.started_at - 6000.0))
        reaper.round()
    with sessions.writing() as session:
        session.execute(update(JOBS).values(deadline_seconds=time.monotonic() - seen_at))
    reaper.round()
    late = sessions.read(jobs.get, job.id)
    assert late is not None
    assert late.state is JobState.EXPIRED
