"""The application: routes and viewer behind one edge."""

import asyncio
import gc
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, suppress
from typing import Any, cast

import structlog
from litestar import Litestar, Request
from litestar.di import Provide
from litestar.enums import ScopeType
from litestar.handlers.base import BaseRouteHandler
from litestar.types import ASGIApp, Receive, Scope, Send

from api import openapi
from api.access import Connection, admit
from api.cancellation import cancelled
from api.dependencies import Services, open_services
from api.edge import Edge
from api.metrics import Metrics
from api.problems import HANDLERS, JsonRequest
from api.routes import ROUTES
from api.viewer import Viewer
from neural_mri.backing import models
from neural_mri.backing.settings import Settings
from neural_mri.contract.problems import Problem

__all__ = ("Application", "create_app")

log = structlog.get_logger(__name__)


class Application:
    """The whole service as one ASGI application."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._viewer = Viewer(settings.viewer_dir)
        self._metrics = Metrics()
        self.litestar = Litestar(
            route_handlers=ROUTES,
            dependencies={"services": Provide(self._provide, sync_to_thread=False)},
            guards=[self._admit],
            exception_handlers=HANDLERS,
            lifespan=[self._life],
            openapi_config=openapi.CONFIG,
            request_max_body_size=settings.max_body_bytes,
            request_class=JsonRequest,
            logging_config=None,
            debug=False,
        )
        self._edge = Edge(self._dispatch, settings, self._metrics)
        self._services: Services | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, or live from start to end."""
        await self._edge(scope, receive, send)

    def end_streams(self) -> None:
        """Send away everyone who waits for events: a server that ends would wait for them."""
        if self._services is not None:
            self._services.hub.close()

    async def _dispatch(self, scope: Scope, receive: Receive, send: Send) -> None:
        # A Litestar mount at / would hide routes with path parameters, so the viewer stands beside it.
        handler = self._viewer if _is_of_the_viewer(scope) else self.litestar
        await cast("ASGIApp", handler)(scope, receive, send)

    async def _admit(self, connection: Connection, handler: BaseRouteHandler) -> None:
        """Runs before anything of the request but its path is read."""
        connection.state.caller = await admit(self._started(), connection, handler)

    def _provide(self, request: Request[Any, Any, Any]) -> Services:
        return self._started().on_behalf_of(request.state.caller)

    def _started(self) -> Services:
        if self._services is None:
            raise RuntimeError("a request came before the application had started")
        return self._services

    @asynccontextmanager
    async def _life(self, _app: Litestar) -> AsyncGenerator[None]:
        self._services = open_services(self._settings, self._metrics)
        warming = asyncio.create_task(_warm(self._services))
        log.info("api_started", viewer=str(self._settings.viewer_dir))
        try:
            yield
        finally:
            try:
                await cancelled(warming)
            finally:
                await self._services.close()
            log.info("api_stopped")


def create_app(settings: Settings) -> Application:
    """The service with these settings."""
    return Application(settings)


def _is_of_the_viewer(scope: Scope) -> bool:
    if scope["type"] != ScopeType.HTTP:
        return False
    path = scope["path"]
    own = (*openapi.PATHS, "/metrics")
    return path != "/api" and not path.startswith("/api/") and path.rstrip("/") not in own


async def _warm(services: Services) -> None:
    """Read the tokenizers of the models that will be asked for first; it takes some 100 ms each."""
    wanted = {services.settings.default_model, *services.settings.pinned}
    with suppress(Problem):
        for model in await services.sessions.read(models.all):
            if model.name in wanted:
                await services.tokenizers.tokenizer(model.tokenizer_digest)
    # What stands now stands for good: to look through it for garbage again and again holds every request up.
    gc.freeze()
