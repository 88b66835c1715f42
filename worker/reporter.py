"""What a running scan says, on its way to the event stream.

The scan must never wait for Redis, so it posts to an `Outbox` and a thread publishes. The outbox bounds
what it holds and what it sends: progress at most `PROGRESS_PER_SECOND` a job (the last one of a stage
always), of one layer the newest frame only, token frames all and in order, and progress and any frames only
of jobs that somebody may watch (`unseen`). It bounds how often it sends as well: whatever the thread computes
the scan does not.
"""

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Sequence
from typing import Protocol, Self
from uuid import UUID

import structlog

from neural_mri.backing.events import Told
from neural_mri.backing.faults import crash_point
from neural_mri.contract.events import (
    ActivationFrame,
    EffectsFrame,
    Ended,
    Event,
    LayerFrame,
    Progress,
    StateChanged,
)
from worker.ending import end_process
from worker.unseen import Frames, Unseen

__all__ = ("EventSink", "Outbox", "Reporter")

PROGRESS_PER_SECOND = 20
MOST_AT_ONCE = 256
"""Events that one round trip takes along: a scan posts faster than they travel one by one."""
GATHER_SECONDS = 0.005
"""How long an event waits for others to go with it: much less than anybody sees. An end goes at once."""
APART_SECONDS = 0.03
"""How far apart round trips begin while events keep coming: a forward tells of every layer of every job."""
LOOK_SECONDS = 0.05
"""How far apart it is asked who watches jobs whose frames wait for somebody."""
MOST_JOBS = 1000
"""Jobs that frames are kept of: far more than run at once."""
IDLE_SECONDS = 60.0
"""How long the thread sleeps while there is nothing to send: it is woken when there is."""
LARGEST_BACKLOG = 4000
"""Events waiting to be published. Beyond it frames are dropped: the stored tables have them all."""

log = structlog.get_logger(__name__)


class EventSink(Protocol):
    """Where events go: `backing.events.Publisher`, which never raises."""

    def publish_all(self, told: Sequence[Told], asking: Sequence[UUID] = ()) -> frozenset[UUID]:
        """Append events to their jobs' streams, in order; those of the jobs asked for that are watched."""


