"""`python -m worker`: hold the pinned and wanted models, then take tickets until SIGTERM."""

import os
import socket
import sys
import time

import structlog
import torch

from neural_mri.backing import broker, database, events, logs, models, queue, storage
from neural_mri.backing.database import Sessions
from neural_mri.backing.jobs import LeaseOwner
from neural_mri.backing.settings import InvalidSettings, Settings, load_settings
from neural_mri.contract.problems import Problem
from worker.app import CeleryIntake, serve
from worker.attempts import Attempts
from worker.keeper import Keeper
from worker.reporter import Outbox
from worker.residency import Residency

log = structlog.get_logger("worker")


def main() -> int:
    """Exit status: 0 after SIGTERM, 1 when it could not start."""
    try:
        settings = load_settings()
    except InvalidSettings as error:
        sys.stderr.write(f"neural-mri: {error}\n")
        return 1
    logs.configure(settings, process="worker")
    _choose_gpu(settings)
    try:
        return _run(settings)
    except Problem as problem:
        log.critical("worker_not_started", reason=problem.detail)
        return 1


def _choose_gpu(settings: Settings) -> None:
    """`cuda:1` means that this process sees no other GPU. Torch looks when it is first used."""
    device, _, number = settings.device.partition(":")
    if device == "cuda" and number:
        os.environ["CUDA_VISIBLE_DEVICES"] = number


def _run(settings: Settings) -> int:
    if settings.threads:
        torch.set_num_threads(settings.threads)
    name = f"worker-{os.getpid()}@{socket.gethostname()}"
    owner = LeaseOwner.here()
    sessions = database.sessions(settings)
    residency = Residency(settings, sessions)
    intake = CeleryIntake()

    def describe() -> events.WorkerBeat:
        return events.WorkerBeat(
            worker=name, device=residency.device, models=residency.held(), at=time.time()
        )

    with (
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
        attempts = Attempts(
            settings=settings,
            sessions=sessions,
            store=storage.open_store(settings),
            owner=owner,
            keeper=keeper,
            outbox=outbox,
            residency=residency,
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


if __name__ == "__main__":
    sys.exit(main())
