"""Several tiny models of one shape, and what asks a worker for them."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest
from sqlalchemy import update

from neural_mri.backing import events, keys
from neural_mri.backing.broker import SyncRedis
from neural_mri.backing.database import epoch
from neural_mri.backing.events import HeldModel, WorkerBeat
from neural_mri.backing.jobs import Job, LeaseOwner
from neural_mri.backing.models import RegisteredModel
from neural_mri.backing.rows import JOBS
from neural_mri.backing.settings import Settings
from neural_mri.contract.jobs import JobState
from neural_mri.contract.models import ModelState
from neural_mri.contract.scans import ActivationScan
from tests.worker.bench import Bench
from worker import modelstore
from worker.scanner import loading

__all__ = (
    "ELSEWHERE",
    "NAMES",
    "Registered",
    "aged",
    "ask",
    "kind_of_end",
    "names",
    "other_worker",
    "serve",
    "short_of_memory",
    "working",
)

NAMES = ("anchor", "b", "c")
ELSEWHERE = LeaseOwner("another-host", 4242, 99)


class Registered(dict[str, RegisteredModel]):
    """The models, each registered when a test first names it."""

    def __init__(self, settings: Settings, folders: dict[str, Path]) -> None:
        super().__init__()
        self._settings, self._folders = settings, folders

    def folder_of(self, name: str) -> Path:
        """Where its files come from."""
        return self._folders[name]

    def bring(self, name: str) -> None:
        """Register it, if no test has named it yet."""
        _ = self[name]

    def __missing__(self, name: str) -> RegisteredModel:
        self[name] = modelstore.add(self._settings, name, f"folder:{self._folders[name]}")
        return self[name]


@contextmanager
def working(bench: Bench, **changes: object) -> Iterator[Bench]:
    """The same bench with other settings."""
    settings = msgspec.structs.replace(bench.settings, **changes)
    other = Bench(settings, bench.sessions, bench.redis, bench.tiny)
    with other.outbox, other.keeper:
        yield other


def ask(worker: Bench, model: RegisteredModel, *, n_tokens: int = 6) -> Job:
    """A scan of a model that the bench does not know by name."""
    return worker.submit(
        ActivationScan(prompt="anything", model=model.name),
        n_tokens=n_tokens,
        model=model.name,
        revision=model.revision,
        queue=keys.scan_queue(model.revision),
        scan_key=None,
    )


def serve(worker: Bench, *asked: Job) -> list[JobState]:
    """What a worker's loop does: tickets of its own queue, and of the models that it holds."""
    attempts = worker.attempts()
    for _ in range(20):
        attempts.take(worker.placing.queue)
        for queue in sorted(worker.residency.queues()):
            attempts.take(queue)
        if all(worker.now(job).state is not JobState.QUEUED for job in asked):
            break
    return [worker.now(job).state for job in asked]


def names(worker: Bench) -> set[str]:
    return {model.name for model in worker.residency.held()}


def kind_of_end(worker: Bench, job: Job) -> str:
    """The last word of the type of what a job's requester was told."""
    problem = worker.now(job).problem
    assert problem is not None
    return str(problem["type"]).rpartition(":")[2]


def aged(worker: Bench, seconds: float) -> None:
    """Every job was sent so long ago."""
    with worker.sessions.writing() as session:
        session.execute(update(JOBS).values(created_at=epoch() - seconds))


def short_of_memory(monkeypatch: pytest.MonkeyPatch, times: int) -> None:
    """So many loads run out of memory."""
    load, refusals = loading.load, iter([MemoryError()] * times)

    def cramped(*args: object) -> object:
        for refusal in refusals:
            raise refusal
        return load(*args)  # type: ignore[arg-type]  # passed on as they came

    monkeypatch.setattr(loading, "load", cramped)


def other_worker(
    redis: SyncRedis,
    model: RegisteredModel | None = None,
    *,
    free_bytes: int = 10**12,
    resting: bool = False,
) -> None:
    held: tuple[HeldModel, ...] = ()
    if model is not None:
        held = (
            HeldModel(
                name=model.name,
                revision=model.revision,
                state=ModelState.RESIDENT,
                memory_bytes=10**5,
                load_seconds=0.1,
                held_seconds=100.0,
                has_served=True,
            ),
        )
    events.beat(
        redis,
        WorkerBeat(
            worker="worker-2@there",
            device="cpu",
            models=held,
            budget_bytes=10**12,
            free_bytes=free_bytes,
            resting=resting,
            at=time.time(),
        ),
    )