class Outbox:
    """Events on their way out, published by a thread of its own. Use as a context manager."""

    def __init__(
        self,
        sink: EventSink,
        give_up: Callable[[], None] = end_process,
    ) -> None:
        """`give_up` ends a process that can tell nothing more."""
        self._sink = sink
        self._give_up = give_up
        self._changed = threading.Condition()
        self._waiting: deque[Told] = deque()
        self._held: dict[UUID, Progress] = {}
        """Progress not yet due."""
        self._due: dict[UUID, float] = {}
        """When each job may next report progress, on the monotonic clock."""
        self._layers: set[tuple[UUID, int]] = set()
        """Layers of which a frame waits."""
        self._watched: set[UUID] = set()
        """Jobs that somebody may look at: all of their events go where others do."""
        self._unseen: dict[UUID, Unseen] = {}
        """What the other jobs tell."""
        self._news: set[UUID] = set()
        """Those of them that tell what is not for whoever watches alone."""
        self._look_at = math.inf
        """When it is to be asked whether somebody watches them by now, on the monotonic clock."""
        self._publish_at = 0.0
        """When what waits is to go, on the monotonic clock."""
        self._rested_at = 0.0
        """Until when the thread rests after a round trip, on the monotonic clock."""
        self._wakes_at = 0.0
        """When the thread looks again by itself, on the monotonic clock; 0 while it is awake."""
        self._sending = False
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="outbox", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.flush(timeout_seconds=2.0)
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join(timeout=2.0)

    def post(self, job_id: UUID, event: Event) -> None:
        """Queue an event; returns at once."""
        with self._changed:
            if isinstance(event, Progress | LayerFrame) and self._has_kept(job_id, event):
                return
            match event:
                case Progress():
                    # Nobody waits for that of a job that nobody watches: the newest will do.
                    if job_id in self._watched:
                        self._hold(job_id, event)
                    else:
                        self._append(job_id, event)
                case LayerFrame():
                    self._replace_or_append(job_id, event)
                case ActivationFrame():
                    self._append(job_id, event)
                case _:
                    self._release(job_id)
                    self._append(job_id, event)
            if isinstance(event, Ended):
                self._publish_at = 0.0
            self._wake_for(job_id)

    def post_frames(self, job_id: UUID, frames: Frames) -> None:
        """Queue frames, which are made when somebody is to see them."""
        with self._changed:
            if self._has_kept(job_id, frames):
                return
            if job_id not in self._watched:
                self._append(job_id, frames)
                self._wake_for(job_id)
                return
        for frame in frames.made():
            self.post(job_id, frame)

    def _has_kept(self, job_id: UUID, picture: Progress | LayerFrame | Frames) -> bool:
        """Put a picture to others that wait for somebody: a forward tells of hundreds, and of most nobody hears."""
        unseen = self._unseen.get(job_id)
        if unseen is None or not unseen.takes_pictures or len(unseen) >= LARGEST_BACKLOG:
            return False
        unseen.keep(picture)
        return True

    def lose(self, job_id: UUID) -> None:
        """Keep no frames of a job that is another attempt's now, or that has ended elsewhere.

        An end of our own that is still to be told is told as it would have been.
        """
        with self._changed:
            unseen = self._unseen.get(job_id)
            if unseen is not None and unseen.has_end:
                return
            self._held.pop(job_id, None)
            self._due.pop(job_id, None)
            if unseen is not None:
                self._tell_news(job_id, unseen)
            self._forget(job_id)

    def _wake_for(self, job_id: UUID) -> None:
        # To wake the publishing thread takes the interpreter from the one that computes.
        if (wanted_at := self._wanted_at(job_id)) < self._wakes_at:
            self._wakes_at = wanted_at
            self._changed.notify_all()

    def _wanted_at(self, job_id: UUID) -> float:
        """When the thread is to do something for a job, or for all."""
        wanted_at = min(self._publish_at if self._has_news() else math.inf, self._look_at)
        return min(wanted_at, self._due[job_id]) if job_id in self._held else wanted_at

    def _has_news(self) -> bool:
        return bool(self._waiting or self._news)

    def flush(self, timeout_seconds: float) -> bool:
        """Wait until everything posted so far is published that somebody is to see; whether it was in time."""
        with self._changed:
            for job_id in tuple(self._held):
                self._release(job_id)
            self._publish_at = 0.0
            if self._look_at < math.inf:
                self._look_at = 0.0
            self._changed.notify_all()
            return self._changed.wait_for(self._is_idle, timeout_seconds)

    def _is_idle(self) -> bool:
        return not self._has_news() and not self._sending and self._look_at > 0.0

    def _hold(self, job_id: UUID, progress: Progress) -> None:
        held = self._held.get(job_id)
        if held is not None and held.stage != progress.stage:
            self._release(job_id)
        self._held[job_id] = progress
        is_last = progress.done >= progress.total  # of its stage
        if is_last or self._due.get(job_id, 0.0) <= time.monotonic():
            self._release(job_id)

    def _release(self, job_id: UUID) -> None:
        progress = self._held.pop(job_id, None)
        if progress is not None:
            self._append(job_id, progress)

    def _replace_or_append(self, job_id: UUID, frame: LayerFrame) -> None:
        if (job_id, frame.layer) not in self._layers:
            self._append(job_id, frame)
            return
        for place, told in enumerate(self._waiting):
            if _layer_of(told) == (job_id, frame.layer):
                self._waiting[place] = Told(job_id, frame)

    def _append(self, job_id: UUID, event: Event | Frames) -> None:
        if not self._has_news():
            self._publish_at = max(time.monotonic() + GATHER_SECONDS, self._rested_at)
        if job_id in self._watched and not isinstance(event, Frames):
            self._queue(job_id, event)
        else:
            self._keep(job_id, event)

    def _keep(self, job_id: UUID, event: Event | Frames) -> None:
        """Keep an event of a job until it has been asked who watches it."""
        unseen = self._unseen.get(job_id)
        if unseen is None:
            if len(self._unseen) >= MOST_JOBS:
                # Frames alone are forgotten, never what is told in any case.
                self._forget(
                    next((each for each in self._unseen if each not in self._news), job_id)
                )
            unseen = self._unseen[job_id] = Unseen()
        if self._is_too_much(job_id, event, len(unseen)):
            return
        unseen.keep(event)
        if unseen.has_news:
            self._news.add(job_id)
        if unseen.has_pictures and self._look_at == math.inf:
            self._look_at = max(time.monotonic() + GATHER_SECONDS, self._rested_at)
        if len(unseen) > MOST_AT_ONCE and not unseen.was_asked_for:
            self._look_at = 0.0

    def _forget(self, job_id: UUID) -> None:
        self._unseen.pop(job_id, None)
        self._news.discard(job_id)
        self._watched.discard(job_id)

    @staticmethod
    def _is_too_much(job_id: UUID, event: Event | Frames, backlog: int) -> bool:
        if backlog < LARGEST_BACKLOG or isinstance(event, StateChanged | Ended):
            return False
        log.warning("event_dropped", job_id=str(job_id), backlog=backlog)
        return True

    def _queue(self, job_id: UUID, event: Event) -> None:
        if self._is_too_much(job_id, event, len(self._waiting)):
            return
        self._waiting.append(Told(job_id, event))
        if len(self._waiting) > MOST_AT_ONCE:
            self._publish_at = 0.0
        match event:
            case Progress():
                self._due[job_id] = time.monotonic() + 1 / PROGRESS_PER_SECOND
            case LayerFrame():
                self._layers.add((job_id, event.layer))
            case Ended():
                self._due.pop(job_id, None)
                self._forget(job_id)
            case _:
                pass

    def _run(self) -> None:
        try:
            self._publish()
        except Exception:
            # A worker that tells of nothing any more looks as if it did nothing.
            log.exception("outbox_failed")
            self._give_up()
            raise

    def _publish(self) -> None:
        while True:
            with self._changed:
                self._sending = False
                self._changed.notify_all()  # whoever waits for a flush
                while not self._closing:
                    pauses = [self._release_due(), self._look_at - time.monotonic()]
                    if self._has_news():
                        pauses.append(self._publish_at - time.monotonic())
                    if min(pauses[1:]) <= 0:
                        break
                    self._wakes_at = time.monotonic() + min(pauses)
                    self._changed.wait(min(pauses))
                    self._wakes_at = 0.0
                if self._closing and not self._has_news():
                    return
                strangers = self._strangers()
                self._rested_at = time.monotonic() + APART_SECONDS
                self._sending = True
            watched = self._sink.publish_all((), strangers) if strangers else frozenset()
            with self._changed:
                told = self._taken(strangers, watched)
            if told:
                self._sink.publish_all(told)

    def _strangers(self) -> list[UUID]:
        """Jobs of which it is to be asked now who watches them."""
        return [
            job_id
            for job_id, unseen in self._unseen.items()
            if unseen.has_pictures or not unseen.was_asked_for
        ]

    def _taken(self, strangers: Sequence[UUID], watched: Collection[UUID]) -> list[Told]:
        """What one round trip takes along, now that it is known who of the strangers is watched."""
        for job_id in strangers:
            unseen = self._unseen.get(job_id)
            if unseen is None:
                continue
            unseen.was_asked_for = True
            if job_id in watched:
                self._watched.add(job_id)
                del self._unseen[job_id]
                self._news.discard(job_id)
                for event in unseen.taken():
                    self._queue(job_id, event)
        for job_id in tuple(self._news):
            unseen = self._unseen[job_id]
            # With an end its frames are forgotten: first it is asked once more who watches.
            is_too_early = unseen.has_end and unseen.has_pictures and job_id not in strangers
            if unseen.was_asked_for and not is_too_early:
                self._tell_news(job_id, unseen)
        has_pictures = any(unseen.has_pictures for unseen in self._unseen.values())
        self._look_at = time.monotonic() + LOOK_SECONDS if has_pictures else math.inf
        told = [self._waiting.popleft() for _ in range(min(MOST_AT_ONCE, len(self._waiting)))]
        self._layers.difference_update(filter(None, map(_layer_of, told)))
        return told

    def _tell_news(self, job_id: UUID, unseen: Unseen) -> None:
        self._news.discard(job_id)
        for event in unseen.news_taken():
            self._queue(job_id, event)

    def _release_due(self) -> float:
        """Release the progress that is due; seconds until the next is."""
        now = time.monotonic()
        for job_id in tuple(self._held):
            if self._due.get(job_id, 0.0) <= now:
                self._release(job_id)
        pauses = [self._due[job_id] - now for job_id in self._held]
        return min(pauses, default=IDLE_SECONDS)


