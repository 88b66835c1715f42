"""The database: engines from one URL, transactions that read or write, and the migrations.

SQLite by default, PostgreSQL by URL. On SQLite a transaction that writes takes the write lock when it
begins: one that read first and then wanted to write could not wait for the lock, it would fail at once.

Knows no table.
"""

import asyncio
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

from sqlalchemy import (
    URL,
    Connection,
    Double,
    Engine,
    create_engine,
    event,
    func,
    make_url,
    select,
)
from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.orm import Session, sessionmaker
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.functions import FunctionElement

from neural_mri.backing.settings import Settings
from neural_mri.contract.problems import Unavailable

__all__ = (
    "AsyncSessions",
    "Sessions",
    "async_sessions",
    "epoch",
    "migrate",
    "sessions",
    "sync_engine",
)

BUSY_TIMEOUT_SECONDS = 5.0
"""How long a SQLite writer waits for another process's transaction."""

THREADS = 8
"""Transactions that an event loop may have open at once."""

MIGRATIONS = Path(__file__).parents[2] / "migrations"

_DRIVERS = {"sqlite": "sqlite+pysqlite", "postgresql": "postgresql+psycopg"}

# Primary result codes that say "not now", https://www.sqlite.org/rescode.html: busy, locked, read only,
# I/O error, full, cannot open, locking protocol.
_SQLITE_PASSING = frozenset({5, 6, 8, 10, 13, 14, 15})
# Classes of SQLSTATE that do: connection, transaction rollback, insufficient resources, operator
# intervention.
_POSTGRESQL_PASSING = ("08", "40", "53", "57")

_MIGRATION_LOCK = 0x6E6D7269
"""Advisory lock of the migrations on PostgreSQL: the letters nmri."""

P = ParamSpec("P")
T = TypeVar("T")


class _Epoch(FunctionElement[float]):
    """Seconds since 1970."""

    name = "epoch"
    type = Double()
    inherit_cache = True


@compiles(_Epoch, "sqlite")
def _epoch_sqlite(_element: _Epoch, _compiler: SQLCompiler, **_options: Any) -> str:
    # unixepoch('subsec') would say the same, from SQLite 3.42 on.
    return "((julianday('now') - 2440587.5) * 86400.0)"


@compiles(_Epoch, "postgresql")
def _epoch_postgresql(_element: _Epoch, _compiler: SQLCompiler, **_options: Any) -> str:
    # now() would stand still for a whole transaction.
    return "CAST(extract(epoch FROM clock_timestamp()) AS double precision)"


def epoch() -> _Epoch:
    """The database's clock: seconds since 1970, to the millisecond."""
    return _Epoch()


def sync_engine(settings: Settings) -> Engine:
    """An engine on the settings' database."""
    url = _url(settings)
    # Errors go to logs; the parameters of statements, prompts among them, must not.
    engine = create_engine(
        url, pool_pre_ping=url.get_backend_name() != "sqlite", hide_parameters=True
    )
    _prepare(engine)
    return engine


def _url(settings: Settings) -> URL:
    """The database's URL, with our driver unless it names one."""
    url = make_url(settings.effective_database_url)
    if url.get_backend_name() == "sqlite" and url.database:
        Path(url.database).parent.mkdir(parents=True, exist_ok=True)
    return url.set(drivername=_DRIVERS.get(url.drivername, url.drivername))


def _prepare(engine: Engine) -> None:
    if engine.dialect.name != "sqlite":
        return

    @event.listens_for(engine, "connect")
    def configure(connection: Any, _record: Any) -> None:
        connection.isolation_level = None  # the driver begins nothing by itself: `begin` does
        cursor = connection.cursor()
        for pragma in (
            f"busy_timeout = {int(BUSY_TIMEOUT_SECONDS * 1000)}",
            "journal_mode = WAL",
            "synchronous = NORMAL",
            "foreign_keys = ON",
        ):
            cursor.execute(f"PRAGMA {pragma}")
        cursor.close()

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        writing = connection.get_execution_options().get("writing", False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writing else "BEGIN")


@contextmanager
def _answering() -> Iterator[None]:
    """Turns the environment's faults into `Unavailable`; ours stay what they are."""
    try:
        yield
    except (DBAPIError, PoolTimeoutError) as error:
        if isinstance(error, DBAPIError) and not _passes(error):
            raise
        raise _unavailable() from error


def _unavailable() -> Unavailable:
    return Unavailable(
        "the database does not answer now; the request changed nothing and can be sent again"
    )


