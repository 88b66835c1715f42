"""A whole service in a folder of its own, with users, and what its processes have spent."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple
from uuid import UUID

import httpx
import msgspec
import psutil

from neural_mri.backing import access, database, jobs
from neural_mri.backing.database import Sessions
from neural_mri.backing.records import Job
from neural_mri.backing.settings import Settings
from neural_mri.contract.auth import Scope
from tests.system.service import Service, free_port, ready, register

__all__ = ("USERS", "Cluster", "Spent", "changed", "prepared", "serving")

USERS = tuple(f"user-{number:02}" for number in range(16))


class Spent(NamedTuple):
    """Processor seconds of the service's processes, by what they run."""

    seconds: dict[str, float]

    @property
    def total(self) -> float:
        """Of all of them."""
        return sum(self.seconds.values())

    def since(self, before: "Spent") -> "Spent":
        """What has been spent after an earlier look."""
        return Spent({name: now - before.seconds[name] for name, now in self.seconds.items()})

    def each(self, n_jobs: int) -> str:
        """Milliseconds a job, by process."""
        parts = sorted(self.seconds.items(), key=lambda part: -part[1])
        return ", ".join(f"{name} {1e3 * taken / n_jobs:.1f}" for name, taken in parts)


class Cluster:
    """A running service whose users have keys."""

    def __init__(self, service: Service, keys: dict[str, str]) -> None:
        self.service = service
        self.settings = service.settings
        self.keys = keys
        self.sessions: Sessions = database.sessions(self.settings)

    def spent(self) -> Spent:
        """Processor seconds of every process since it started."""
        seconds: dict[str, float] = {}
        for process in self.service.processes():
            with suppress(psutil.NoSuchProcess):
                name = process.name() if "valkey" in process.name() else process.cmdline()[-1]
                times = process.cpu_times()
                seconds[name] = seconds.get(name, 0.0) + times.user + times.system
        return Spent(seconds)

    def passes(self) -> int:
        """Passes that the worker has made, by its own count."""
        url = f"http://{self.settings.host}:{self.settings.worker_metrics_port}/metrics"
        for line in httpx.get(url, trust_env=False).text.splitlines():
            if line.startswith("neural_mri_worker_pass_jobs_count "):
                return int(float(line.split()[1]))
        raise LookupError("the worker does not count its passes")

    def job(self, job_id: str) -> Job:
        """A job as the database has it."""
        found = self.sessions.read(jobs.get, UUID(job_id))
        if found is None:
            raise LookupError(job_id)
        return found


@contextmanager
def serving(settings: Settings) -> Iterator[Cluster]:
    """The service, ready, until the block is left."""
    pepper = access.load_pepper(settings)
    sessions = database.sessions(settings)
    keys = {
        user: sessions.write(
            access.create_key, pepper, user=user, scopes=(Scope.SCAN_READ, Scope.SCAN_WRITE)
        ).key
        for user in USERS
    }
    sessions.close()
    with ready(settings) as service:
        cluster = Cluster(service, keys)
        try:
            yield cluster
        finally:
            cluster.sessions.close()


@contextmanager
def prepared(name: str, model: Path, **changes: Any) -> Iterator[Settings]:
    """Settings of a service that has not started yet, in a folder that goes with the block."""
    with tempfile.TemporaryDirectory(prefix="nmri-") as folder:
        settings = Settings(
            data_dir=Path(folder) / "data",
            port=free_port(),
            worker_metrics_port=free_port(),
            default_model=name,
            pinned_models=name,
            auth="keys",
            user_max_jobs=0,
            max_queued_jobs=50_000,
            **changes,
        )
        register(settings, name, model)
        yield settings


def changed(settings: Settings, **changes: Any) -> Settings:
    """The same service, started otherwise."""
    return msgspec.structs.replace(settings, **changes)
