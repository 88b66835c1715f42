"""The reaper: takes back what lost workers held, and sends the tickets that are missing.

Its own small process, without torch, so that it goes on when workers do not. It holds nothing: killed at
any moment, or run twice, it loses nothing and doubles nothing.
"""

import faulthandler
import os
import select
import signal
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import NamedTuple, Self
from uuid import UUID

import structlog
from sqlalchemy.orm import Session

from neural_mri.backing import (
    batches,
    broker,
    database,
    deletion,
    feeding,
    jobs,
    kept_results,
    keys,
    leftovers,
    limits,
    logs,
    storage,
    stored,
)
from neural_mri.backing.broker import AWAY, SyncRedis
from neural_mri.backing.database import Sessions
from neural_mri.backing.events import Publisher
from neural_mri.backing.faults import crash_point
from neural_mri.backing.jobs import Job
from neural_mri.backing.queue import send_tickets, waiting_tickets
from neural_mri.backing.settings import InvalidSettings, Settings, load_settings
from neural_mri.backing.storage import Store
from neural_mri.contract.jobs import TERMINAL, JobKind, JobState
from neural_mri.contract.problems import TooMany, Unavailable

__all__ = ("Beat", "Ending", "Reaper", "main")

MOST_TICKETS = 64
"""Sent to a queue in one round: a flood of jobs needs no flood of tickets, workers claim batches."""
EXPIRE_EVERY_SECONDS = 10.0
SWEEP_EVERY_SECONDS = 600.0
ABANDONED_SECONDS = 3600.0
"""Nobody takes so long to write a file, or to take away their own."""
LOOK_THROUGH_EVERY_SECONDS = 86_400.0
"""How often all results are looked through for those that nobody names."""
MOST_RESULTS = 1000
"""Looked at in one round, however many there are: what lost workers held does not wait for it."""
STOP_EVERY_SECONDS = 1.0
"""How often batches are looked at of which too many scans may have failed, or lines wait for room; after a round
in which there was some, the next one looks again: few jobs may be all that one person may have, and end soon."""
LOOK_SHARE = 20.0
"""So many times as long as it took to look at those batches, nobody does so again: they may have a hundred thousand lines."""

UNKEPT_SECONDS = 1.0
"""For so long kept results are taken away at once: jobs that are lost wait no longer for that."""
DELETE_EVERY_SECONDS = 60.0
"""How often jobs are looked for that are too old, and results that deleted ones have left; a round in which there
was a full number of them is followed by the next one."""
FORGOTTEN_SECONDS = 60.0
"""How long an attempt that no round sees any more is remembered: no transaction holds a row for so long."""
SET_SECONDS = 3600.0
"""A clock that differs so much from how it went before was set."""
STALLED_SECONDS = 5.0
"""So long what the time is may be on its way from a database that is busy."""

SWEEP_TIMES = 15.0
"""So many times as long as anything else a sweep may take: a folder may hold millions of files."""

log = structlog.get_logger(__name__)


