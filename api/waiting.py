"""`Prefer: wait=N` (RFC 7240): an answer held back until the job has ended, or N seconds are over."""

import re
import time
from uuid import UUID

from api.dependencies import Services
from api.hub import Listener
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


async def settled(services: Services, job: Job, seconds: float) -> Job:
    """The job once it has ended, or as it stands after `seconds`.

    Wakes by the job's own event, or by the end of what it follows; the database has the last word.
    """
    if job.state in TERMINAL or seconds <= 0:
        return job
    until = time.monotonic() + seconds
    listener = Listener(only="ended")
    joined: set[UUID] = set()
    try:
        while not services.hub.closing:
            for topic in {job.id, job.source} - joined:
                services.hub.join(topic, listener)
                joined.add(topic)
            # First live, then look: an end that comes after the look is heard.
            heard = await services.hub.live(job.source, min(1.0, seconds))
            job = await services.job(job.id)
            left = until - time.monotonic()
            if job.state in TERMINAL or left <= 0:
                break
            if job.source in joined:
                await listener.news(min(left, RECHECK_SECONDS if heard else BLIND_SECONDS))
    finally:
        for topic in joined:
            services.hub.leave(topic, listener)
    return job
