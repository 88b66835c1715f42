"""Starting everything in order, saying so, keeping it running, and stopping all of it.

Start-up is as parallel as it can be: the API serves while the worker is still loading. The launcher runs
one thread and never loads torch.
"""

import http.client
import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from types import FrameType

import msgspec
from rich.console import Console
from rich.markup import escape

import neural_mri
from deploy.embedded import premises, valkey
from deploy.embedded.premises import Refusal
from deploy.embedded.processes import Process, Program, Roster, end_all
from deploy.embedded.supervision import Supervisor
from deploy.embedded.watch import Watch, beat_of, resident_revisions
from neural_mri.backing import broker, database, models
from neural_mri.backing.broker import AWAY, SyncRedis
from neural_mri.backing.models import RegisteredModel
from neural_mri.backing.restarts import FAILURES_BEFORE_GIVING_UP
from neural_mri.backing.settings import PREFIX, Settings

__all__ = ("Launcher",)

ROOT = Path(__file__).resolve().parents[2]

TICK_SECONDS = 0.05
LOOK_SECONDS = 1.0
"""How often the database is looked at."""
GRACE_SECONDS = 10.0
"""How long a worker may finish its scan when everything stops."""


class _Stopped(Exception):
    """A signal came while something was waited for."""


class Launcher:
    """Everything on one machine. Call `run` once, on the main thread, holding the folder's lock."""

    def __init__(self, settings: Settings, console: Console) -> None:
        self._bundled_server = not settings.redis_url
        socket = premises.socket_path(settings) if self._bundled_server else settings.valkey_socket
        self._socket = socket
        # Children run in the tree's root, so every path they get is absolute.
        self._settings = msgspec.structs.replace(
            settings,
            data_dir=settings.folder,
            viewer_dir=settings.viewer_dir.expanduser().resolve(),
            redis_url=settings.redis_url or f"unix://{socket}",
        )
        self._environment = _environment(self._settings)
        self._console = console
        self._began = time.monotonic()
        self._signals = 0
        self._roster = Roster(self._settings.folder / "running.json")
        self._supervisor = Supervisor(self._roster, self._report_trouble)

    def run(self) -> None:
        """Start, serve until a signal comes, stop. Raises `Refusal` when it cannot start."""
        for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(signum, self._heard)
        self._roster.end_leftovers()
        try:
            self._start()
            self._serve()
        except _Stopped:
            pass
        finally:
            self._stop()

    def _start(self) -> None:
        settings = self._settings
        self._console.print(
            f"[bold]Neural MRI[/bold] {neural_mri.__version__}, data in {escape(str(settings.folder))}"
        )
        if self._bundled_server:
            self._supervisor.start(
                valkey.program(
                    valkey.find_server(),
                    settings.folder / "valkey",
                    self._socket,
                    self._log("valkey"),
                    self._environment,
                )
            )
        database.migrate(settings)
        self._tell("database", "ready")
        self._supervisor.start(self._python("api", "api"))
        self._supervisor.start(self._python("reaper", "worker.reaper"))
        self._await_redis()
        for name in self._unregistered():
            self._register(name)
        self._supervisor.start(self._python("worker", "worker"))
        self._wait("api", self._api_answers)
        self._tell("api", "answers")
        first = not (settings.store_dir / "calibrations").is_dir() and not settings.store_url
        self._tell("worker", f"loading {settings.pinned_models}")
        if first:
            self._tell("", "measuring what is ordinary for it (once)")
        with broker.connect(settings) as redis:
            revisions = {model.revision for model in self._pinned().values() if model}
            self._wait("worker", lambda: self._worker_holds(redis, revisions))
        self._tell("worker", f"holds {settings.pinned_models}")
        host = f"[{settings.host}]" if ":" in settings.host else settings.host
        self._console.print(
            f"\nOpen [bold cyan]http://{escape(host)}:{settings.port}[/bold cyan]"
            "  (Ctrl-C stops everything)"
        )

    def _await_redis(self) -> None:
        settings = self._settings
        if self._bundled_server:
            self._wait("valkey", lambda: valkey.answers(settings))
        elif not valkey.answers(settings):
            raise Refusal("the server that NEURAL_MRI_REDIS_URL names does not answer.")
        self._tell("redis", "answers")

    def _serve(self) -> None:
        look_at = 0.0
        with closing(Watch(self._settings)) as watch:
            while True:
                self._pause()
                if time.monotonic() >= look_at:
                    look_at = time.monotonic() + LOOK_SECONDS
                    if why := watch.what_is_wrong(self._supervisor.process("worker").pid):
                        self._supervisor.kill("worker", why)

    def _stop(self) -> None:
        self._console.print("\nStopping ... (again to stop at once)")
        self._supervisor.stop(
            "worker",
            "api",
            "reaper",
            grace_seconds=GRACE_SECONDS,
            hurried=lambda: self._signals > 1,
        )
        # Last, because the others say goodbye through it.
        self._supervisor.stop("valkey", grace_seconds=GRACE_SECONDS, hurried=lambda: False)
        self._roster.forget()
        if self._bundled_server:
            self._socket.unlink(missing_ok=True)
        self._console.print("Stopped.")

    def _pinned(self) -> dict[str, RegisteredModel | None]:
        """The pinned models' rows, by name; None for one that is not registered."""
        sessions = database.sessions(self._settings)
        try:
            return {name: sessions.read(models.get, name) for name in self._settings.pinned}
        finally:
            sessions.close()

    def _unregistered(self) -> list[str]:
        """Pinned models that the model store does not have."""
        return [
            name
            for name, row in self._pinned().items()
            if row is None or not (self._settings.models_dir / row.folder).is_dir()
        ]

    def _register(self, name: str) -> None:
        """Bring a model into the store: once, and for the bundled one a minute's work."""
        premises.check_space(self._settings.folder, premises.SPACE_TO_CONVERT_BYTES)
        self._tell("model", f"preparing {name} (once)")
        program = Program(
            "model",
            (sys.executable, "-m", "worker.modelstore", "add", name),
            self._environment,
            folder=ROOT,
        )
        process = Process(program)
        try:
            while process.exit_status() is None:
                self._pause()
        finally:
            end_all([process], grace_seconds=5.0, hurried=lambda: False)
        if process.exit_status() != 0:
            raise Refusal(f"the model {name} could not be prepared: the lines above say why.")
        self._tell("model", f"{name} is ready")

    def _python(self, name: str, module: str) -> Program:
        return Program(
            name, (sys.executable, "-m", module), self._environment, self._log(name), ROOT
        )

    def _log(self, name: str) -> Path:
        return self._settings.folder / "logs" / f"{name}.log"

    def _wait(self, name: str, ready: Callable[[], bool]) -> None:
        """Until `ready`. Raises `Refusal` with its last words when the process keeps ending."""
        while not ready():
            self._pause()
            if self._supervisor.failures(name) >= FAILURES_BEFORE_GIVING_UP:
                raise Refusal(
                    f"{name} does not start. The end of {self._log(name)}:\n"
                    + self._supervisor.process(name).last_lines(12)
                )

    def _pause(self) -> None:
        """One turn of waiting for anything: restarts what ended, raises `_Stopped` on a signal."""
        if self._signals:
            raise _Stopped
        self._supervisor.tick()
        time.sleep(TICK_SECONDS)

    def _api_answers(self) -> bool:
        connection = http.client.HTTPConnection(
            self._settings.host, self._settings.port, timeout=2.0
        )
        try:
            connection.request("GET", "/api/health")
            return connection.getresponse().status < 500
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    def _worker_holds(self, redis: SyncRedis, revisions: set[str]) -> bool:
        try:
            beat = beat_of(redis, self._supervisor.process("worker").pid)
        except AWAY:
            return False
        return beat is not None and revisions <= resident_revisions(beat)

    def _heard(self, _signum: int, _frame: FrameType | None) -> None:
        self._signals += 1

    def _tell(self, what: str, state: str) -> None:
        seconds = time.monotonic() - self._began
        self._console.print(f"  {what:<9} {escape(state):<48} [dim]{seconds:5.1f} s[/dim]")

    def _report_trouble(self, text: str) -> None:
        self._console.print(f"  [yellow]{escape(text)}[/yellow]")


def _environment(settings: Settings) -> dict[str, str]:
    """What children see: our settings as they stand, and libraries that report to nobody."""
    own = {name: value for name, value in os.environ.items() if not name.startswith(PREFIX)}
    return {
        **own,
        **settings.environment(),
        "WANDB_MODE": "disabled",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONUNBUFFERED": "1",
    }