class Reaper:
    """Rounds of reaping and topping up."""

    def __init__(
        self,
        settings: Settings,
        sessions: Sessions,
        redis: SyncRedis,
        store: Store,
        beat: Callable[[float], None] = lambda _seconds: None,
    ) -> None:
        self._beat = beat
        """Told, before anything that may hang, for how long that could take."""
        self._settings = settings
        self._sessions = sessions
        self._redis = redis
        self._store = store
        self._publisher = Publisher(redis, settings)
        self._watched = _Watched()
        self._clock = _Clock(SET_SECONDS, limits.DAY_SECONDS)
        self._waits = _Clock.of_waits(settings.queued_seconds)
        self._fillings = _Clock.of_waits(batches.LONGEST_FILLING.total_seconds())
        self._missing: dict[str, int] = {}
        """Tickets that each queue lacked in the last round."""
        self._expire_at = self._sweep_at = self._look_through_at = 0.0
        self._stop_at = self._feed_at = 0.0
        self._delete_at = self._discard_at = self._unkept_at = 0.0
        self._aged: Iterator[str] = iter(())
        """Results that are to be looked at."""
        self._copies: Iterator[list[str]] = iter(())
        """Copies of calibrations that are to be taken away, a folder's at a time."""
        self._away: set[str] = set()
        """What did not answer in the last round; said once."""

    def run(self, ends_within: Callable[[float], bool]) -> None:
        """Rounds until it is to end within the seconds between two; a round under way is finished."""
        pause = self._settings.reaper_interval_seconds
        ended = False
        while not ended:
            self.round()
            self._beat(pause + self._settings.reaper_hung_seconds)
            ended = ends_within(pause)

    def round(self) -> None:
        """Look once. What does not answer is tried again next time."""
        self._try("database", self._look_at_jobs)
        self._try("redis", self._top_up)
        if time.monotonic() >= self._sweep_at:
            self._sweep_at = time.monotonic() + SWEEP_EVERY_SECONDS
            self._try("store", self._sweep, times=SWEEP_TIMES)
        if time.monotonic() >= self._delete_at:
            self._delete_at = time.monotonic() + DELETE_EVERY_SECONDS
            self._try("old jobs", self._delete_old)
        if time.monotonic() >= self._discard_at:
            self._discard_at = time.monotonic() + DELETE_EVERY_SECONDS
            self._try("results of deleted jobs", self._take_discards)
        if time.monotonic() >= self._unkept_at:
            self._unkept_at = time.monotonic() + DELETE_EVERY_SECONDS
            self._try("results of deleted sessions", self._take_unkept)
        self._try("leftovers", self._take_leftovers)

    def _try(self, what: str, work: Callable[[], None], *, times: float = 1.0) -> None:
        self._beat(times * self._settings.reaper_hung_seconds)
        try:
            work()
        except (Unavailable, *AWAY) as error:
            if what not in self._away:
                log.warning("round_failed", on=what, error=str(error))
            self._away.add(what)
        else:
            if what in self._away:
                log.info("round_succeeded_again", on=what)
            self._away.discard(what)

    def _look_at_jobs(self) -> None:
        self._take_back()
        self._see_to_batches()

    def _take_back(self) -> None:
        with self._watched.round() as seconds_of:
            moved = self._sessions.write(
                jobs.reap, max_attempts=self._settings.max_attempts, watched_seconds=seconds_of
            )
        if time.monotonic() >= self._expire_at:
            moved += self._expire()
        if moved:
            crash_point("reaper.taken-back")
        for job in moved:
            self._beat(self._settings.reaper_hung_seconds)
            self._forget_result(job)
            self._announce(job)
        # A worker may be idle: it need not wait for two rounds to find them missing.
        back = Counter(job.queue for job in moved if job.state is JobState.QUEUED)
        for queue, count in back.items():
            send_tickets(self._redis, queue, min(count, MOST_TICKETS))

    def _expire(self) -> list[Job]:
        """End what has waited for too long; the jobs as they then stand."""
        now = self._sessions.look(deletion.clock)
        late = []
        if self._waits.goes_on(now):
            late = self._sessions.write(jobs.expire, waiting_seconds=self._settings.queued_seconds)
        if len(late) < jobs.MOST_EXPIRED:  # else there are more, for the next round
            self._expire_at = time.monotonic() + EXPIRE_EVERY_SECONDS
        if self._fillings.goes_on(now) and (undone := self._sessions.write(batches.undo_unfilled)):
            log.warning("half_recorded_batches_undone", count=undone)
        return late

    def _see_to_batches(self) -> None:
        if time.monotonic() >= self._stop_at:
            began = time.monotonic()
            self._settle_batches()
            ended = time.monotonic()
            self._stop_at = ended + max(STOP_EVERY_SECONDS, LOOK_SHARE * (ended - began))
        if time.monotonic() >= self._feed_at and not self._feed_all():
            self._feed_at = time.monotonic() + STOP_EVERY_SECONDS

    def _settle_batches(self) -> None:
        """Stop the batches of which too many scans have failed. Nothing is written where none changes."""
        if not (among := self._sessions.read(batches.to_settle)):
            return
        for asked in self._sessions.write(batches.stop_failing, among):
            self._beat(self._settings.reaper_hung_seconds)
            if asked.moved:
                self._publisher.announce(asked.job)
            elif asked.job.state not in TERMINAL:
                self._publisher.flag_cancel(asked.job.source)

    def _feed_all(self) -> int:
        """Have lines of everybody's batches become jobs, where there is room by now; how many they were.

        In turns, for a while: what lost workers held does not wait for a hundred thousand lines.
        """
        until = time.monotonic() + STOP_EVERY_SECONDS
        count = 0
        waiting = self._sessions.read(feeding.owners_waiting)
        while waiting and time.monotonic() < until:
            fed = {owner: self._feed(owner) for owner in waiting}
            count += sum(fed.values())
            waiting = [owner for owner, lines in fed.items() if lines == feeding.FED_AT_ONCE]
        return count

    def _feed(self, owner: str) -> int:
        """Have lines of somebody's batches become jobs, where there is room by now; how many they were."""
        settings = self._settings
        self._beat(settings.reaper_hung_seconds)
        with suppress(TooMany):  # others took it
            fed = self._sessions.write(
                feeding.feed,
                owner,
                max_queued=settings.max_queued_jobs,
                usual=limits.usual(settings),
            )
            for queue, count in fed.queued.items():
                send_tickets(self._redis, queue, min(count, MOST_TICKETS))
            return fed.lines
        return 0

    def _forget_result(self, job: Job) -> None:
        """Take away the result of a lost attempt, if it came so far: nobody can name it any more.

        Most often nothing is left over then. A worker that was not dead may still put it there, and one of an
        attempt that was handed over has it under another job's id.
        """
        if job.kind is JobKind.SCAN and job.attempt:
            # Only its worker knew which of them it was to be.
            for path in keys.Attempt(job.source, job.attempt).results:
                with suppress(Unavailable):
                    stored.discard(self._store, path)

    def _sweep(self) -> None:
        if count := self._store.sweep(ABANDONED_SECONDS):
            log.info("half_written_files_removed", count=count)

    def _take_leftovers(self) -> None:
        """Take away, of some more results, those of attempts that came to nothing.

        Begins anew with the next sweep where store or database does not answer.
        """
        if time.monotonic() >= self._look_through_at:
            self._look_through_at = time.monotonic() + LOOK_THROUGH_EVERY_SECONDS
            self._aged = leftovers.aged_results(self._store, ABANDONED_SECONDS)
            self._copies = leftovers.aged_calibrations(self._store, ABANDONED_SECONDS)
        try:
            self._take_some()
        except Unavailable:
            self._look_through_at = self._sweep_at
            self._aged, self._copies = iter(()), iter(())
            raise

    def _take_some(self) -> None:
        if some := list(islice(self._aged, MOST_RESULTS)):
            found = self._sessions.read(leftovers.left_over, some)
            self._take_away(found)
            if found:
                log.info("results_left_over_removed", count=len(found))
        if copies := next(self._copies, []):
            self._take_away(copies)
            log.info("copies_of_calibrations_removed", count=len(copies))

    def _take_away(self, paths: Iterable[str]) -> None:
        for path in paths:
            self._beat(self._settings.reaper_hung_seconds)
            self._store.delete(path)

    def _delete_old(self) -> None:
        """Delete some of the batches and jobs that ended too long ago, if anything is ever too old."""
        if not self._settings.keep_days:
            return
        if not self._clock.goes_on(self._sessions.read(deletion.clock)):
            return
        older = self._settings.keep_days * limits.DAY_SECONDS
        forgotten = self._sessions.write(deletion.batches_by_age, older_seconds=older)
        deleted = self._sessions.write(deletion.by_age, older_seconds=older)
        if forgotten or deleted == deletion.MOST_DELETED:
            self._delete_at = 0.0  # there are more
        self._count({"batch:age": forgotten, "job:age": deleted})

    def _take_discards(self) -> None:
        """Take away results of deleted jobs that no other needs."""

        def look(session: Session) -> tuple[int, deletion.Unneeded]:
            found = deletion.discarded(session)
            return len(found), deletion.unneeded(session, found)

        looked_at, unneeded = self._sessions.read(look)
        self._take_away(stored.files_of(self._store, unneeded.results))
        if unneeded.discards:
            self._sessions.write(deletion.settle, unneeded.discards)
        if looked_at == deletion.MOST_DELETED and unneeded.discards:
            self._discard_at = 0.0
        self._count({"result:unneeded": len(unneeded.discards)})

    def _take_unkept(self) -> None:
        """Take away results that sessions kept and that none names any more, for so long as others can wait."""
        began, count = time.monotonic(), 0
        try:
            while time.monotonic() - began < UNKEPT_SECONDS:
                if not (taken := self._sessions.write(kept_results.take, most=1)):
                    return
                self._take_kept(*taken)
                self._sessions.write(kept_results.settle, taken)
                count += 1
            self._unkept_at = 0.0  # there may be more
        finally:
            self._count({"result:unkept": count})

    def _take_kept(self, digest: str) -> None:
        """Take away a kept result that nobody can keep meanwhile.

        Raises `Unavailable` where that takes so long that another may go on with it, and somebody keep it anew
        after that.
        """
        began = time.monotonic()
        self._beat(self._settings.reaper_hung_seconds)
        found = list(stored.files_of(self._store, [keys.kept_result_path(digest)]))
        for path in (*found, keys.once_kept_result_path(digest)):
            self._beat(self._settings.reaper_hung_seconds)
            if time.monotonic() - began > kept_results.TAKEN_SECONDS / 3:
                raise Unavailable(f"to take {path} away has taken too long: it is begun anew later")
            self._store.delete(path)

    def _count(self, deleted: Mapping[str, int]) -> None:
        if not any(deleted.values()):
            return
        log.info("deleted", **{name.replace(":", "_"): count for name, count in deleted.items()})
        with suppress(*AWAY):  # then less is counted
            for name, count in deleted.items():
                if count:
                    self._redis.hincrby(keys.DELETED, name, count)

    def _announce(self, job: Job) -> None:
        self._publisher.announce(job)
        said = log.error if job.state is JobState.QUARANTINED else log.warning
        said(
            "job_taken_back",
            job_id=str(job.id),
            model=job.model,
            state=job.state.value,
            attempt=job.attempt,
        )

    def _top_up(self) -> None:
        """Send what two rounds running found missing.

        Once is no proof: between taking a ticket and claiming its job every worker looks like a loss.
        """
        queued = self._sessions.read(jobs.queued_by_queue)
        missing = {
            queue: jobs_waiting - waiting_tickets(self._redis, queue)
            for queue, jobs_waiting in queued.items()
        }
        for queue, count in missing.items():
            still = min(count, self._missing.get(queue, 0), MOST_TICKETS)
            if still > 0 and send_tickets(self._redis, queue, still):
                missing[queue] -= still
                log.info("tickets_topped_up", queue=queue, count=still)
        self._missing = missing


