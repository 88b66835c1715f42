"""Whether this service can take work, and what it stands on."""

import asyncio
from enum import StrEnum

import msgspec
from litestar import Response, get
from litestar.di import NamedDependency
from litestar.openapi.datastructures import ResponseSpec

from api.access import FOR_PROBES
from api.dependencies import Services
from api.residents import Holdings, holdings
from neural_mri import __version__
from neural_mri.backing import jobs, keys, models
from neural_mri.backing.events import WorkerBeat
from neural_mri.backing.models import RegisteredModel
from neural_mri.contract.auth import Scope
from neural_mri.contract.models import ModelState
from neural_mri.contract.problems import Unavailable

__all__ = ("Health", "health")

ANSWER_SECONDS = 2.0
"""A database that does not answer for so long is away, as far as health goes."""


class Status(StrEnum):
    """How the service is, in one word."""

    READY = "ready"
    """The default model is held by a worker: scans start at once."""
    WAITING = "waiting"
    """Requests are taken; no worker holds the default model yet."""
    DEGRADED = "degraded"
    """Requests are taken; Redis is away, so that progress is told late."""
    DOWN = "down"
    """The database is away: nothing can be taken."""


class Backing(StrEnum):
    """Whether something this service stands on answers."""

    UP = "up"
    AWAY = "away"


class ModelHealth(msgspec.Struct, frozen=True, kw_only=True):
    """A registered model."""

    name: str
    state: ModelState
    queued: int
    """Jobs that wait for it."""


class Health(msgspec.Struct, frozen=True, kw_only=True):
    """How the service is."""

    status: Status
    version: str
    database: Backing
    redis: Backing
    workers: tuple[WorkerBeat, ...] = ()
    models: tuple[ModelHealth, ...] = ()
    queued: int = 0
    """Jobs that no worker has taken yet."""
    streams: int = 0
    """Jobs whose events are being followed through this process."""


@get(
    "/api/health",
    operation_id="health",
    summary="How the service is",
    description=(
        "503 while the database is away; every other state takes requests. Needs no API key; who has "
        "none is told of no worker and no model."
    ),
    tags=["service"],
    opt=FOR_PROBES,
    responses={
        503: ResponseSpec(Health, description="The database is away", generate_examples=False)
    },
)
async def health(services: NamedDependency[Services]) -> Response[Health]:
    """Tell how the service is."""
    held = await holdings(services.redis)
    report = await _report(services, held)
    return Response(report, status_code=503 if report.status is Status.DOWN else 200)


async def _report(services: Services, held: Holdings) -> Health:
    try:
        async with asyncio.timeout(ANSWER_SECONDS):
            registered = await services.sessions.read(models.all)
            queued = await services.sessions.read(jobs.queued_by_queue)
        database = Backing.UP
    except (Unavailable, TimeoutError):
        registered, queued, database = [], {}, Backing.AWAY
    return Health(
        status=_status(services, held, registered) if database is Backing.UP else Status.DOWN,
        version=__version__,
        database=database,
        redis=Backing.UP if held.is_known else Backing.AWAY,
        workers=held.beats if services.caller.may(Scope.SCAN_READ) else (),
        models=tuple(
            ModelHealth(
                name=model.name,
                state=held.state(model.revision),
                queued=queued.get(keys.scan_queue(model.revision), 0),
            )
            for model in registered
            if services.caller.may(Scope.SCAN_READ)
        ),
        queued=sum(queued.values()),
        streams=services.hub.followed,
    )


def _status(services: Services, held: Holdings, registered: list[RegisteredModel]) -> Status:
    if not held.is_known:
        return Status.DEGRADED
    default = services.settings.default_model
    ready = any(
        model.name == default and held.state(model.revision) is ModelState.RESIDENT
        for model in registered
    )
    return Status.READY if ready else Status.WAITING
