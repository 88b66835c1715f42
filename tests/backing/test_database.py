import asyncio
import sqlite3
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Insert, Select, UpdateBase, event, func, select, text
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from neural_mri.backing import database, jobs, statements
from neural_mri.backing.database import Sessions, epoch
from neural_mri.backing.prepared import Prepared
from neural_mri.backing.rows import JOBS
from neural_mri.backing.settings import Settings
from neural_mri.contract.jobs import JobState
from neural_mri.contract.problems import TooMany, Unavailable
from tests.backing.making import on_postgresql, on_sqlite, submission
from tests.servers import administering


@contextmanager
def another_writer(settings: Settings) -> Iterator[None]:
    """Somebody else's transaction, which does not end."""
    path = settings.folder / "neural-mri.db"
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("BEGIN IMMEDIATE")
        yield
        connection.execute("ROLLBACK")


def _count(session: Session) -> int:
    return sum(jobs.queued_by_queue(session).values())


def test_the_databases_clock_counts_seconds_since_1970(sessions: Sessions) -> None:
    with sessions.reading() as session:
        now = session.scalars(select(epoch())).one()
    assert now == pytest.approx(time.time(), abs=0.5)


def test_the_clock_tells_milliseconds_apart(sessions: Sessions) -> None:
    with sessions.reading() as session:
        readings = [session.scalars(select(epoch())).one() for _ in range(200)]
    assert readings == sorted(readings)
    assert len({round(reading * 1000) for reading in readings}) > 5


def test_what_is_written_is_seen_whole_or_not_at_all(sessions: Sessions) -> None:
    class Interrupted(Exception):
        pass

    def two_jobs(session: Session) -> None:
        jobs.submit(session, submission())
        raise Interrupted

    with pytest.raises(Interrupted):
        sessions.write(two_jobs)
    assert sessions.read(_count) == 0
    sessions.write(jobs.submit, submission())
    assert sessions.read(_count) == 1


def test_a_transaction_that_looks_before_it_writes_is_not_overtaken(sessions: Sessions) -> None:
    with ThreadPoolExecutor(1) as another:
        with sessions.writing() as session:
            before = _count(session)
            other = another.submit(sessions.write, jobs.submit, submission())
            time.sleep(0.05)
            jobs.submit(session, submission())
        other.result(5)
    assert sessions.read(_count) == before + 2


def test_a_reading_transaction_sees_one_state_of_the_database(sessions: Sessions) -> None:
    with sessions.reading() as session:
        before = _count(session)
        sessions.write(jobs.submit, submission())
        assert _count(session) == before


def test_a_look_sees_what_is_committed_and_begins_nothing(sessions: Sessions) -> None:
    said = list[str]()

    def count(session: Session) -> int:
        found = _count(session)
        driver: Any = session.connection().connection.driver_connection
        if session.get_bind().dialect.name == "sqlite":
            assert not driver.in_transaction
        else:
            assert driver.info.transaction_status.name == "IDLE"
        return found

    event.listen(sessions.engine, "before_cursor_execute", lambda *about: said.append(about[2]))
    with sessions.writing() as session:
        jobs.submit(session, submission())
        said.clear()
        assert sessions.look(count) == 0
        assert len(said) == 1
    assert sessions.look(count) == 1
    with (
        sessions.reading() as session
    ):  # what comes after on the same connection is a transaction again
        assert _count(session) == 1
        jobs_before = _count(session)
        sessions.write(jobs.submit, submission())
        assert _count(session) == jobs_before
    assert sessions.look(count) == 2


def _driver(session: Session) -> Any:
    return session.connection().connection.driver_connection


