"""The whole service as a person starts it, in a folder and on a port of its own."""

import hashlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import psutil
from filelock import FileLock

from neural_mri.backing import database, storage
from neural_mri.backing.settings import PREFIX, Settings
from tests.backing.stores import files, paths
from worker import modelstore

__all__ = ("Service", "free_port", "is_gone", "ready", "register", "running", "until")

ROOT = Path(__file__).parents[2]
START_SECONDS = 240.0
"""Who measures what is ordinary for a real model takes half of it on a busy machine."""
CALIBRATED = ROOT / ".cache" / "calibrations"
"""What services have measured of their models, by the code that measures."""


class Service:
    """A launcher and everything it starts."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._output = settings.folder.parent / f"launcher-{time.monotonic_ns()}.out"
        self.started = time.monotonic()
        with self._output.open("xb") as output:
            self.launcher = psutil.Popen(
                [sys.executable, "-m", "deploy.embedded"],
                cwd=ROOT,
                env=environment(settings),
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.http = httpx.Client(
            base_url=f"http://{settings.host}:{settings.port}", timeout=90.0, trust_env=False
        )

    def wait_until_ready(self) -> float:
        """Seconds from the start to the moment when the address was printed."""
        assert until(self.is_ready, START_SECONDS), self.says()
        return time.monotonic() - self.started

    def is_ready(self) -> bool:
        """Whether the launcher has said that scans can be taken."""
        assert self.launcher.poll() is None, self.says()
        return "Open http" in self.says()

    def says(self) -> str:
        """What the launcher has printed."""
        return self._output.read_text()

    def log(self, name: str) -> str:
        """What one of the processes has logged."""
        return (self.settings.folder / "logs" / f"{name}.log").read_text()

    def processes(self) -> list[psutil.Process]:
        """The launcher and everything under it."""
        return [self.launcher, *self.launcher.children(recursive=True)]

    def child(self, name: str) -> psutil.Process:
        """A process by what it runs: `api`, `worker`, `worker.reaper` or `valkey-server`.

        Of a worker the one that works; `parent` finds the one that keeps it alive.
        """
        parent = self.parent(name)
        return next((each for each in parent.children() if not is_gone(each)), parent)

    def parent(self, name: str) -> psutil.Process:
        """The process that the launcher has started under that name."""
        for process in self.launcher.children():
            with suppress(psutil.NoSuchProcess):  # a zombie among them
                if name in (process.name(), process.cmdline()[-1]):
                    return process
        raise LookupError(f"no {name} among {self.processes()}")

    def resident_pid(self) -> int | None:
        """Process id of a worker that holds a model, as the API has heard of it."""
        for beat in self.http.get("/api/health").json()["workers"]:
            if any(model["state"] == "resident" for model in beat["models"]):
                return int(beat["worker"].removeprefix("worker-").partition("@")[0])
        return None

    def scan(self, prompt: str, *, model: str | None = None, wait: int = 0) -> dict[str, Any]:
        """Ask for an fMRI scan; the job as the API answers it."""
        request = {"prompt": prompt, "scan_mode": "fMRI", "model": model}
        return self._asked("POST", "/api/scan/activation", request, wait)

    def trace(self, prompt: str, subject: str) -> dict[str, Any]:
        """Ask for a causal trace; the job as the API answers it."""
        request = {"prompt": prompt, "subject": subject, "draws": 10}
        return self._asked("POST", "/api/perturb/trace", request, wait=0)

    def load(self, model: str) -> dict[str, Any]:
        """Have a model loaded; the job that did it."""
        return self._asked("POST", "/api/model/load", {"model": model}, wait=60)

    def unload(self, model: str) -> dict[str, Any]:
        """Have a model unloaded; the job that did it."""
        return self._asked("DELETE", "/api/model/unload", {"model": model}, wait=60)

    def model(self, name: str) -> dict[str, Any]:
        """What the API says of a model."""
        answer = self.http.get("/api/model/info", params={"model": name})
        found: dict[str, Any] = answer.raise_for_status().json()
        return found

    def _asked(self, method: str, path: str, body: dict[str, Any], wait: int) -> dict[str, Any]:
        headers = {"Prefer": f"wait={wait}"} if wait else {}
        answer = self.http.request(method, path, json=body, headers=headers)
        assert answer.status_code in (200, 202), answer.text
        job: dict[str, Any] = answer.json()
        return job

    def job(self, job_id: str) -> dict[str, Any]:
        """Where a job stands."""
        answer: dict[str, Any] = self.http.get(f"/api/jobs/{job_id}").raise_for_status().json()
        return answer

    def wait_for(self, job_id: str, *states: str, seconds: float = 60.0) -> dict[str, Any]:
        """The job once it is in one of these states."""
        assert until(lambda: self.job(job_id)["state"] in states, seconds), self.job(job_id)
        return self.job(job_id)

    def stop(self, signum: signal.Signals = signal.SIGINT) -> int:
        """Signal the launcher alone, as a terminal or a supervisor does; its exit status."""
        self.http.close()
        self.launcher.send_signal(signum)
        status: int = self.launcher.wait(timeout=30)
        return status


@contextmanager
def running(settings: Settings) -> Iterator[Service]:
    """A service that has stopped, whatever happened, when the block is left."""
    service = Service(settings)
    try:
        yield service
    finally:
        everything = service.processes() if service.launcher.poll() is None else []
        if everything:
            service.stop()
        for process in everything:
            if not is_gone(process):
                process.kill()
        service.http.close()


@contextmanager
def ready(settings: Settings) -> Iterator[Service]:
    """A running service that takes scans.

    It finds what others have measured of its models by the same code, as a service does that starts again.
    """
    with ExitStack() as running_service:
        with _knowing(settings):
            service = running_service.enter_context(running(settings))
            service.wait_until_ready()
        yield service


@contextmanager
def _knowing(settings: Settings) -> Iterator[None]:
    """Hand on what has been measured to a service that the block starts, and what that one measures to others.

    While nothing has been measured yet the others wait: they would measure the same.
    """
    known, lock = CALIBRATED / _scanner_digest(), FileLock(CALIBRATED / "lock")
    CALIBRATED.mkdir(parents=True, exist_ok=True)
    with ExitStack() as turn:
        turn.enter_context(lock)
        known.mkdir(exist_ok=True)
        for outdated in CALIBRATED.glob("*/"):
            if outdated != known:
                shutil.rmtree(outdated)
        store = storage.open_store(settings)
        for path in files(known):
            store.put(path, (known / path).read_bytes())
        if (known / "calibrations").is_dir():
            turn.close()
        yield
        with lock:
            for path in set(paths(store)) - files(known):
                if "/." in path:
                    continue  # half written
                (known / path).parent.mkdir(parents=True, exist_ok=True)
                (known / path).write_bytes(store.get(path))


def _scanner_digest() -> str:
    digest = hashlib.sha256()
    for file in sorted((ROOT / "worker" / "scanner").glob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def register(settings: Settings, name: str, folder: Path) -> None:
    """Put an already converted model into the service's store."""
    database.migrate(settings)
    modelstore.add(settings, name, f"folder:{folder}")


def environment(settings: Settings) -> dict[str, str]:
    """This process's, with these settings and no others."""
    own = {name: value for name, value in os.environ.items() if not name.startswith(PREFIX)}
    return {**own, **settings.environment()}


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def is_gone(process: psutil.Process) -> bool:
    """Whether a process has ended."""
    try:
        return not process.is_running() or bool(process.status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


def until(condition: Callable[[], bool], seconds: float) -> bool:
    """Whether the condition came true in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True
