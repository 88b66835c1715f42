"""The worker process: its parts, put together."""

import gc
import os
import socket
import time

import structlog
import torch

from neural_mri import __version__
from neural_mri.backing import broker, database, events, models, queue, storage
from neural_mri.backing.database import Sessions
from neural_mri.backing.jobs import LeaseOwner
from neural_mri.backing.settings import Settings
from neural_mri.contract.problems import Problem
from worker import metrics
from worker.app import CeleryIntake, serve
from worker.attempts import Attempts
from worker.calibrations import Calibrations
from worker.keeper import Keeper
from worker.reporter import Outbox
from worker.residency import Residency

__all__ = ("run",)

log = structlog.get_logger(__name__)


def run(settings: Settings) -> int:
    """Hold the pinned and wanted models, then take tickets until SIGTERM; the exit status."""
    if settings.threads:
        torch.set_num_threads(settings.threads)
    name = f"worker-{os.getpid()}@{socket.gethostname()}"
    owner = LeaseOwner.here()
    sessions = database.sessions(settings)
    store = storage.open_store(settings)
    calibrations = Calibrations(store)
    residency = Residency(settings, sessions, calibrations)
    intake = CeleryIntake()

    def describe() -> events.WorkerBeat:
        return events.WorkerBeat(
            worker=name,
            device=residency.device,
            models=residency.held(),
            at=time.time(),
            version=__version__,
        )

    with (
        metrics.served(settings, residency.held),
        Outbox(events.Publisher(broker.connect(settings), settings)) as outbox,
        Keeper(
            sessions=sessions,
            redis=broker.connect(settings),
            owner=owner,
            lease_seconds=settings.lease_seconds,
            describe=describe,
        ) as keeper,
    ):
        _hold_models(settings, sessions, residency)
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
        )
        return serve(
            queue.celery_app(settings), attempts, intake, name=name, queues=residency.queues()
        )


def _hold_models(settings: Settings, sessions: Sessions, residency: Residency) -> None:
    """Pinned models are what this worker is for; one that was wanted may have gone bad since."""
    for name in settings.pinned:
        residency.load(name, pin=True)
    for model in sessions.read(models.all):
        if model.wanted and model.name not in settings.pinned:
            try:
                residency.load(model.name)
            except Problem as problem:
                log.warning("wanted_model_not_loaded", model=model.name, reason=problem.detail)