@on_sqlite
def test_transactions_keep_their_connection_until_one_of_them_has_a_fault(
    sessions: Sessions,
) -> None:
    def refused(session: Session) -> None:
        jobs.submit(session, submission())
        raise TooMany("there is no room")

    first = sessions.write(_driver)
    assert sessions.write(_driver) is first
    with pytest.raises(TooMany):
        sessions.write(refused)
    assert sessions.write(_driver) is first
    assert sessions.read(_count) == 0, "what was refused was undone"
    with pytest.raises(DBAPIError):
        sessions.write(lambda session: session.execute(text("SELECT * FROM no_such_table")))
    assert sessions.write(_driver) is not first


@on_sqlite
def test_two_at_once_have_a_connection_each(sessions: Sessions) -> None:
    with sessions.reading() as one, sessions.reading() as other:
        assert _driver(one) is not _driver(other)


@on_sqlite
def test_a_loop_looks_by_itself_and_waits_in_a_thread(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database, "SLOW_SECONDS", 60.0)

    async def look() -> None:
        own = database.async_sessions(settings)

        def where(session: Session) -> int:
            _count(session)
            return threading.get_ident()

        with closing(
            sqlite3.connect(
                settings.folder / "neural-mri.db", isolation_level=None, check_same_thread=False
            )
        ) as alone:
            alone.execute("PRAGMA locking_mode = EXCLUSIVE")
            alone.execute("BEGIN EXCLUSIVE")
            looking = asyncio.create_task(own.look(where))
            await asyncio.sleep(0.05)
            assert not looking.done(), "the loop went on, and what it looks for is waited for"
        assert await looking != threading.get_ident()
        assert await own.look(where) == threading.get_ident()
        await own.close()

    asyncio.run(look())


@on_sqlite
def test_a_loop_writes_briefly_by_itself_and_waits_for_others_in_a_thread(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database, "SLOW_SECONDS", 60.0)

    def write(session: Session) -> int:
        jobs.submit(session, submission())
        return threading.get_ident()

    async def write_all() -> None:
        own = database.async_sessions(settings)
        here = threading.get_ident()
        assert await own.write_briefly(write) == here
        with another_writer(settings):
            writing = asyncio.create_task(own.write_briefly(write))
            await asyncio.sleep(0.05)
            assert not writing.done(), "the loop went on, and the other's end is waited for"
        assert await writing != here
        assert await own.write_briefly(write) == here
        monkeypatch.setattr(database, "SLOW_SECONDS", 0.0)
        assert await own.write_briefly(write) == here
        assert await own.write_briefly(write) != here, "the disk was slow a moment ago"
        assert await own.look(lambda _session: threading.get_ident()) != here
        assert await own.read(_count) == 5
        await own.close()

    asyncio.run(write_all())


@on_sqlite
def test_a_loop_that_met_anothers_lock_has_its_connection_the_next_time(settings: Settings) -> None:
    opened = list[Any]()
    at_hand = database.Sessions(database.sync_engine(settings, waits=False))
    event.listen(at_hand.engine, "connect", lambda connection, _record: opened.append(connection))
    first = at_hand.write(_driver)
    with another_writer(settings), pytest.raises(Unavailable):
        at_hand.write(jobs.submit, submission())
    at_hand.write(jobs.submit, submission())
    assert at_hand.write(_driver) is first
    assert at_hand.read(_count) == 1
    with closing(sqlite3.connect(settings.folder / "neural-mri.db", isolation_level=None)) as alone:
        at_hand.close()  # who would be in the way of its having the file alone
        alone.execute("PRAGMA locking_mode = EXCLUSIVE")
        alone.execute("BEGIN EXCLUSIVE")
        opened.clear()
        for _ in range(3):
            with pytest.raises(Unavailable):
                at_hand.look(_count)
    assert at_hand.look(_count) == 1
    assert len(opened) <= 4, "whoever cannot open the file has nothing to keep"
    at_hand.close()


@on_sqlite
def test_what_a_loop_refused_or_spoilt_by_itself_is_not_tried_again(settings: Settings) -> None:
    tries = 0

    def refuse(session: Session) -> None:
        nonlocal tries
        tries += 1
        jobs.submit(session, submission())
        raise Unavailable("something else is away")

    async def write() -> None:
        own = database.async_sessions(settings)
        with pytest.raises(Unavailable, match="something else"):
            await own.write_briefly(refuse)
        assert await own.read(_count) == 0
        await own.close()

    asyncio.run(write())
    assert tries == 1