def _passes(error: DBAPIError) -> bool:
    """Whether the fault is the environment's and may pass with time."""
    if error.connection_invalidated:
        return True
    if not isinstance(error, OperationalError | InterfaceError):
        return False
    code: int | None = getattr(error.orig, "sqlite_errorcode", None)
    if code is not None:
        return code & 0xFF in _SQLITE_PASSING
    state: str | None = getattr(error.orig, "sqlstate", None)
    return state is None or state.startswith(_POSTGRESQL_PASSING)


class Sessions:
    """Transactions for processes that wait.

    `writing()` commits when its block ends and rolls back when it raises; `reading()` never commits.
    Both raise `Unavailable` when the database does not answer. `write(work, ...)` and `read(work, ...)`
    call `work(session, ...)` inside one.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        # SQLite's readers see one state by nature.
        one_state = (
            {} if engine.dialect.name == "sqlite" else {"isolation_level": "REPEATABLE READ"}
        )
        self._reader = sessionmaker(engine.execution_options(**one_state))
        self._writer = sessionmaker(engine.execution_options(writing=True))

    @contextmanager
    def reading(self) -> Iterator[Session]:
        """A session that looks at one state of the database."""
        with _answering(), self._reader() as session:
            yield session

    @contextmanager
    def writing(self) -> Iterator[Session]:
        """A session whose changes are seen all together or not at all."""
        with _answering(), self._writer.begin() as session:
            session.connection()  # begins now, not with the first statement: the lock is ours from here
            yield session

    def read(
        self, work: Callable[Concatenate[Session, P], T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """What `work(session, ...)` finds."""
        with self.reading() as session:
            return work(session, *args, **kwargs)

    def write(
        self, work: Callable[Concatenate[Session, P], T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """What `work(session, ...)` returns, once it is committed."""
        with self.writing() as session:
            return work(session, *args, **kwargs)

    def close(self) -> None:
        """Close every connection."""
        self.engine.dispose()


class AsyncSessions:
    """Transactions for an event loop: `Sessions` on threads of its own.

    An asynchronous driver would hop to its thread and back for every step of every statement; a whole
    transaction here hops once (measured on SQLite: a quarter of the time, a third of the CPU). On SQLite one
    thread writes: writers that meet at the file's lock sleep in growing steps, those that queue here go
    at once.
    """

    def __init__(self, sessions: Sessions) -> None:
        self._sessions = sessions
        writers = 1 if sessions.engine.dialect.name == "sqlite" else THREADS
        self._readers = ThreadPoolExecutor(THREADS, thread_name_prefix="database-reader")
        self._writers = ThreadPoolExecutor(writers, thread_name_prefix="database-writer")

    async def read(
        self, work: Callable[Concatenate[Session, P], T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """What `work(session, ...)` finds."""
        return await self._on(self._readers, partial(self._sessions.read, work, *args, **kwargs))

    async def write(
        self, work: Callable[Concatenate[Session, P], T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """What `work(session, ...)` returns, once it is committed.

        A caller that is cancelled while it waits leaves a transaction that ends by itself, whole.
        """
        return await self._on(self._writers, partial(self._sessions.write, work, *args, **kwargs))

    async def _on(self, threads: ThreadPoolExecutor, transaction: Callable[[], T]) -> T:
        asked = time.monotonic()

        def in_turn() -> T:
            # Behind a lock that does not open, those who waited as long as it was tried give up with it.
            if time.monotonic() - asked > BUSY_TIMEOUT_SECONDS:
                raise _unavailable()
            return transaction()

        return await asyncio.get_running_loop().run_in_executor(threads, in_turn)

    async def close(self) -> None:
        """Let what has begun end, and close every connection."""
        for threads in (self._writers, self._readers):
            await asyncio.to_thread(threads.shutdown, cancel_futures=True)
        self._sessions.close()


def sessions(settings: Settings) -> Sessions:
    """Transactions on the settings' database."""
    return Sessions(sync_engine(settings))


def async_sessions(settings: Settings) -> AsyncSessions:
    """Transactions on the settings' database, for an event loop."""
    return AsyncSessions(sessions(settings))


def migrate(settings: Settings, *, back_to: str | None = None) -> None:
    """Bring the schema to the newest revision, or back to an older one (`base`: none), or change nothing.

    Two at once take turns. The turn is the database's own, on SQLite its write lock and on PostgreSQL an
    advisory lock: whoever comes second reads the schema's revision after the first has committed.
    """
    from alembic import command
    from alembic.config import Config

    engine = sync_engine(settings)
    try:
        with _answering(), engine.execution_options(writing=True).begin() as connection:
            if engine.dialect.name == "postgresql":
                connection.execute(select(func.pg_advisory_xact_lock(_MIGRATION_LOCK)))
            config = Config(attributes={"connection": connection})
            config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
            if back_to is None:
                command.upgrade(config, "head")
            else:
                command.downgrade(config, back_to)
    finally:
        engine.dispose()