class _Watched:
    """For how long this process has seen attempts held, whatever the clocks were set to meanwhile."""

    def __init__(self) -> None:
        self._seen: dict[tuple[UUID, int], _Sight] = {}

    @contextmanager
    def round(self) -> Iterator[Callable[[UUID, int], float]]:
        """Whoever has not been asked for lately is forgotten after the block.

        Not at once: a round leaves out whom another transaction has locked just then, as every renewal does.
        """
        now = time.monotonic()

        def seconds_of(job_id: UUID, attempt: int) -> float:
            first = self._seen.get((job_id, attempt), _Sight(now, now)).first
            self._seen[job_id, attempt] = _Sight(first, now)
            return now - first

        yield seconds_of
        lately = now - FORGOTTEN_SECONDS
        self._seen = {held: sight for held, sight in self._seen.items() if sight.last > lately}


class _Sight(NamedTuple):
    """When an attempt was seen, on the monotonic clock."""

    first: float
    last: float


class _Clock:
    """Whether a clock goes on as it went. One that is put forward makes all jobs old, and what is deleted is gone."""

    def __init__(self, set_seconds: float, held_seconds: float) -> None:
        self._set_seconds = set_seconds
        """What differs by more was set."""
        self._held_seconds = held_seconds
        """After so long a clock that was set is what the time is."""
        self._began: float | None = None
        """What it was when this machine started, as it goes."""
        self._set_at: float | None = None

    @classmethod
    def of_waits(cls, seconds: float) -> Self:
        """One by which something may wait for so long.

        What has waited by a clock that was put forward has done so by every clock, once it was seen to wait as long again.
        """
        set_seconds = max(STALLED_SECONDS, min(SET_SECONDS, seconds / 10))
        return cls(set_seconds, min(seconds, limits.DAY_SECONDS))

    def goes_on(self, now: float) -> bool:
        """Whether it does; once it was set, from when it is set right again, or some time later."""
        uptime = _uptime()
        began = now - uptime
        if self._began is not None and abs(began - self._began) > self._set_seconds:
            if self._set_at is None:
                self._set_at = uptime
                log.error(
                    "clock_was_set",
                    seconds=round(began - self._began),
                    held_seconds=self._held_seconds,
                )
            if uptime - self._set_at < self._held_seconds:
                return False
        self._began, self._set_at = began, None
        return True