def _layer_of(told: Told) -> tuple[UUID, int] | None:
    """Whose layer, and which, a frame tells of; None where it tells of none."""
    job_id, event = told
    return (job_id, event.layer) if isinstance(event, LayerFrame) else None


class Reporter:
    """The listener of one job's scan."""

    def __init__(
        self,
        outbox: Outbox,
        job_id: UUID,
        check: Callable[[], None],
        pause: Callable[[], None] = lambda: None,
    ) -> None:
        self._outbox = outbox
        self._job_id = job_id
        self._check = check
        self._pause = pause

    def progress(self, stage: str, done: int, total: int) -> None:
        """`done` of `total` steps of a stage are behind us."""
        self._outbox.post(self._job_id, Progress(stage=stage, done=done, total=total))

    def layer(self, layer: int, make: Callable[[], LayerFrame]) -> None:
        """A layer has been computed."""
        crash_point("worker.computing")
        self._outbox.post_frames(self._job_id, Frames(make, layer))

    def frames(self, make: Callable[[], Sequence[ActivationFrame]]) -> None:
        """Tokens' components are known."""
        self._outbox.post_frames(self._job_id, Frames(make))

    def effects(self, frame: EffectsFrame) -> None:
        """Components' effects are estimated, or measured."""
        self._outbox.post(self._job_id, frame)

    def checkpoint(self) -> None:
        """Raises what should stop the scan: cancelled, or the lease was lost."""
        self._check()

    def pause(self) -> None:
        """The same between two steps; others may run before it returns."""
        self._check()
        self._pause()
        self._check()
