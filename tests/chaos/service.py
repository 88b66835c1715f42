"""The service's real processes, kept running however often they are killed."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple, Self

import httpx
import msgspec
import psutil
import redis

from neural_mri.backing.settings import PREFIX, Settings
from tests.chaos.premises import Broker

__all__ = ("Nursery", "Place", "Service")

ROOT = Path(__file__).parents[2]
TICK_SECONDS = 0.02


class Nursery:
    """Where processes come from."""

    def __init__(self, crash_points: Path, environment: Mapping[str, str]) -> None:
        own = {name: value for name, value in os.environ.items() if not name.startswith(PREFIX)}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.chaos.nursery"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=ROOT,
            env={
                **own,
                "NMRI_CRASH_POINTS": str(crash_points),
                "HF_HUB_OFFLINE": "1",
                **environment,
            },
            text=True,
        )
        self._turn = threading.Lock()
        assert self._process.stdout is not None
        if self._process.stdout.readline() != "ready\n":
            raise RuntimeError("the nursery did not start")

    def bear(self, program: str, settings: Settings, log: Path, network: str | None) -> int:
        """Start a program of the service; its process id."""
        wanted = {
            "program": program,
            "environment": settings.environment(),
            "log": str(log),
            "network": network,
        }
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with self._turn:
            self._process.stdin.write(json.dumps(wanted) + "\n")
            self._process.stdin.flush()
            return int(self._process.stdout.readline())

    def close(self) -> None:
        """End, and all its children."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()


class Place(NamedTuple):
    """One process that should always run."""

    name: str
    program: str
    network: str | None = None
    """The second host's namespace."""


class Service:
    """Everything that runs, and what brings it back. Use as a context manager."""

    def __init__(
        self,
        settings: Settings,
        broker: Broker,
        places: Sequence[Place],
        folder: Path,
        environment: Mapping[str, str],
    ) -> None:
        self.settings = settings
        self.broker = broker
        self.places = tuple(places)
        self.crash_points = folder / "crash-points"
        self.crash_points.mkdir()
        self.left_over: list[int] = []
        self._environment = environment
        self._logs = folder / "logs"
        self._logs.mkdir()
        # A number is given to another process soon enough; psutil knows one from the other.
        self._running: dict[str, psutil.Process] = {}
        self._ever: list[psutil.Process] = []
        self._ending = threading.Event()
        self._watch = threading.Thread(target=self._keep, name="keep", daemon=True)
        self.births = 0

    def __enter__(self) -> Self:
        self.nursery = Nursery(self.crash_points, self._environment)
        self.broker.start()
        for place in self.places:
            self._bear(place)
        self._watch.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    @property
    def url(self) -> str:
        """The API's."""
        return f"http://{self.settings.host}:{self.settings.port}"

    def names(self, program: str) -> list[str]:
        """Of the places of a program."""
        return [place.name for place in self.places if place.program == program]

    def pid(self, name: str) -> int:
        """The process that now runs at a place."""
        return int(self._running[name].pid)

    def working_pid(self, name: str) -> int:
        """The same, or the one that it has forked to work."""
        return int(self._working(name).pid)

    def signal(self, name: str, signum: signal.Signals) -> None:
        """Send one; nothing happens where the process has just ended."""
        with suppress(psutil.NoSuchProcess):
            self._running[name].send_signal(signum)

    def kill_working(self, name: str) -> None:
        """Kill the process that works and not its parent, as the kernel does for want of memory."""
        with suppress(psutil.NoSuchProcess):
            self._working(name).kill()

    def _working(self, name: str) -> psutil.Process:
        """The process at a place, or the one that it has forked to work. Raises `NoSuchProcess`."""
        process = self._running[name]
        return next((each for each in process.children() if not _is_gone(each)), process)

    def frozen(self, name: str, seconds: float) -> None:
        """Have the process that works at a place stand still for a while."""
        with suppress(psutil.NoSuchProcess):
            process = self._working(name)
            process.suspend()
            time.sleep(seconds)
            process.resume()

    def one_more(self, place: Place, seconds: float) -> None:
        """Have another process beside the usual ones for a while, then kill it."""
        process = self._born(place, self.settings)
        time.sleep(seconds)
        if process is not None:
            with suppress(psutil.NoSuchProcess):
                process.kill()

    def arm(self, point: str, way: str = "", times: str = "") -> Path:
        """Have the next process that comes to a crash point die there, or what `ways.WAYS` names befall it.

        With `faults.AGAIN` it befalls each that comes, until the file is taken away.
        """
        place = self.crash_points / point
        written = self.crash_points / f".{point}"
        written.write_text(f"{way}\n{times}")
        written.rename(place)
        return place

    def stop(self) -> None:
        """End everything, gently."""
        if self._ending.is_set():
            return
        self._ending.set()
        self._watch.join()
        for signum in (signal.SIGCONT, signal.SIGTERM):
            for name in self._running:
                self.signal(name, signum)
        self._until(lambda: not self.alive(), 20.0)
        self.left_over = [process.pid for process in self.alive()]
        for process in self.alive():
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self.nursery.close()
        self.broker.kill()

    def alive(self) -> list[psutil.Process]:
        """Processes of ours, of all that ever were, that run now."""
        return [process for process in self._ever if not _is_gone(process)]

    def log(self, name: str) -> str:
        """What a place's processes have said."""
        return (self._logs / f"{name}.log").read_text(errors="replace")

    def logs(self) -> dict[str, str]:
        """Everything that was said."""
        return {path.stem: path.read_text(errors="replace") for path in self._logs.glob("*.log")}

    def _bear(self, place: Place) -> None:
        settings = self.settings
        if place.network is not None:
            # There only the database and the broker are reached, by the first host's address.
            settings = msgspec.structs.replace(settings, host="127.0.0.1")
        process = self._born(place, settings)
        if process is not None:
            self._running[place.name] = process

    def _born(self, place: Place, settings: Settings) -> psutil.Process | None:
        """A new process at a place; None where it has ended already."""
        log = self._logs / f"{place.name}.log"
        pid = self.nursery.bear(place.program, settings, log, place.network)
        self.births += 1
        try:
            process = psutil.Process(pid)
        except psutil.NoSuchProcess:
            return None
        self._ever.append(process)
        return process

    def _keep(self) -> None:
        while not self._ending.wait(TICK_SECONDS):
            for place in self.places:
                process = self._running.get(place.name)
                if process is None or _is_gone(process):
                    self._bear(place)
            if self.broker.is_gone():
                with suppress(OSError):
                    self.broker.start()

    @staticmethod
    def _until(condition: Callable[[], bool], seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                return False
            time.sleep(0.02)
        return True

    def wait_until_ready(self, workers: int, seconds: float = 60.0) -> None:
        """Until the API answers and so many workers hold a model. Raises `TimeoutError`."""
        from neural_mri.backing import events

        def ready() -> bool:
            try:
                httpx.get(f"{self.url}/api/health", timeout=5, trust_env=False)
                with self.broker.client() as client:
                    beats = events.heartbeats(client)
            except (redis.RedisError, httpx.TransportError):
                return False
            holding = [beat for beat in beats if any(m.state == "resident" for m in beat.models)]
            return len(holding) >= workers

        if not self._until(ready, seconds):
            raise TimeoutError(
                "\n".join(f"{name}: {text[-2000:]}" for name, text in self.logs().items())
            )


def _is_gone(process: psutil.Process) -> bool:
    try:
        return not process.is_running() or bool(process.status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True
