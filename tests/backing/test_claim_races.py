"""Several processes at one database."""

import multiprocessing
from multiprocessing.queues import Queue
from uuid import UUID

from neural_mri.backing import database, jobs
from neural_mri.backing.database import Sessions
from neural_mri.backing.jobs import LeaseOwner
from neural_mri.backing.settings import Settings
from neural_mri.contract.jobs import JobState
from tests.backing.making import QUEUE, submission

JOBS = 300


def claim_all(settings: Settings, found: "Queue[list[tuple[UUID, int]]]") -> None:
    """Claim and finish until nothing is left; report what was claimed."""
    sessions = database.sessions(settings)
    owner = LeaseOwner.here()
    claimed = []
    while batch := sessions.write(
        jobs.claim, queue=QUEUE, owner=owner, limit=3, lease_seconds=60.0
    ):
        for job in batch:
            claimed.append((job.id, job.attempt))
            assert sessions.write(jobs.advance, job.id, JobState.FAILED, attempt=job.attempt)
    sessions.close()
    found.put(claimed)


def test_two_processes_never_claim_the_same_job(settings: Settings, sessions: Sessions) -> None:
    for index in range(JOBS):
        sessions.write(jobs.submit, submission(owner=f"u{index % 5}"))
    spawn = multiprocessing.get_context("spawn")
    found: Queue[list[tuple[UUID, int]]] = spawn.Queue()
    workers = [spawn.Process(target=claim_all, args=(settings, found)) for _ in range(2)]
    for worker in workers:
        worker.start()
    claims = [claim for _ in workers for claim in found.get(timeout=30)]
    for worker in workers:
        worker.join(10)
    assert len(claims) == JOBS
    assert len({job_id for job_id, _ in claims}) == JOBS
    assert {attempt for _, attempt in claims} == {1}
