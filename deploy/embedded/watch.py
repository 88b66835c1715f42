"""Seeing what a worker cannot see of itself: that it has stopped listening.

A worker that hangs still looks alive to its supervisor. Two signs tell: it has said nothing for longer
than a frozen broker explains, or work has waited for it while it did none.
"""

import time

import psutil
from sqlalchemy import select
from sqlalchemy.orm import Session

from neural_mri.backing import broker, database, events, jobs, keys
from neural_mri.backing.broker import AWAY, SyncRedis
from neural_mri.backing.jobs import LeaseOwner
from neural_mri.backing.rows import JobRow
from neural_mri.backing.settings import Settings
from neural_mri.contract.models import ModelState
from neural_mri.contract.problems import Unavailable

__all__ = ("Watch", "beat_of", "resident_revisions")

SILENT_SECONDS = 2.0
"""Beyond the ten seconds for which a beat is remembered."""
STARVING_SECONDS = 20.0
"""Lost tickets are replaced within a second, so work that waits for so long waits for nobody."""


def beat_of(redis: SyncRedis, pid: int) -> events.WorkerBeat | None:
    """What this process, or the worker that it has forked, last said. Raises what `broker.AWAY` names."""
    return next(
        (beat for beat in events.heartbeats(redis) if _works_for(_speaker(beat), pid)), None
    )


def resident_revisions(beat: events.WorkerBeat) -> set[str]:
    """Digests of the weights with which a worker can scan."""
    return {model.revision for model in beat.models if model.state is ModelState.RESIDENT}


class Watch:
    """Looks at one worker, about once a second."""

    def __init__(self, settings: Settings) -> None:
        self._sessions = database.sessions(settings)
        self._redis = broker.connect(settings)
        self._speaker = 0
        """The process last heard."""
        self._heard_at: float | None = None
        """When it last said anything, on the monotonic clock; None before its first word."""
        self._starving_since: float | None = None

    def what_is_wrong(self, pid: int) -> str | None:
        """Why this process's worker should be killed; None when nothing is known against it."""
        if not _works_for(self._speaker, pid):
            self._heard_at = self._starving_since = None
        try:
            beat = beat_of(self._redis, pid)
            starving = beat is not None and self._sessions.read(_is_starving, beat)
        except (Unavailable, *AWAY):
            # Nothing can be held against a worker while what it needs is away.
            self._heard_at = self._starving_since = None
            return None
        now = time.monotonic()
        if beat is not None:
            self._speaker, self._heard_at = _speaker(beat), now
        elif self._heard_at is not None and now - self._heard_at > SILENT_SECONDS:
            return "has said nothing for too long"
        if not starving:
            self._starving_since = None
        elif self._starving_since is None:
            self._starving_since = now
        elif now - self._starving_since > STARVING_SECONDS:
            return "does nothing while work waits for it"
        return None

    def close(self) -> None:
        """Close every connection."""
        self._sessions.close()
        self._redis.close()


def _speaker(beat: events.WorkerBeat) -> int:
    """The process that said it; 0 for a name of some other kind."""
    pid = beat.worker.removeprefix("worker-").partition("@")[0]
    return int(pid) if pid.isdecimal() else 0


def _works_for(speaker: int, pid: int) -> bool:
    """Whether a process is this one or was forked by it, and is there."""
    if speaker == pid:
        return True
    try:
        parent: int = psutil.Process(speaker).ppid()
    except psutil.Error:
        return False
    return parent == pid


def _is_starving(session: Session, beat: events.WorkerBeat) -> bool:
    """Whether work waits that this worker could do, and it does none."""
    if any(model.state is not ModelState.RESIDENT for model in beat.models):
        return False  # loading or unloading
    served = {keys.CPU_QUEUE, keys.CONTROL_QUEUE} | {
        keys.scan_queue(model.revision) for model in beat.models
    }
    if not served & jobs.queued_by_queue(session).keys():
        return False
    owners = session.scalars(select(JobRow.lease_owner).where(JobRow.lease_owner.is_not(None)))
    return not any(
        f"worker-{LeaseOwner.parse(owner).pid}@" in beat.worker for owner in owners if owner
    )
