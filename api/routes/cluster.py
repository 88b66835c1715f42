"""How the service is, for its operator and for Prometheus."""

import asyncio
import platform
from typing import Any

from litestar import Response, get
from litestar.di import NamedDependency

from api.access import needs
from api.dependencies import Services
from api.metrics import MEDIA_TYPE, Now
from api.problems import refusals
from api.residents import holdings
from neural_mri import __version__
from neural_mri.backing import keys, loads
from neural_mri.backing.broker import AWAY, AsyncRedis
from neural_mri.backing.loads import Standing
from neural_mri.contract.auth import Scope
from neural_mri.contract.cluster import Cluster, ModelHeld, Versions, WorkerSeen
from neural_mri.contract.problems import Unavailable

__all__ = ("get_cluster", "get_metrics")

ANSWER_SECONDS = 2.0


@get(
    "/api/cluster",
    operation_id="getCluster",
    summary="Workers, what they hold, and what waits",
    description="What `neural-mri cluster` shows. 503 while the database is away.",
    tags=["service"],
    responses=refusals(),
)
async def get_cluster(services: NamedDependency[Services]) -> Cluster:
    """Tell what the whole service does now."""
    queues, database = await services.sessions.read(
        lambda session: (loads.loads(session), loads.version(session))
    )
    held = await holdings(services.redis)
    workers = tuple(
        WorkerSeen(
            worker=beat.worker,
            device=beat.device,
            version=beat.version,
            seen_at=beat.at,
            models=tuple(
                ModelHeld(
                    name=model.name,
                    revision=model.revision,
                    state=model.state,
                    memory_bytes=model.memory_bytes,
                    load_seconds=model.load_seconds,
                    pinned=model.pinned,
                    held_seconds=model.held_seconds,
                )
                for model in beat.models
            ),
            budget_bytes=beat.budget_bytes,
            free_bytes=beat.free_bytes,
        )
        for beat in held.beats
    )
    return Cluster(
        versions=Versions(
            service=__version__,
            python=platform.python_version(),
            database=database,
            redis=await _redis_version(services.redis),
        ),
        workers=workers if held.is_known else None,
        queues=tuple(queues),
    )


async def _redis_version(redis: AsyncRedis) -> str | None:
    try:
        said = await redis.info("server")
    except AWAY:
        return None
    return str(said.get("valkey_version") or said.get("redis_version"))


@get(
    "/metrics",
    operation_id="getMetrics",
    summary="Figures for Prometheus",
    description="In its text format. What does not answer is left out, and said to be down.",
    tags=["service"],
    media_type="text/plain",
    opt=needs(Scope.SCAN_READ, known_lately=True),
    responses=refusals(),
)
async def get_metrics(services: NamedDependency[Services]) -> Response[bytes]:
    """Tell Prometheus how the service is."""
    held, standing = await holdings(services.redis), await _standing(services)
    now = Now(
        loads=None if standing is None else standing.loads,
        lines={} if standing is None else standing.lines,
        workers=held.beats if held.is_known else None,
        readers=services.hub.readers,
        deleted=await _deleted(services.redis),
        busy_workers=None if standing is None else standing.busy_workers,
    )
    return Response(services.metrics.exposition(now), media_type=MEDIA_TYPE)


async def _deleted(redis: AsyncRedis) -> dict[str, int] | None:
    """How much has been deleted, by what it was and why."""
    try:
        counts: dict[Any, Any] = await redis.hgetall(keys.DELETED)
    except AWAY:
        return None
    return {name.decode(): int(count) for name, count in counts.items()}


async def _standing(services: Services) -> Standing | None:
    try:
        async with asyncio.timeout(ANSWER_SECONDS):
            return await services.sessions.read(loads.standing)
    except (Unavailable, TimeoutError):
        return None
