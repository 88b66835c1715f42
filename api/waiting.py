"""`Prefer: wait=N` (RFC 7240): an answer held back until the job has ended, or N seconds are over."""

import math
import re
import time

from api.dependencies import Services
from neural_mri.backing.records import Job
from neural_mri.contract.jobs import TERMINAL

__all__ = ("LONGEST_WAIT_SECONDS", "settled", "wait_seconds")

LONGEST_WAIT_SECONDS = 60
RECHECK_SECONDS = 5.0
"""How often the database is asked while nothing is heard."""
BLIND_SECONDS = 0.5
"""The same while Redis is away."""

_WAIT = re.compile(r"(?:^|[,;])\s*wait\s*=\s*\"?(\d{1,9})\"?\s*(?=$|[,;])", re.IGNORECASE)


def wait_seconds(prefer: str | None) -> int | None:
    """The seconds a Prefer header asks to wait for, at most a minute; None where it does not."""
    match = _WAIT.search(prefer or "")
    return min(int(match[1]), LONGEST_WAIT_SECONDS) if match else None


async def settled(
    services: Services, job: Job, seconds: float, *, known_at: float = -math.inf
) -> Job:
    """The job once it has ended, or as it stands after `seconds`.

    `known_at`, on the monotonic clock, is a moment before the job was read: what has been heard since then
    need not be asked. Wakes by its own end, or by that of what it follows; the database has the last word.
    """
    if job.state in TERMINAL or seconds <= 0:
        return job
    until = time.monotonic() + seconds
    with services.hub.ends.waiting() as wait:
        while not services.hub.closing:
            wait.add(job.id, job.source)
            # First to be told, then to look: an end that comes after the look is heard.
            is_heard = services.hub.ends.is_heard
            if not services.hub.ends.nothing_since(known_at, job.id, job.source):
                job = await services.job(job.id)
            known_at = -math.inf
            left = until - time.monotonic()
            if job.state in TERMINAL or left <= 0:
                break
            if job.source in wait.job_ids:
                await wait.pause(min(left, RECHECK_SECONDS if is_heard else BLIND_SECONDS))
    return job
