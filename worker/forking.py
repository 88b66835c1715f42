"""A worker that is killed is there again at once: its parent has imported everything and only waits.

The imports of PyTorch and its like are seconds of processor time, and nothing in them depends on what the
worker was doing. So `python -m worker` makes them once and then forks the process that works. What dies in a
child must not be shared with the next: databases, connections, threads, the GPU and the exporter of spans
are all opened after the fork, and the parent has one thread, which waits for signals.

Signals that end a worker are handed to the child, and its end is the parent's end. A child that was killed,
as the kernel does for want of memory, is replaced.
"""

import gc
import importlib
import logging
import mmap
import os
import signal
import struct
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import structlog

from neural_mri.backing.restarts import (
    FAILURES_BEFORE_GIVING_UP,
    HEALTHY_SECONDS,
    pause_before_restart,
)
from neural_mri.backing.settings import Settings
from worker import metrics
from worker.children import forked

__all__ = ("Life", "import_the_rest", "kept_alive", "why_not")

ENDING = frozenset({signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGHUP})
"""After these the child's end is meant."""
HEARD = ENDING | {signal.SIGCHLD, signal.SIGCONT, signal.SIGUSR1, signal.SIGUSR2}
DEVICES = ("/dev/nvidia", "/dev/kfd", "/dev/dri")
TOLD = struct.Struct("d?")
LIKELIER_VICTIM = 50
"""How much sooner, in thousandths of all memory, the kernel ends the child than its parent."""
IMPORTED_LATER = (
    "celery.app.amqp",
    "celery.app.control",
    "celery.app.events",
    "celery.app.log",
    "celery.apps.worker",
    "celery.concurrency.thread",
    "celery.fixups.django",
    "celery.worker.components",
    "celery.worker.consumer.delayed_delivery",
    "celery.worker.strategy",
    "kombu.transport.redis",
    "transformer_lens.model_bridge.sources.transformers_driver",
    "transformers.generation.utils",
    "transformers.models.llama.modeling_llama",
)
"""What a worker imports on its way to its first job. Not numba, a second of its own: weight scans bring it."""

log = structlog.get_logger("worker")


def import_the_rest(settings: Settings) -> None:
    """Import what would be imported between the fork and the first job."""
    driver = "psycopg" if settings.database_url.startswith("postgresql") else "sqlite3"
    for module in (*IMPORTED_LATER, driver):
        importlib.import_module(module)


def why_not() -> str | None:
    """Why this process must not fork its worker but be it; None where it may.

    Forks a child that does nothing: OpenBLAS and its like end their threads for a fork, and only what is
    left after one would be missing in a child.
    """
    if sys.platform != "linux":
        return "only Linux ends a child with its parent, and libraries elsewhere forbid forks"
    trial = os.fork()
    if not trial:
        os._exit(0)
    os.waitpid(trial, 0)
    threads = [_first_line(thread / "comm") for thread in Path("/proc/self/task").iterdir()]
    if len(threads) > 1:
        return f"imports have started threads: {', '.join(sorted(threads))}"
    open_files = [_target(link) for link in Path("/proc/self/fd").iterdir()]
    if devices := [target for target in open_files if target.startswith(DEVICES)]:
        return f"imports have opened {', '.join(sorted(devices))}"
    return None


class Life:
    """How far a child has come; said by the child, read by its parent."""

    def __init__(self) -> None:
        self._shared = mmap.mmap(-1, TOLD.size)

    def begin(self) -> None:
        """Nothing has come of it yet."""
        self._tell(0.0, has_served=False)

    def held(self) -> None:
        """Its models are held."""
        self._tell(time.monotonic(), has_served=False)

    def served(self) -> None:
        """It has lived through a ticket."""
        self._tell(self._told()[0], has_served=True)

    def has_held(self) -> bool:
        """Whether it came so far as to hold its models."""
        return bool(self._told()[0])

    def was_healthy(self) -> bool:
        """Whether what ended it cannot have been its start."""
        since, has_served = self._told()
        return has_served or (bool(since) and time.monotonic() - since > HEALTHY_SECONDS)

    def _tell(self, held_since: float, *, has_served: bool) -> None:
        self._shared[:] = TOLD.pack(held_since, has_served)

    def _told(self) -> tuple[float, bool]:
        since, has_served = TOLD.unpack(self._shared[:])
        return since, has_served


