"""The worker's other threads: they hold leases, hear who should stop, and say what is held.

Torch keeps the task thread busy for seconds at a time, so whatever has a deadline of its own is done
here. A task that has been told to stop and does not is stopped with the whole process: leases are then
taken back by the reaper, and a supervisor starts another worker.
"""

import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Self
from uuid import UUID

import structlog

from neural_mri.backing import events, jobs
from neural_mri.backing.broker import SyncRedis
from neural_mri.backing.database import Sessions
from neural_mri.backing.jobs import Job, LeaseOwner
from neural_mri.contract.problems import Unavailable
from worker.ending import end_process
from worker.scanner.listening import Cancelled

__all__ = ("Holding", "Keeper", "LeaseLost")

TICK_SECONDS = 0.1
BEAT_SECONDS = 1.0
STOP_SECONDS = 5.0
"""How long a task may go on after one of its jobs was told to stop, without asking for any."""

log = structlog.get_logger(__name__)


class LeaseLost(Cancelled):
    """Somebody else holds the job now, or it has ended: whatever this attempt does is in vain."""


class _Thread:
    """The one that all jobs of a worker are run by."""

    def __init__(self) -> None:
        self.asked_at = -math.inf
        """When it last asked, for any of them, whether to go on; on the monotonic clock."""


class Holding:
    """One job that this process holds, and whether its attempt should go on."""

    def __init__(self, job: Job, thread: _Thread) -> None:
        self.job = job
        self._thread = thread
        self._stop: type[Cancelled] | None = None
        self._unheard_since = 0.0
        self._is_aside = False

    def check(self) -> None:
        """Raises `Cancelled` or `LeaseLost` once the attempt should stop. Costs nothing.

        Whoever asks has heard it, and may go on for the sake of mates in the same pass.
        """
        self._thread.asked_at = time.monotonic()
        if self._stop is not None:
            raise self._stop(f"job {self.job.id}, attempt {self.job.attempt}")

    def stop(self, reason: type[Cancelled]) -> None:
        """Tell it to stop; the first reason stands."""
        if self._stop is None:
            self._unheard_since = time.monotonic()
            self._stop = reason

    def seconds_unheeded(self) -> float:
        """How long nobody has asked since it was told to stop; 0 when it was not, or cannot ask now.

        Who asks may be another that the same thread runs: a mate whose turn comes first.
        """
        if self._stop is None or self._is_aside:
            return 0.0
        return time.monotonic() - max(self._unheard_since, self._thread.asked_at)

    @contextmanager
    def aside(self) -> Iterator[None]:
        """While the block runs the attempt stands still, and others have its thread."""
        self._is_aside = True
        try:
            yield
        finally:
            self._unheard_since = time.monotonic()
            self._is_aside = False


class Keeper:
    """Renews leases, hears cancels, beats. Use as a context manager round the worker's whole life."""

    def __init__(
        self,
        *,
        sessions: Sessions,
        redis: SyncRedis,
        owner: LeaseOwner,
        lease_seconds: float,
        describe: Callable[[], events.WorkerBeat],
        give_up: Callable[[], None] = end_process,
    ) -> None:
        self._sessions = sessions
        self._redis = redis
        self._owner = owner
        self._lease_seconds = lease_seconds
        self._describe = describe
        self._give_up = give_up
        self._lock = threading.Lock()
        self._thread = _Thread()
        self._held: dict[UUID, Holding] = {}
        self._closing = threading.Event()
        self._renew_at = 0.0
        self._beat_at = 0.0
        # Two, because a frozen Redis may keep its thread waiting for longer than a lease holds.
        self._threads = tuple(
            threading.Thread(target=self._run, args=(work,), name=work.__name__, daemon=True)
            for work in (self._keep_leases, self._talk)
        )

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._closing.set()
        for thread in self._threads:
            thread.join(timeout=STOP_SECONDS)

    @contextmanager
    def holding(self, job: Job) -> Iterator[Holding]:
        """Keep a claimed job's lease while the block runs."""
        holding = Holding(job, self._thread)
        with self._lock:
            self._held[job.id] = holding
        try:
            yield holding
        finally:
            self.let_go(holding)

    def let_go(self, holding: Holding) -> None:
        """Its job has ended, or is somebody else's: there is no lease to keep, and nobody to be stopped.

        The block may go on, with the mates that were claimed with it.
        """
        with self._lock:
            self._held.pop(holding.job.id, None)

    def beat(self) -> None:
        """Say what the worker holds now: it has just changed, and somebody may be waiting to see it."""
        events.beat(self._redis, self._describe())

    def _run(self, work: Callable[[tuple[Holding, ...]], None]) -> None:
        try:
            while not self._closing.wait(TICK_SECONDS):
                with self._lock:
                    held = tuple(self._held.values())
                work(held)
        except Exception:
            # A worker that has lost its leases or its ears must not go on as if it had them.
            log.exception("keeper_failed")
            self._give_up()
            raise

    def _keep_leases(self, held: Sequence[Holding]) -> None:
        if held and time.monotonic() >= self._renew_at:
            self._renew_at = time.monotonic() + self._lease_seconds / 3
            self._renew(held)
        for holding in held:
            if holding.seconds_unheeded() > STOP_SECONDS:
                log.error("stop_unheeded", job_id=str(holding.job.id), model=holding.job.model)
                self._give_up()

    def _talk(self, held: Sequence[Holding]) -> None:
        if held:
            self._hear_cancels(held)
        if time.monotonic() >= self._beat_at:
            self._beat_at = time.monotonic() + BEAT_SECONDS
            self.beat()

    def _hear_cancels(self, held: Sequence[Holding]) -> None:
        """A flag in Redis is only the quicker way: the next renewal says the same."""
        job_ids = [holding.job.id for holding in held]
        asked = events.asked_to_stop(self._redis, job_ids)
        for holding in held:
            if holding.job.id in asked:
                holding.stop(Cancelled)

    def _renew(self, held: Sequence[Holding]) -> None:
        attempts = {holding.job.id: holding.job.attempt for holding in held}
        try:
            renewal = self._sessions.write(jobs.renew, self._owner, attempts, self._lease_seconds)
        except Unavailable as error:
            # The fence stands in the database: without it nothing can be published either.
            log.warning("leases_not_renewed", jobs=len(attempts), error=str(error))
            return
        for holding in held:
            if holding.job.id in renewal.lost:
                holding.stop(LeaseLost)
            elif holding.job.id in renewal.cancelled:
                holding.stop(Cancelled)
