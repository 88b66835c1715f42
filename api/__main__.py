"""`python -m api`: serve until SIGTERM or SIGINT."""

import resource
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import structlog
import uvicorn

from api.app import Application, create_app
from api.wire import BoundedProtocol
from neural_mri.backing import logs, tracing
from neural_mri.backing.access import check_bind, load_pepper
from neural_mri.backing.settings import InvalidSettings, load_settings

GRACE_SECONDS = 5
"""How long answers under way may take to end once the process has been asked to."""

CONNECTIONS = 10_240
"""The most that any system takes for a limit (macOS)."""

log = structlog.get_logger(__name__)


class Server(uvicorn.Server):
    """Ends event streams when it is told to end, rather than wait for their readers.

    And then returns: uvicorn's own would raise the signal again, and the process die of it.
    """

    def __init__(self, config: uvicorn.Config, app: Application) -> None:
        super().__init__(config)
        self._app = app

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Take SIGINT and SIGTERM as the wish to end."""
        before = {
            number: signal.signal(number, self.handle_exit)
            for number in (signal.SIGINT, signal.SIGTERM)
        }
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """End."""
        self._app.end_streams()
        await super().shutdown(sockets)


def main() -> int:
    """Serve; the process's exit status."""
    try:
        settings = load_settings()
        check_bind(settings)
        load_pepper(settings)
        tracing.check(settings)
    except InvalidSettings as error:
        sys.stderr.write(f"{error}\n")
        return 2
    logs.configure(settings, process="api")
    _allow_connections()
    app = create_app(settings)
    config = uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        loop="auto" if sys.platform == "win32" else "uvloop",
        http=BoundedProtocol,
        ws="none",
        lifespan="on",
        access_log=False,
        log_config=None,
        server_header=False,
        # Requests are taken as they come: nothing stands before this process unless it is told so.
        proxy_headers=False,
        timeout_graceful_shutdown=GRACE_SECONDS,
        backlog=2048,
    )
    server = Server(config, app)
    with tracing.exported(settings, process="api"):
        server.run()
    return 0 if server.started else 1


def _allow_connections() -> None:
    """Take as many connections as may be: the usual limit is 1024, and every reader of events is one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = CONNECTIONS if hard == resource.RLIM_INFINITY else min(hard, CONNECTIONS)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


if __name__ == "__main__":
    sys.exit(main())
