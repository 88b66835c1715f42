"""Whether this worker still hears what it is asked: one that has gone deaf looks alive to everybody.

Its parent sees a process, other workers hear its heartbeat, and no job of its own runs out of time. Only that
tickets lie in its queues while it does nothing gives it away: an idle worker takes one as soon as it is there.
"""

import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Self

import structlog

from neural_mri.backing.broker import AWAY, SyncRedis
from neural_mri.backing.queue import waiting_tickets
from worker.ending import end_process

__all__ = ("Hearing",)

LOOK_SECONDS = 1.0
DEAF_LOOKS = 45
"""So many looks in a row: Celery comes back to a broker that was away in its own time, which is up to 30 s once it has
been away for some minutes, and then still has to connect. Counted, because a process that was stopped for so long has
heard nothing and seen nothing either."""

log = structlog.get_logger(__name__)


class Hearing:
    """Ends the process once it is deaf: its parent starts another. Use as a context manager."""

    def __init__(
        self,
        redis: SyncRedis,
        queues: Callable[[], Collection[str]],
        give_up: Callable[[], None] = end_process,
    ) -> None:
        self._redis = redis
        self._queues = queues
        self._give_up = give_up
        self._unheard = 0
        """Looks in a row at which something waited and nothing was done."""
        self._is_busy = False
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="hearing", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._closing.set()
        self._thread.join(timeout=LOOK_SECONDS)

    @contextmanager
    def busy(self) -> Iterator[None]:
        """While the block runs a ticket is served: others may wait."""
        self._is_busy, self._unheard = True, 0
        try:
            yield
        finally:
            self._is_busy, self._unheard = False, 0

    def _watch(self) -> None:
        while not self._closing.wait(LOOK_SECONDS):
            self._unheard = self._unheard + 1 if self._seems_deaf() else 0
            if self._unheard >= DEAF_LOOKS:
                log.critical("deaf", seconds=DEAF_LOOKS * LOOK_SECONDS)
                self._give_up()
                return

    def _seems_deaf(self) -> bool:
        if self._is_busy:
            return False
        try:
            waiting = any(waiting_tickets(self._redis, queue) for queue in self._queues())
        except AWAY:
            return False  # it hears nothing, but there is nobody to hear
        return waiting and not self._is_busy