@on_sqlite
def test_a_log_that_only_loops_write_is_brought_home_all_the_same(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database, "SLOW_SECONDS", 60.0)
    monkeypatch.setattr(database, "LOG_PAGES", 30)
    monkeypatch.setattr(database, "BRIEF_AT_A_STRETCH", 5)
    log = settings.folder / "neural-mri.db-wal"

    async def write() -> int:
        own = database.async_sessions(settings)
        for number in range(60):
            await own.write_briefly(jobs.submit, submission(owner=f"u{number}"))
        size = log.stat().st_size
        await own.close()
        return size

    pages = asyncio.run(write()) / 4096
    assert 5 < pages < 200, "some at a stretch, then again from the log's beginning"


@on_sqlite
def test_a_locked_database_is_unavailable_and_not_a_bug(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database, "BUSY_TIMEOUT_SECONDS", 0.05)
    sessions = database.sessions(settings)
    with another_writer(settings), pytest.raises(Unavailable, match="database does not answer"):
        sessions.write(jobs.submit, submission())
    assert sessions.write(jobs.submit, submission()).state is JobState.QUEUED
    sessions.close()


@on_sqlite
def test_readers_do_not_wait_for_a_writer(settings: Settings, sessions: Sessions) -> None:
    with another_writer(settings):
        assert sessions.read(_count) == 0


@on_sqlite
def test_a_database_that_cannot_be_opened_is_unavailable(settings: Settings) -> None:
    (settings.folder / "neural-mri.db").unlink()
    (settings.folder / "neural-mri.db").mkdir()
    sessions = database.sessions(settings)
    with pytest.raises(Unavailable):
        sessions.read(_count)
    sessions.close()


def test_our_own_mistakes_stay_what_they_are(sessions: Sessions) -> None:
    with pytest.raises(DBAPIError, match="no_such_table"), sessions.reading() as session:
        session.execute(text("SELECT * FROM no_such_table"))


def test_errors_do_not_repeat_what_users_wrote(sessions: Sessions) -> None:
    with pytest.raises(DBAPIError) as caught, sessions.writing() as session:
        session.execute(text("INSERT INTO jobs (request) VALUES (:it)"), {"it": "a private prompt"})
    assert "private" not in str(caught.value)


def test_many_tasks_of_one_loop_write_without_losing_one(settings: Settings) -> None:
    async def write_many() -> int:
        sessions = database.async_sessions(settings)
        written = [sessions.write(jobs.submit, submission(owner=f"u{i}")) for i in range(40)]
        ids = {job.id for job in await asyncio.gather(*written)}
        assert await sessions.read(_count) == 40
        await sessions.close()
        return len(ids)

    assert asyncio.run(write_many()) == 40


@on_sqlite
def test_a_loop_goes_on_while_its_database_is_locked(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database, "BUSY_TIMEOUT_SECONDS", 0.2)

    async def write_in_vain() -> float:
        sessions = database.async_sessions(settings)
        began = time.monotonic()
        refused = await asyncio.gather(
            *(sessions.write(jobs.submit, submission()) for _ in range(20)), return_exceptions=True
        )
        assert [type(each) for each in refused] == [Unavailable] * 20
        assert await sessions.read(_count) == 0
        await sessions.close()
        return time.monotonic() - began

    with another_writer(settings):
        seconds = asyncio.run(write_in_vain())
    assert seconds < 20 * 0.2 / 2, "those behind the first gave up with it"


