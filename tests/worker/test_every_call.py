"""A fault at every call: whichever statement, commit, file or word to Valkey fails in a job's life, it ends once, whole.

The first call fails, then in another job's life the second, until a life has no more calls. Once each.
"""

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any
from uuid import UUID

import pytest
import redis
from redis.connection import AbstractConnection

from neural_mri.backing import events, jobs, prepared, saving
from neural_mri.backing.jobs import Submission
from neural_mri.backing.queue import send_tickets
from neural_mri.backing.storage import NamedBytes, Store, StoreUnavailable, Writing
from neural_mri.contract.jobs import JobState
from neural_mri.contract.problems import Unavailable
from neural_mri.contract.scans import ActivationScan
from tests.chaos.witness import Witness
from tests.models import prompt
from tests.worker.bench import Bench
from worker import attempts as module
from worker.reaper import Reaper

MOST_CALLS = 500
MOST_ROUNDS = 20
PATIENCE_SECONDS = 5.0
IO_ERROR = 10
"""What SQLite calls it."""


class Fault:
    """Counts calls, and has one of them fail."""

    def __init__(self) -> None:
        self.thread: int | None = threading.get_ident()
        """Whose calls count; None for everybody's."""
        self._left = -1

    def at(self, call: int) -> None:
        self._left = call

    @property
    def has_come(self) -> bool:
        return self._left < 0

    def disarm(self) -> None:
        self._left = -1

    def comes(self) -> bool:
        """Whether the call at hand is the one."""
        if self._left < 0 or self.thread not in (None, threading.get_ident()):
            return False
        self._left -= 1
        return self._left < 0


@pytest.fixture
def fault() -> Fault:
    return Fault()


class Statements:
    """Statements that do not come through, and commits that do not, or whose answer does not."""

    @staticmethod
    @contextmanager
    def failing(bench: Bench, fault: Fault, patch: pytest.MonkeyPatch) -> Iterator[Store]:
        dialect = bench.sessions.engine.dialect
        driver: Any = dialect.loaded_dbapi

        def fail() -> None:
            if fault.comes():
                error = driver.OperationalError("disk I/O error")
                error.sqlite_errorcode = IO_ERROR
                raise error

        def failing(call: Callable[..., None], *, after: bool) -> Callable[..., None]:
            def called(*arguments: Any, **options: Any) -> None:
                fail()
                call(*arguments, **options)
                if after:
                    fail()

            return called

        for name in ("do_execute", "do_execute_no_params", "do_executemany", "do_commit"):
            called = failing(getattr(dialect, name), after=name == "do_commit")
            patch.setattr(dialect, name, called)
        if dialect.name == "sqlite":
            # What is prepared goes past the dialect, and so do the transactions of who writes.
            real = prepared._driver
            patch.setattr(prepared, "_driver", lambda connection: Driver(real(connection), fail))
        yield bench.store


class Driver:
    """A connection of SQLite's on which something may go wrong before each statement, and after a commit."""

    def __init__(self, connection: Any, fail: Callable[[], None]) -> None:
        self._connection = connection
        self._fail = fail

    def execute(self, text: str, values: Any) -> Any:
        self._fail()
        found = self._connection.execute(text, values)
        if text == "COMMIT":
            self._fail()
        return found

    def __getattr__(self, name: str) -> Any:
        return getattr(self._connection, name)


class Files:
    """A store whose every step may fail."""

    def __init__(self, store: Store, fault: Fault) -> None:
        self._store = store
        self._fault = fault

    @classmethod
    @contextmanager
    def failing(cls, bench: Bench, fault: Fault, _patch: pytest.MonkeyPatch) -> Iterator[Any]:
        yield cls(bench.store, fault)

    def begin(self, files: Iterable[NamedBytes]) -> Writing:
        self._fail("begin")
        return Steps(self._store.begin(files), self._fault)

    def _fail(self, name: str) -> None:
        if self._fault.comes():
            raise StoreUnavailable(f"{name} fails")

    def __getattr__(self, name: str) -> Any:
        call = getattr(self._store, name)

        def called(*arguments: Any) -> Any:
            self._fail(name)
            return call(*arguments)

        return called


