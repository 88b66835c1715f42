"""Short scans between the chunks of a long one.

A long scan pauses many times a second, between chunks or between two layers of a forward, with nothing of
its own listening to the model. Then what waits may be let in: scans of a person who is looking, each at most
a quarter of the work of the pass they interrupt. They run on the same thread, as jobs of their own, before
the pause returns. How much of its time a scan lends is its lane's to say: it takes back its share before it
lends again, so that no flood of short scans keeps it from its end.
"""

import math
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack

import structlog

from neural_mri.backing import jobs, keys
from neural_mri.backing.database import Sessions
from neural_mri.backing.jobs import Job, LeaseOwner
from neural_mri.backing.records import LANE_WEIGHTS
from neural_mri.backing.settings import Settings
from neural_mri.contract.jobs import Lane
from neural_mri.contract.problems import Unavailable
from neural_mri.contract.scans import Forward
from worker.keeper import Holding
from worker.residency import Residency
from worker.scanner.listening import Silent

__all__ = ("Interludes", "Lending")

LOOK_SECONDS = 0.05
"""Least time between two looks at the queue."""
SHORT = 0.25
"""Share of a scan's own work that whoever interrupts it may take."""
LEAST_COST = 8.0
"""A pass that would lend less, in tokens, is soon over: it does not look."""

log = structlog.get_logger(__name__)


def _most_cost(together: Sequence[Job]) -> float:
    """Work of the longest scan that may interrupt a pass of these jobs."""
    if not together or not all(job.tokens for job in together):
        # A load, a calibration: what reads no prompt does not say how long it takes.
        return math.inf
    costs = [job.estimated_cost for job in together]
    if together[0].batch_key.startswith(Forward.DIFFERENTIATED):
        # Measured one by one: another that is as long waits for the next pass.
        most = SHORT * max(costs)
    elif len(together) > 1 and any(job.lane is Lane.INTERACTIVE for job in together):
        return 0.0  # who comes meanwhile shares the next pass, which is cheaper for all
    else:
        most = SHORT * sum(costs)
    return most if most >= LEAST_COST else 0.0


class Interludes:
    """What one pass lends of its time."""

    def __init__(
        self,
        holdings: Sequence[Holding],
        *,
        settings: Settings,
        sessions: Sessions,
        owner: LeaseOwner,
        residency: Residency,
        run: Callable[[Sequence[Job], float], None],
    ) -> None:
        """`run` brings claimed jobs, given with the time when their claim began, to their ends.

        No holdings are work that is no job's: a model that is loaded because scans wait for it.
        """
        self.lent_seconds = 0.0
        self._holdings = holdings
        self._attempts = {holding.job.id: holding.job.attempt for holding in holdings}
        self._settings = settings
        self._sessions = sessions
        self._owner = owner
        self._residency = residency
        self._run = run
        together = [holding.job for holding in holdings]
        self._most = _most_cost(together)
        lanes = {job.lane for job in together} or {Lane.INTERACTIVE}
        weight = max(LANE_WEIGHTS[lane] for lane in lanes)
        self._own_share = weight / LANE_WEIGHTS[Lane.INTERACTIVE]
        self._look_at = time.monotonic() + LOOK_SECONDS

    def pause(self) -> None:
        """Let in what waits, if it is time to look. Whoever paused looks to their own job afterwards."""
        if not self._most or time.monotonic() < self._look_at:
            return
        lent, began = 0.0, time.time()
        if claimed := self._claimed():
            lent = self._lend(claimed, began)
        self._look_at = time.monotonic() + max(LOOK_SECONDS, lent * self._own_share)

    def _claimed(self) -> list[Job]:
        queues = sorted(self._residency.queues() - {keys.CPU_QUEUE, keys.CONTROL_QUEUE})
        try:
            queue = self._sessions.read(jobs.queue_of_short, queues, self._most)
            if queue is None:
                return []
            return self._sessions.write(
                jobs.claim,
                queue=queue,
                owner=self._owner,
                limit=self._settings.batch_jobs,
                tokens=self._settings.batch_tokens,
                forwards=self._settings.batch_forwards,
                lease_seconds=self._settings.lease_seconds,
                most_cost=self._most,
                starts=True,
            )
        except Unavailable as error:
            log.warning("nothing_claimed", error=str(error))
            return []

    def _lend(self, claimed: Sequence[Job], began: float) -> float:
        """Run jobs while the own ones stand still; for how long."""
        allowed = max(job.deadline_seconds for job in claimed)
        # What is not known to have been added is not taken away: their deadline would be past.
        added = allowed if self._reckon(deadline_seconds=allowed) else 0.0
        started = time.monotonic()
        try:
            with ExitStack() as aside:
                for holding in self._holdings:
                    aside.enter_context(holding.aside())
                self._run(claimed, began)
        finally:
            lent = time.monotonic() - started
            self.lent_seconds += lent
            self._reckon(deadline_seconds=-added, begun_seconds=lent)
        log.info("time_lent", jobs=len(claimed), seconds=round(lent, 4))
        return lent

    def _reckon(self, *, deadline_seconds: float, begun_seconds: float = 0.0) -> bool:
        """Keep time that is others' out of the jobs' own; whether that was written."""
        if not self._attempts:
            return False
        try:
            self._sessions.write(
                jobs.reckon,
                self._owner,
                self._attempts,
                deadline_seconds=deadline_seconds,
                begun_seconds=begun_seconds,
            )
        except Unavailable as error:
            log.warning("time_not_reckoned", error=str(error))
            return False
        return True


class Lending(Silent):
    """Listens to work that nobody asked to hear of, and lends its pauses."""

    def __init__(self, interludes: Interludes) -> None:
        self._interludes = interludes

    def pause(self) -> None:
        """Others may run before it returns."""
        self._interludes.pause()