def test_a_cancelled_caller_leaves_a_whole_transaction(
    settings: Settings, sessions: Sessions
) -> None:
    begun = threading.Event()

    def slowly(session: Session) -> None:
        jobs.submit(session, submission())
        begun.set()
        time.sleep(0.05)
        jobs.submit(session, submission())

    async def cancel_while_writing() -> None:
        own = database.async_sessions(settings)
        try:
            writing = asyncio.create_task(own.write(slowly))
            await asyncio.to_thread(begun.wait)
            writing.cancel()
            with pytest.raises(asyncio.CancelledError):
                await writing
        finally:
            await own.close()

    asyncio.run(cancel_while_writing())
    assert sessions.read(_count) == 2


def _touch(settings: Settings, queues: str, meeting: threading.Barrier) -> int:
    """Touch two queues' clocks in this order, the second once the other has touched its first.

    How often it was tried.
    """
    tries = 0

    def work(session: Session) -> None:
        nonlocal tries
        tries += 1
        for queue in queues:
            session.execute(statements.lock_clock("postgresql"), {"name": queue})
            with suppress(threading.BrokenBarrierError):
                meeting.wait(0.5)

    own = database.sessions(settings)
    own.write(work)
    own.close()
    return tries


@on_postgresql
def test_of_two_that_block_each_other_both_are_done_in_the_end(settings: Settings) -> None:
    meeting = threading.Barrier(2)
    with ThreadPoolExecutor(2) as pool:
        both = [pool.submit(_touch, settings, order, meeting) for order in ("ab", "ba")]
        tries = [each.result(20) for each in both]
    assert sorted(tries) == [1, 2], "the database undid one, and it was done again"


@on_postgresql
def test_a_connection_that_is_cut_is_unavailable_and_the_next_one_serves(
    sessions: Sessions, settings: Settings
) -> None:
    other = database.sessions(settings)

    def cut(session: Session) -> None:
        backend = session.scalar(select(func.pg_backend_pid()))
        with other.writing() as killing:
            killing.execute(select(func.pg_terminate_backend(backend)))
        jobs.submit(session, submission())

    with pytest.raises(Unavailable):
        sessions.write(cut)
    other.close()
    assert sessions.read(_count) == 0
    sessions.write(jobs.submit, submission())
    assert sessions.read(_count) == 1


@on_postgresql
def test_a_lock_that_does_not_open_is_unavailable_and_not_a_bug(
    settings: Settings, sessions: Sessions, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database, "LOCK_SECONDS", 0.1)
    hurried = database.sessions(settings)
    with sessions.writing() as session:
        jobs.submit(session, submission())
        with pytest.raises(Unavailable):
            hurried.write(jobs.submit, submission())
    hurried.close()
    assert sessions.read(_count) == 1


@on_postgresql
def test_a_statement_that_does_not_end_is_ended(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database, "STATEMENT_SECONDS", 0.1)
    hurried = database.sessions(settings)
    with pytest.raises(Unavailable), hurried.reading() as session:
        session.execute(select(func.pg_sleep(5)))
    hurried.close()


@on_postgresql
def test_a_server_that_may_only_be_read_from_is_unavailable_and_left(
    settings: Settings, sessions: Sessions
) -> None:
    name = sessions.look(lambda session: session.scalar(select(func.current_database())))
    demoted = database.sessions(settings)
    with administering(settings.database_url) as operator:
        operator.execute(text(f"ALTER DATABASE {name} SET default_transaction_read_only = on"))
        assert demoted.read(_count) == 0
        with pytest.raises(Unavailable):
            demoted.write(jobs.submit, submission())
        operator.execute(text(f"ALTER DATABASE {name} RESET default_transaction_read_only"))
    # A connection keeps what it has found when it was made: this is another.
    demoted.write(jobs.submit, submission())
    demoted.close()
    assert sessions.read(_count) == 1