def _uptime() -> float:
    """How long this machine has been on; also counts while it sleeps."""
    return time.clock_gettime(
        time.CLOCK_BOOTTIME if sys.platform == "linux" else time.CLOCK_MONOTONIC
    )


class Ending:
    """SIGTERM and SIGINT, heard while the block runs. Use as a context manager, in the main thread.

    A handler that sets a `threading.Event` runs in the thread that waits for it, and where that holds the event's
    lock just then it waits for itself for ever. Here the interpreter writes a byte, and no lock is taken.
    """

    def __init__(self) -> None:
        self._heard, self._said = socket.socketpair()
        self._said.setblocking(False)  # as `set_wakeup_fd` demands

    def __enter__(self) -> Self:
        signal.set_wakeup_fd(self._said.fileno())
        self._before = {
            signum: signal.signal(signum, lambda *_: None)
            for signum in (signal.SIGTERM, signal.SIGINT)
        }
        return self

    def __exit__(self, *exception: object) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)
        signal.set_wakeup_fd(-1)
        self._heard.close()
        self._said.close()

    def comes_within(self, seconds: float) -> bool:
        """Whether one has come, or comes in so many seconds."""
        return bool(select.select([self._heard], [], [], seconds)[0])


class Beat:
    """Says of this process that it goes on, and ends it once it does not. A context manager.

    The time of change of a file is until when the process is alive: a probe compares it with the clock.
    A process that hangs is ended by its own watchdog, which says on standard error where it hung, and needs
    neither the interpreter nor a probe: whoever started the process starts it again.
    """

    def __init__(self, file: str) -> None:
        self._path = Path(file) if file else None

    def __enter__(self) -> Self:
        if self._path is not None:
            self._path.touch()
        return self

    def __exit__(self, *exception: object) -> None:
        faulthandler.cancel_dump_traceback_later()

    def __call__(self, seconds: float) -> None:
        """What comes next takes at most so long."""
        faulthandler.dump_traceback_later(seconds, exit=True)
        if self._path is not None:
            until = time.time() + seconds
            with suppress(OSError):  # then the probe ends what would have gone on: no harm
                os.utime(self._path, (until, until))


def main() -> int:
    """Run until SIGTERM or SIGINT; the exit status."""
    try:
        settings = load_settings()
    except InvalidSettings as error:
        print(error, file=sys.stderr)  # noqa: T201 (there is no log without settings)
        return 2
    logs.configure(settings, process="reaper")
    with (
        Ending() as ending,
        closing(database.sessions(settings)) as sessions,
        Beat(settings.reaper_beat_file) as beat,
    ):
        log.info("reaper_started", seconds=settings.reaper_interval_seconds)
        store = storage.open_store(settings)
        redis = broker.connect(settings)
        Reaper(settings, sessions, redis, store, beat).run(ending.comes_within)
    log.info("reaper_stopped")
    return 0


if __name__ == "__main__":
    sys.exit(main())
