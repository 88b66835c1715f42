"""The worker process: its parts, put together."""

import gc
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from neural_mri import __version__
from neural_mri.backing import broker, database, events, jobs, queue, storage
from neural_mri.backing.jobs import LeaseOwner
from neural_mri.backing.settings import Settings
from worker import metrics
from worker.app import CeleryIntake, serve
from worker.attempts import Attempts
from worker.calibrations import Calibrations
from worker.forking import Life
from worker.hearing import Hearing
from worker.keeper import Keeper
from worker.memory import Memory
from worker.placing import Placing
from worker.reporter import Outbox
from worker.residency import Residency

__all__ = ("run",)


def run(settings: Settings, life: Life) -> int:
    """Hold the pinned and wanted models, then take tickets until SIGTERM; the exit status."""
    if settings.threads:
        torch.set_num_threads(settings.threads)
    name = f"worker-{os.getpid()}@{socket.gethostname()}"
    owner = LeaseOwner.here()
    sessions = database.sessions(settings)
    store = storage.open_store(settings)
    calibrations = Calibrations(store, lambda key: sessions.look(jobs.result_of, key))
    residency = Residency(settings, sessions, calibrations)
    memory = Memory(settings, residency.device)
    intake = CeleryIntake()

    def describe() -> events.WorkerBeat:
        resting, held = memory.is_resting, residency.held()
        room = memory.for_models(sum(model.memory_bytes or 0 for model in held))
        metrics.MEMORY.labels("budget").set(room.total)
        metrics.MEMORY.labels("free").set(room.available)
        return events.WorkerBeat(
            worker=name,
            device=residency.device,
            models=held,
            budget_bytes=room.total,
            free_bytes=room.available,
            resting=resting and memory.is_resting,
            at=time.time(),
            version=__version__,
        )

    with (
        _readiness(settings.worker_ready_file) as ready,
        metrics.served(settings, residency.held),
        Outbox(events.Publisher(broker.connect(settings), settings)) as outbox,
        Keeper(
            sessions=sessions,
            redis=broker.connect(settings),
            owner=owner,
            lease_seconds=settings.lease_seconds,
            describe=describe,
        ) as keeper,
        Placing(
            settings=settings,
            sessions=sessions,
            redis=broker.connect(settings),
            owner=owner,
            worker=name,
            residency=residency,
            memory=memory,
            intake=intake,
            outbox=outbox,
            beat=keeper.beat,
        ) as placing,
    ):
        placing.begin()
        life.held()
        ready()
        # What stands now stands for good: collections need not look at it again.
        gc.freeze()
        gc.enable()
        attempts = Attempts(
            settings=settings,
            sessions=sessions,
            store=store,
            owner=owner,
            keeper=keeper,
            outbox=outbox,
            residency=residency,
            calibrations=calibrations,
            intake=intake,
            placing=placing,
            redis=broker.connect(settings),
        )

        def served_queues() -> set[str]:
            return {*residency.queues(), placing.queue}

        app = queue.celery_app(settings)
        with Hearing(broker.connect(settings), served_queues) as hearing:
            return serve(
                app,
                attempts,
                intake,
                hearing,
                name=name,
                queues=served_queues(),
                served=life.served,
            )


@contextmanager
def _readiness(file: str) -> Iterator[Callable[[], None]]:
    """Says by a file, if there is to be one, that models are held; what a killed process has left goes first."""
    if not file:
        yield lambda: None
        return
    path = Path(file)
    path.unlink(missing_ok=True)
    try:
        yield path.touch
    finally:
        path.unlink(missing_ok=True)
