"""The worker as a Celery program: one thread that runs tickets, one that listens to the broker.

Celery runs things; it remembers nothing. Its pool is a thread: nothing forks once threads and a GPU are there.
"""

import logging
from collections.abc import Callable, Iterable
from typing import Any

import structlog
from celery import Celery, signals

from neural_mri.backing.queue import TaskName
from worker.admission import has_lost_device
from worker.attempts import Attempts
from worker.ending import end_process
from worker.hearing import Hearing

__all__ = ("CeleryIntake", "serve")

NOISY_LOGGERS = ("celery.app.trace", "celery.worker.strategy")
"""They would say two lines a ticket."""

log = structlog.get_logger(__name__)


class CeleryIntake:
    """Opens and closes queues of the running worker, from any thread."""

    def __init__(self) -> None:
        self._consumer: Any = None

    def attach(self, consumer: Any) -> None:
        """Celery's consumer, once it runs."""
        self._consumer = consumer

    def open(self, queue: str) -> None:
        """Take tickets from the queue from now on."""
        self._consumer.call_soon(self._consumer.add_task_queue, queue)

    def close(self, queue: str) -> None:
        """Take no more tickets from the queue."""
        self._consumer.call_soon(self._consumer.cancel_task_queue, queue)


def serve(
    app: Celery,
    attempts: Attempts,
    intake: CeleryIntake,
    hearing: Hearing,
    *,
    name: str,
    queues: Iterable[str],
    served: Callable[[], None],
) -> int:
    """Take tickets until SIGTERM, which lets the running job end. The exit status.

    Each ticket that was not the worker's end is told to `served`.
    """
    for noisy in NOISY_LOGGERS:
        logging.getLogger(noisy).setLevel(logging.WARNING)

    def ticket(queue: str) -> None:
        try:
            with hearing.busy():
                attempts.take(queue)
        except Exception as error:
            if has_lost_device(error):
                # At once, while it holds its jobs: the reaper sees that it is dead, and they are tried elsewhere.
                log.critical("device_lost", error=str(error).partition("\n")[0])
                end_process()
            raise
        served()

    def keep_our_logs(**_: Any) -> None:
        """A receiver of this signal, whatever it does, keeps Celery from setting up its own."""

    def ready(sender: Any, **_: Any) -> None:
        intake.attach(sender)
        log.info("worker_ready", worker=name)

    app.task(name=TaskName.TICKET.value)(ticket)
    signals.setup_logging.connect(keep_our_logs, weak=False)
    signals.worker_ready.connect(ready, weak=False)
    app.conf.update(worker_redirect_stdouts=False, worker_disable_rate_limits=True)
    worker = app.Worker(
        hostname=name,
        pool="threads",
        concurrency=1,
        queues=sorted(queues),
        without_gossip=True,
        without_mingle=True,
        without_heartbeat=True,
        quiet=True,
    )
    worker.start()
    return int(worker.exitcode or 0)