def kept_alive(work: Callable[[Life], int]) -> int:
    """The work, done by a child, and by another whenever a signal has ended it. The exit status.

    Returns in the parent when the work is over, and in every child with its own status. Ends this process
    by the signal that has ended a child which was told to go.
    """
    # What stands now is every child's: a collection that marked it would copy it.
    gc.freeze()
    unheard = signal.pthread_sigmask(signal.SIG_BLOCK, HEARD)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    life, failures = Life(), 0
    while True:
        life.begin()
        child = forked()
        if not child:
            _settle()
            signal.pthread_sigmask(signal.SIG_SETMASK, unheard)
            return work(life)
        end = _end_of(child)
        if end.killer is None:
            signal.pthread_sigmask(signal.SIG_SETMASK, unheard)
            return end.status
        failures = 1 if life.was_healthy() else failures + 1
        gives_up = failures >= FAILURES_BEFORE_GIVING_UP and not life.has_held()
        pause = None if end.meant or gives_up else pause_before_restart(failures)
        log.log(
            logging.INFO if end.meant else logging.ERROR,
            "worker_killed",
            pid=child,
            signal=end.killer.name,
            had_held_its_models=life.has_held(),
            again_in_seconds=pause,
        )
        if pause is None:
            return _end_by(end.killer, unheard)
        # The next child inherits the count.
        metrics.KILLED.labels(end.killer.name).inc()
        if _told_to_go(pause):
            return 0


class _End(NamedTuple):
    """How a child has ended."""

    status: int
    killer: signal.Signals | None
    """The signal that ended it; None for an exit."""
    meant: bool
    """Whether it had been told to go."""


def _settle() -> None:
    """Be a process of its own."""
    with suppress(OSError, ValueError):
        adjustment = Path("/proc/self/oom_score_adj")
        sooner = min(int(adjustment.read_text()) + LIKELIER_VICTIM, 1000)
        adjustment.write_text(str(sooner))
    # What is sent to the parent's whole group reaches the worker once: from the parent.
    os.setpgid(0, 0)
    # Python's own generator is seeded anew after a fork; numpy's is not.
    np.random.seed()  # noqa: NPY002  the shared generator is what libraries draw from


def _end_of(child: int) -> _End:
    """Wait for the child, hand it what the parent is told, and bury whatever else has ended."""
    meant = False
    while True:
        heard = signal.Signals(signal.sigwait(HEARD))
        if heard is signal.SIGCHLD:
            if (status := _buried(child)) is not None:
                code = os.waitstatus_to_exitcode(status)
                return _End(code, signal.Signals(-code) if code < 0 else None, meant)
            continue
        # A hangup means here what it means to Celery, less the new start: that is a supervisor's.
        os.kill(child, signal.SIGTERM if heard is signal.SIGHUP else heard)
        if heard in ENDING:
            meant = True
            os.kill(child, signal.SIGCONT)  # a stopped process would never hear of it


def _buried(child: int) -> int | None:
    """The child's wait status, if it has ended. As a container's first process it has others to bury."""
    found = None
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return found
        if not pid:
            return found
        if pid == child:
            found = status


def _told_to_go(seconds: float) -> bool:
    """Whether a signal that ends a worker comes within the pause between two."""
    deadline = time.monotonic() + seconds
    while (left := deadline - time.monotonic()) > 0:
        heard = signal.sigtimedwait(HEARD, left)
        if heard is not None and heard.si_signo in ENDING:
            return True
    return False


def _end_by(killer: signal.Signals, unheard: set[int | signal.Signals]) -> int:
    """End as the child has; by a shell's exit status for it where this is a container's first process."""
    if os.getpid() != 1:
        signal.pthread_sigmask(signal.SIG_SETMASK, unheard)
        if killer not in (signal.SIGKILL, signal.SIGSTOP):
            signal.signal(killer, signal.SIG_DFL)
        os.kill(os.getpid(), killer)
    return 128 + killer


def _first_line(path: Path) -> str:
    return path.read_text().strip()


def _target(link: Path) -> str:
    try:
        return str(link.readlink())
    except FileNotFoundError:  # the folder's own descriptor, closed by now
        return ""