@on_postgresql
@pytest.mark.parametrize(
    ("state", "passes"),
    [("40001", True), ("53100", True), ("57014", True), ("58030", True), ("XX001", False)],
)
def test_what_the_server_may_get_over_is_unavailable_and_what_is_broken_is_not(
    sessions: Sessions, state: str, *, passes: bool
) -> None:
    refusal = text(f"DO $$ BEGIN RAISE EXCEPTION 'no' USING ERRCODE = '{state}'; END $$")
    with (
        pytest.raises(Unavailable if passes else DBAPIError),
        sessions.writing() as session,
    ):
        session.execute(refusal)


def test_a_server_that_is_not_there_is_unavailable(tmp_path: Path) -> None:
    away = database.sessions(Settings(database_url=f"postgresql:///x?host={tmp_path}"))
    with pytest.raises(Unavailable):
        away.read(_count)
    away.close()


def _statements() -> dict[str, UpdateBase | Select[Any]]:
    moves = {
        f"move to {state}, held: {held}": statements.move(state, is_held=held)
        for state in JobState
        for held in (True, False)
    }
    all_of_them = vars(statements) | moves
    bare = {
        name: value.statement if isinstance(value, Prepared) else value
        for name, value in all_of_them.items()
    }
    return {name: value for name, value in bare.items() if isinstance(value, UpdateBase | Select)}


@pytest.mark.parametrize("dialect", ["sqlite", "postgresql"])
def test_every_statement_can_be_said_in_both_dialects(dialect: str) -> None:
    spoken = {"sqlite": sqlite.dialect, "postgresql": postgresql.dialect}[dialect]()
    said = {
        name: str(
            each.compile(
                dialect=spoken, column_keys=JOBS.c.keys() if isinstance(each, Insert) else None
            )
        )
        for name, each in _statements().items()
    }
    assert {"CLAIM", "LEASES", "INSERT"} <= said.keys()
    str(statements.lock_clock(dialect).compile(dialect=spoken))
    is_postgresql = dialect == "postgresql"
    assert ("FOR UPDATE SKIP LOCKED" in said["CLAIM"]) is is_postgresql
    assert ("clock_timestamp()" in said["CLAIM"]) is is_postgresql


def plan(sessions: Sessions, statement: Select[Any] | UpdateBase) -> list[str]:
    """Where SQLite would look."""
    said = str(statement.compile(dialect=sqlite.dialect()))
    with sessions.reading() as session:
        parameters = ("x",) * said.count("?")
        found = session.connection().exec_driver_sql(f"EXPLAIN QUERY PLAN {said}", parameters)
        return [row.detail for row in found]


@on_sqlite
def test_claiming_reads_an_index_of_what_is_unfinished(sessions: Sessions) -> None:
    steps = plan(sessions, statements.CLAIM.statement)
    looks = [step for step in steps if "jobs" in step]
    assert looks
    assert all("ix_jobs_unfinished" in step or "sqlite_autoindex" in step for step in looks), steps
    assert not any("TEMP B-TREE" in step for step in steps), steps


@on_sqlite
def test_recording_a_job_goes_through_no_index_of_all_that_has_ended(sessions: Sessions) -> None:
    steps = plan(sessions, statements.STANDING.statement)
    looks = [step for step in steps if "jobs" in step]
    assert looks
    assert all(step.startswith("SEARCH") for step in looks), steps


@on_postgresql
def test_a_server_that_ends_whoever_comes_is_unavailable(
    settings: Settings, sessions: Sessions
) -> None:
    """As one does that is just going down, or what stands before one that has gone."""
    distant = database.sessions(settings)
    assert distant.read(_count) == 0
    with administering(settings.database_url) as operator:

        def end(connection: Any, _record: object) -> None:
            ending = func.pg_terminate_backend(connection.info.backend_pid, 5000)
            assert operator.scalar(select(ending))

        event.listen(distant.engine, "connect", end)
        with distant.reading() as session:  # takes the connection that there is
            end(session.connection().connection.driver_connection, None)
        for _ in range(3):
            with pytest.raises(Unavailable):
                distant.read(_count)
        event.remove(distant.engine, "connect", end)
    assert distant.read(_count) == 0
    distant.close()
