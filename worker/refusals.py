"""Telling those who wait in vain: nobody waits for what will not come.

In vain is waiting for weights that no model has any longer, for a model that fits into no worker's memory, and
for one that would fit if others did not have that memory, once it has been so for as long as anybody waits
patiently.
"""

import secrets
import threading
import time
from collections.abc import Sequence
from typing import NamedTuple

import structlog

from neural_mri.backing import events, jobs, keys
from neural_mri.backing.database import Sessions
from neural_mri.backing.leases import LeaseOwner
from neural_mri.backing.placement import Cost, Demand, WorkerRoom
from neural_mri.backing.settings import Settings
from neural_mri.contract.jobs import JobState
from neural_mri.contract.problems import Problem, Unavailable
from worker import metrics
from worker.admission import OutOfMemory, shown
from worker.reporter import Outbox
from worker.scans import ModelChanged

__all__ = ("InternalError", "Refusals", "Refused", "Seen", "incident", "too_large")

HOPELESS_SECONDS = 10.0
"""How long a model that fits nowhere may wait for a worker with more memory to come up."""
AT_ONCE = 64

log = structlog.get_logger(__name__)


class InternalError(Problem):
    """The job failed for a reason of the service's own."""

    status = 500


class Seen(NamedTuple):
    """What there is to decide about."""

    rooms: tuple[WorkerRoom, ...]
    """This worker's first."""
    demands: tuple[Demand, ...]
    costs: dict[str, Cost]
    """Of every registered model."""
    are_all_heard: bool
    """Whether the other workers' heartbeats could be read."""


class Refused(NamedTuple):
    """Weights that are waited for in vain, and what is said of them."""

    revision: str
    problem: Problem


class Refusals:
    """One worker's part in it."""

    def __init__(
        self, *, settings: Settings, sessions: Sessions, owner: LeaseOwner, outbox: Outbox
    ) -> None:
        self._settings = settings
        self._sessions = sessions
        self._owner = owner
        self._outbox = outbox
        self._lock = threading.Lock()
        self._crowded_since: dict[str, float] = {}
        """Since when others have the memory for these weights, on the monotonic clock."""

    def due(self, seen: Seen) -> list[Refused]:
        """What waits in vain. Called by any thread, at every look: it counts how long that has been so."""
        now = time.monotonic()
        waiting = [
            each
            for each in seen.demands
            if each.waiting and each.oldest_seconds >= HOPELESS_SECONDS
        ]
        found = []
        with self._lock:
            revisions = {demand.revision for demand in waiting}
            for revision in self._crowded_since.keys() - revisions:
                del self._crowded_since[revision]
            for demand in waiting:
                problem = self._problem(demand, seen, now)
                if problem is not None:
                    found.append(Refused(demand.revision, problem))
        return found

    def _problem(self, demand: Demand, seen: Seen, now: float) -> Problem | None:
        cost = seen.costs.get(demand.revision)
        if cost is None:
            return ModelChanged(
                f"{demand.model} no longer has the weights {demand.revision[:16]}: send the request again",
                model=demand.model,
            )
        if not seen.are_all_heard:
            return None
        if any(room.holds(demand.revision) for room in seen.rooms):
            self._crowded_since.pop(demand.revision, None)
            return None
        large_enough = [room for room in seen.rooms if room.most_bytes >= cost.memory_bytes]
        if not large_enough:
            return too_large(demand.model, cost, seen.rooms)
        if (
            self._seconds_crowded(demand, cost, large_enough, now)
            < self._settings.model_patience_seconds
        ):
            return None
        return too_large(demand.model, cost, seen.rooms)

    def _seconds_crowded(
        self, demand: Demand, cost: Cost, rooms: Sequence[WorkerRoom], now: float
    ) -> float:
        """For how long others have had the memory on all workers that have as much; -1 where that is not sure now."""
        resting = [room for room in rooms if room.resting]
        if any(room.could_have_bytes >= cost.memory_bytes for room in resting):
            self._crowded_since.pop(demand.revision, None)
            return -1.0
        if len(resting) < len(rooms):
            return -1.0  # what is missing may come back when a scan ends
        if demand.revision not in self._crowded_since:
            self._crowded_since[demand.revision] = now
            log.warning(
                "model_crowded_out",
                model=demand.model,
                memory_bytes=cost.memory_bytes,
                could_have_bytes=max(room.could_have_bytes for room in rooms),
            )
        return now - self._crowded_since[demand.revision]

    def refuse(self, revision: str, problem: Problem) -> None:
        """End every job that waits for these weights."""
        queue = keys.scan_queue(revision)
        try:
            while claimed := self._sessions.write(
                jobs.claim,
                queue=queue,
                owner=self._owner,
                limit=AT_ONCE,
                lease_seconds=self._settings.lease_seconds,
            ):
                for job in claimed:
                    ended = self._sessions.write(
                        jobs.advance,
                        job.id,
                        JobState.FAILED,
                        attempt=job.attempt,
                        problem=problem.document(),
                    )
                    if ended is not None:
                        metrics.ENDED.labels(job.model, JobState.FAILED.value).inc()
                        self._outbox.post(job.id, events.change_of(ended))
        except Unavailable as error:
            log.warning("jobs_not_refused", queue=queue, error=str(error))


def too_large(model: str, cost: Cost, rooms: Sequence[WorkerRoom]) -> OutOfMemory:
    """That no worker has so much memory for a model, or could have it now."""
    most = max(0, *(room.most_bytes for room in rooms))
    could_have = max(0, *(room.could_have_bytes for room in rooms))
    if could_have < cost.memory_bytes <= most:
        has = (
            f"could have at most {shown(could_have)} for it now: of the {shown(most)} beside the models that "
            "are pinned others have the rest. Close what takes it; else"
        )
    else:
        could_have = most
        has = f"has at most {shown(most)} for it beside the models that are pinned:"
    return OutOfMemory(
        f"{model} takes about {shown(cost.memory_bytes)}, and a worker {has} a smaller model, or a worker "
        "with more memory (NEURAL_MRI_MEMORY_BYTES) is needed",
        model=model,
        estimated_bytes=cost.memory_bytes,
        budget_bytes=could_have,
    )


def incident(event: str, error: Exception) -> InternalError:
    """What is told of an error that nobody foresaw; the log has the rest, as this event."""
    number = secrets.token_hex(4)
    log.error(event, incident=number, exc_info=error)
    return InternalError(
        f"the service failed; its log knows more under incident {number}", incident=number
    )