class Steps:
    """Files being written, each step of which may fail."""

    def __init__(self, writing: Writing, fault: Fault) -> None:
        self._writing = writing
        self._fault = fault

    def _fail(self, name: str) -> None:
        if self._fault.comes():
            raise StoreUnavailable(f"{name} fails")

    def flush(self) -> None:
        self._fail("flush")
        self._writing.flush()

    def place(self, placed: Callable[[int], None], last: Callable[[], None] = lambda: None) -> None:
        def then(index: int) -> None:
            self._fail(f"place {index}")
            placed(index)

        def at_last() -> None:
            last()
            self._fail("place the last")

        self._writing.place(then, at_last)

    def settles(self, within: float) -> bool:
        return self._writing.settles(within)

    def settle(self) -> None:
        self._fail("settle")
        self._writing.settle()

    def drop(self) -> None:
        self._writing.drop()


class Words:
    """Words to Valkey that do not arrive, or whose answer does not."""

    @staticmethod
    @contextmanager
    def failing(bench: Bench, fault: Fault, patch: pytest.MonkeyPatch) -> Iterator[Store]:
        fault.thread = None  # events are told by a thread of their own

        def failing(call: Callable[..., Any]) -> Callable[..., Any]:
            def called(connection: Any, *arguments: Any, **options: Any) -> Any:
                if fault.comes():
                    connection.disconnect()  # as the client does, whose next word would hear this answer
                    raise redis.TimeoutError("the server does not answer")
                return call(connection, *arguments, **options)

            return called

        for name in ("send_packed_command", "read_response"):
            patch.setattr(AbstractConnection, name, failing(getattr(AbstractConnection, name)))
        yield bench.store


@pytest.mark.parametrize("packs", [True, False], ids=["one file", "many files"])
@pytest.mark.parametrize("part", [Statements, Files, Words])
def test_whatever_call_fails_a_job_ends_once_with_its_whole_result(
    holding_tiny: Bench,
    fault: Fault,
    monkeypatch: pytest.MonkeyPatch,
    part: type[Statements | Files | Words],
    *,
    packs: bool,
) -> None:
    bench = holding_tiny
    for pause in ("DATABASE_PAUSE_SECONDS", "STORE_PAUSE_SECONDS"):
        monkeypatch.setattr(module, pause, 0.0)
    monkeypatch.setattr(events, "RECONNECT_SECONDS", 0.0)
    if not packs:
        monkeypatch.setattr(saving, "PACKED_BYTES", 0)
    # Whoever has let go of what was claimed is as good as dead: nobody waits for its lease to end.
    monkeypatch.setattr(jobs, "reap", partial(jobs.reap, dead_owners=lambda _: True))
    witness = Witness(bench.sessions, bench.settings)
    witness.install()
    ended = []
    with part.failing(bench, fault, monkeypatch) as store:
        for call in range(MOST_CALLS):
            fault.at(call)
            ended.append(live(bench, store, call))
            assert bench.outbox.flush(PATIENCE_SECONDS)
            if not fault.has_come:
                break
        fault.disarm()
    assert 4 < len(ended) < MOST_CALLS
    found = [bench.sessions.read(jobs.get, job_id) for job_id in ended]
    assert [job and job.state for job in found] == [JobState.SUCCEEDED] * len(ended)
    assert {job.attempt for job in found if job} <= {1, 2}
    assert witness.told_wrongly(bench.redis, ended) == []
    witness.tidy()
    assert witness.verdict(ended).wrong == []
    assert (witness.half_written(), witness.orphans()) == ([], set())


def live(bench: Bench, store: Store, number: int) -> UUID:
    """A job's life, from the request to its end, as its caller, a worker and the reaper see to it."""
    asked = bench.submission(
        ActivationScan(prompt=f"life {number}", model="tiny"),
        tokens=prompt(4, seed=number),
        idempotency_key=f"life {number}",
    )
    job_id = accepted(bench, asked)
    send_tickets(bench.redis, asked.queue)
    reaper = Reaper(bench.settings, bench.sessions, bench.redis, store)
    attempts = bench.attempts(store)
    for _ in range(MOST_ROUNDS):
        attempts.take(asked.queue)
        reaper.round()
        with suppress(Unavailable):
            job = bench.sessions.read(jobs.get, job_id)
            if job is not None and job.finished_at is not None:
                return job_id
    raise TimeoutError(f"job {job_id} has not ended")


def accepted(bench: Bench, asked: Submission) -> UUID:
    """The job's id, however often the request has to be sent again."""
    while True:
        try:
            return bench.sessions.write(jobs.submit_once, asked).job.id
        except Unavailable:
            continue
