"""Jobs for a reaper to find, and how they stand when it has."""

import time
from collections.abc import Callable
from uuid import UUID

from neural_mri.backing import jobs
from neural_mri.backing.database import Sessions
from neural_mri.backing.jobs import Job, LeaseOwner, Submission
from neural_mri.contract.jobs import JobKind, JobState

__all__ = ("AT_ONCE", "DEAD", "QUEUE", "claim", "eventually", "state", "submit")

QUEUE = "scan.0123456789abcdef"
DEAD = LeaseOwner.here()._replace(start_ticks=1)
AT_ONCE = -60.0
"""For `ABANDONED_SECONDS`: what has just been written has stood for long enough."""


def submit(sessions: Sessions, count: int = 1, scan_key: str | None = None) -> list[Job]:
    asked = Submission(
        owner="ada",
        kind=JobKind.SCAN,
        model="tiny",
        revision="0123456789abcdef" * 4,
        queue=QUEUE,
        request=b"{}",
        scan_key=scan_key,
    )
    return [sessions.write(jobs.submit, asked) for _ in range(count)]


def claim(sessions: Sessions, owner: LeaseOwner = DEAD) -> Job:
    [job] = sessions.write(jobs.claim, queue=QUEUE, owner=owner, limit=1, lease_seconds=60.0)
    return job


def state(sessions: Sessions, job_id: UUID) -> JobState:
    job = sessions.read(jobs.get, job_id)
    assert job is not None
    return job.state


def eventually(holds: Callable[[], bool]) -> bool:
    until = time.monotonic() + 10
    while not holds():
        if time.monotonic() > until:
            return False
        time.sleep(0.01)
    return True
