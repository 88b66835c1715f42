"""The database: engines from one URL, transactions that read or write, and the migrations.

SQLite by default, PostgreSQL by URL. On SQLite a transaction that writes takes the write lock when it
begins: one that read first and then wanted to write could not wait for the lock, it would fail at once.

Knows no table.
"""

import asyncio
import random
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import cache, partial
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

from sqlalchemy import (
    URL,
    Connection,
    Double,
    Engine,
    ExceptionContext,
    NullPool,
    create_engine,
    event,
    func,
    make_url,
    select,
)
from sqlalchemy.exc import DBAPIError, InterfaceError, InvalidatePoolError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.orm import Session, sessionmaker
from sqlalchemy.pool import ConnectionPoolEntry
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.functions import FunctionElement

from neural_mri.backing.prepared import transaction
from neural_mri.backing.settings import Settings
from neural_mri.contract.problems import Problem, Unavailable

__all__ = (
    "AsyncSessions",
    "MigrationBlocked",
    "Sessions",
    "async_sessions",
    "epoch",
    "migrate",
    "sessions",
    "sync_engine",
)

BUSY_TIMEOUT_SECONDS = 5.0
"""How long a SQLite writer waits for another process's transaction."""

LOG_PAGES = 1000
"""So long SQLite's log becomes before its pages are brought home: as it is usual."""

THREADS = 8
"""Transactions that an event loop may have open at once."""

CONNECT_SECONDS = 5
LOCK_SECONDS = 5.0
STATEMENT_SECONDS = 30.0
IDLE_SECONDS = 15.0
"""What PostgreSQL may take before it counts as away: to connect, for a lock, for a statement, and how long
a transaction may stand open doing nothing before the server ends it."""

ANSWER_SECONDS = STATEMENT_SECONDS + 5.0
"""How long the server's word is waited for: it would have ended the statement by then. What lies between may have
forgotten the connection and tell nobody, and then no keepalive helps."""
PING_SECONDS = 5.0
"""The same of a connection that has lain idle, when it is asked whether it is still one."""

MIGRATION_TURN_SECONDS = 120.0
MIGRATION_LOCK_SECONDS = 4.0
MIGRATION_STATEMENT_SECONDS = 300.0
"""The same for migrations: a turn is waited for patiently, a table's lock is not, because everybody who
needs the table queues behind whoever waits for it; a large table's index may take its time."""

SLOW_SECONDS = 0.05
SLOW_FOR_SECONDS = 1.0
"""Where what the loop did itself took so long, threads wait for the disk for so long."""
BRIEF_AT_A_STRETCH = 100
"""Transactions in the loop itself before a thread makes one, which looks after the log."""

ATTEMPTS = 4
"""Tries of a transaction that others undid: a deadlock's or a serialization failure's victim."""

MIGRATIONS = Path(__file__).parents[2] / "migrations"

_DRIVERS = {"sqlite": "sqlite+pysqlite", "postgresql": "postgresql+psycopg"}

# Primary result codes that say "not now", https://www.sqlite.org/rescode.html: busy, locked, read only,
# I/O error, full, cannot open, locking protocol.
_SQLITE_PASSING = frozenset({5, 6, 8, 10, 13, 14, 15})
_SQLITE_BUSY = frozenset({5, 6})
# SQLSTATEs, or their classes, that do: connection, a server that may only be read from, transaction rollback,
# insufficient resources, a lock not had in time, operator intervention, I/O error.
_READ_ONLY = "25006"
_LOCK_NOT_AVAILABLE = "55P03"
_POSTGRESQL_PASSING = ("08", _READ_ONLY, "40", "53", _LOCK_NOT_AVAILABLE, "57", "58")
_UNDONE = ("40001", "40P01")

_IS_NEW = "is_new"

_MIGRATION_LOCK = 0x6E6D7269
"""Advisory lock of the migrations on PostgreSQL: the letters nmri."""

P = ParamSpec("P")
T = TypeVar("T")


class MigrationBlocked(Unavailable):
    """The schema cannot be changed while others use it."""


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


def sync_engine(
    settings: Settings, *, waits: bool = True, answer_seconds: float | None = None
) -> Engine:
    """An engine on the settings' database; on SQLite one that `waits` for other processes' transactions.

    One that does not leaves it to those that do to bring the log's pages home, which flushes them to the disk. On
    PostgreSQL one that gives up a server that says nothing for `ANSWER_SECONDS`, or for so long.
    """
    url = _url(settings)
    # Errors go to logs; the parameters of statements, prompts among them, must not.
    if url.get_backend_name() == "sqlite":
        # Who wants to keep a connection keeps it: see `_Kept`.
        engine = create_engine(url, hide_parameters=True, poolclass=NullPool)
        _prepare_sqlite(engine, waits=waits)
        return engine
    engine = create_engine(
        url,
        hide_parameters=True,
        pool_size=THREADS,
        max_overflow=2 * THREADS,
        pool_timeout=LOCK_SECONDS,
        connect_args={
            "connect_timeout": CONNECT_SECONDS,
            # A server that is gone without a word is noticed in half a minute rather than in two hours.
            "keepalives_idle": 10,
            "keepalives_interval": 5,
            "keepalives_count": 3,
            "options": _options(
                lock_timeout=LOCK_SECONDS,
                statement_timeout=STATEMENT_SECONDS,
                idle_in_transaction_session_timeout=IDLE_SECONDS,
            ),
        },
    )
    _prepare_postgresql(engine, answer_seconds)
    return engine


def _options(**seconds: float) -> str:
    return " ".join(f"-c {name}={int(value * 1000)}" for name, value in seconds.items())


def _url(settings: Settings) -> URL:
    """The database's URL, with our driver unless it names one."""
    url = make_url(settings.effective_database_url)
    if url.get_backend_name() == "sqlite" and url.database:
        Path(url.database).parent.mkdir(parents=True, exist_ok=True)
    return url.set(drivername=_DRIVERS.get(url.drivername, url.drivername))


def _prepare_postgresql(engine: Engine, answer_seconds: float | None) -> None:
    @event.listens_for(engine, "do_connect")
    def connect(_dialect: object, _record: object, arguments: Any, options: Any) -> Any:
        connection = _impatient().connect(*arguments, **options)
        connection.patience_seconds = answer_seconds or ANSWER_SECONDS
        return connection

    _ping_the_idle(engine)

    @event.listens_for(engine, "handle_error")
    def keep_rows_out(context: ExceptionContext) -> None:
        """PostgreSQL quotes the failing row, prompt and all, in its message's second line."""
        for error in (context.original_exception, context.sqlalchemy_exception):
            if error is not None and error.args:
                error.args = (str(error.args[0]).partition("\n")[0], *error.args[1:])

    @event.listens_for(engine, "handle_error")
    def leave_a_standby(context: ExceptionContext) -> None:
        """Who has become a standby stays one: the connections are given up, the next ones reach who leads."""
        if getattr(context.original_exception, "sqlstate", None) == _READ_ONLY:
            context.is_disconnect = True


def _ping_the_idle(engine: Engine) -> None:
    @event.listens_for(engine, "connect")
    def note(_connection: object, record: ConnectionPoolEntry) -> None:
        record.info[_IS_NEW] = True

    @event.listens_for(engine, "checkout")
    def ping(connection: Any, record: ConnectionPoolEntry, _proxy: object) -> None:
        """As `pool_pre_ping` does, which would wait for as long as a statement may take.

        One that has just been made is not asked: that two in a row do not answer is told the pool as an error of ours.
        """
        if record.info.pop(_IS_NEW, False):
            return
        try:
            with connection.hurried():
                engine.dialect.do_ping(connection)
        except engine.dialect.loaded_dbapi.Error as error:
            raise InvalidatePoolError from error


@cache
def _impatient() -> type[Any]:
    """Connections of psycopg's that wait for the server no longer than their patience, and are closed then."""
    from psycopg import Connection, OperationalError, pq

    class Impatient(Connection[Any]):
        patience_seconds = ANSWER_SECONDS

        def wait(self, gen: Any, interval: float = 0.1, timeout: float | None = None) -> Any:
            most = self.patience_seconds
            try:
                return super().wait(gen, interval, most if timeout is None else min(most, timeout))
            except OperationalError:
                if self.pgconn.transaction_status == pq.TransactionStatus.ACTIVE:
                    self.pgconn.finish()  # an answer that comes now would be taken for the next one's
                raise

        @contextmanager
        def hurried(self) -> Iterator[None]:
            """While the block runs, `PING_SECONDS` are enough."""
            usual, self.patience_seconds = self.patience_seconds, PING_SECONDS
            try:
                yield
            finally:
                self.patience_seconds = usual

    return Impatient


def _prepare_sqlite(engine: Engine, *, waits: bool) -> None:
    @event.listens_for(engine, "connect")
    def configure(connection: Any, _record: Any) -> None:
        connection.isolation_level = None  # the driver begins nothing by itself: `begin` does
        cursor = connection.cursor()
        for pragma in (
            f"busy_timeout = {int(BUSY_TIMEOUT_SECONDS * 1000 * waits)}",
            "journal_mode = WAL",
            f"wal_autocheckpoint = {LOG_PAGES * waits}",
            "synchronous = NORMAL",
            "foreign_keys = ON",
        ):
            cursor.execute(f"PRAGMA {pragma}")
        cursor.close()

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        options = connection.get_execution_options()
        if options.get("begun_by_hand", False):
            return
        connection.exec_driver_sql("BEGIN IMMEDIATE" if options.get("writing", False) else "BEGIN")


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
    if (state := _state(error)) is not None:
        return state.startswith(_POSTGRESQL_PASSING)
    if not isinstance(error, OperationalError | InterfaceError):
        return False
    code: int | None = getattr(error.orig, "sqlite_errorcode", None)
    return code is None or code & 0xFF in _SQLITE_PASSING


def _others_are_busy(error: BaseException) -> bool:
    """Whether all that is wrong is that SQLite's lock is another's."""
    code: int | None = getattr(getattr(error, "orig", None), "sqlite_errorcode", None)
    return code is not None and code & 0xFF in _SQLITE_BUSY


def _state(error: DBAPIError) -> str | None:
    """PostgreSQL's SQLSTATE."""
    state: str | None = getattr(error.orig, "sqlstate", None)
    return state


def _was_undone(refusal: Unavailable) -> bool:
    """Whether the transaction stood in others' way and may go through when begun again."""
    cause = refusal.__cause__
    return isinstance(cause, DBAPIError) and _state(cause) in _UNDONE


class _Kept:
    """Sessions that stay on their connection from one transaction to the next, for whoever comes.

    A connection to SQLite is an open file, and may be had by the dozen; to make a session, take a connection
    from a pool, and clean and give back both takes longer than most transactions here.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._idle: list[Session] = []

    @contextmanager
    def session(self) -> Iterator[Session]:
        """One that nobody else uses until the block is left; after a fault it is given up."""
        session = self._idle.pop() if self._idle else Session(self._engine.connect())
        try:
            yield session
        except Problem:  # a refusal is no fault of the connection's
            session.rollback()
            self._idle.append(session)
            raise
        except BaseException as error:
            if _others_are_busy(error):  # nor is another's lock
                session.rollback()
                self._idle.append(session)
            else:
                _give_up(session)
            raise
        self._idle.append(session)

    def close(self) -> None:
        """Close the connections of those not in use."""
        while self._idle:
            _give_up(self._idle.pop())


def _give_up(session: Session) -> None:
    connection = session.get_bind()
    session.close()
    if isinstance(connection, Connection):
        connection.close()


class Sessions:
    """Transactions for processes that wait.

    `writing()` commits when its block ends and rolls back when it raises; `reading()` never commits.
    Both raise `Unavailable` when the database does not answer. `write(work, ...)` and `read(work, ...)`
    call `work(session, ...)` inside one; `look(work, ...)` calls it without: for a single statement.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._kept = list[_Kept]()
        # SQLite's readers see one state by nature, and a look needs to be told nothing.
        self._reader = self._sessions("REPEATABLE READ")
        self._looker = self._sessions("AUTOCOMMIT", begun_by_hand=True)
        self._writer = self._sessions(begun_by_hand=True)

    def _sessions(
        self, isolation_level: str | None = None, **kind: bool
    ) -> Callable[[], AbstractContextManager[Session]]:
        """Where sessions of one kind come from; the level is PostgreSQL's."""
        if self.engine.dialect.name == "sqlite":
            kept = _Kept(self.engine.execution_options(**kind))
            self._kept.append(kept)
            return kept.session
        level = {} if isolation_level is None else {"isolation_level": isolation_level}
        return sessionmaker(self.engine.execution_options(**level, **kind))

    @contextmanager
    def reading(self) -> Iterator[Session]:
        """A session that looks at one state of the database."""
        with _answering(), self._reader() as session:
            yield session
            session.rollback()

    @contextmanager
    def writing(self) -> Iterator[Session]:
        """A session whose changes are seen all together or not at all."""
        with _answering(), self._writer() as session, self._transaction(session):
            yield session

    @contextmanager
    def _transaction(self, session: Session) -> Iterator[None]:
        """Begun at once, not with the first statement: on SQLite the lock is ours from here."""
        if self.engine.dialect.name == "sqlite":
            with transaction(session.connection()):
                yield
        else:
            with session.begin():
                session.connection()
                yield

    def read(
        self, work: Callable[Concatenate[Session, P], T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """What `work(session, ...)` finds."""
        with self.reading() as session:
            return work(session, *args, **kwargs)

    def look(
        self, work: Callable[Concatenate[Session, P], T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """What `work(session, ...)` finds by one statement: it sees one state of the database by itself.

        To begin a transaction for it and end it again takes as long as it does, and two trips to a server.
        """
        with _answering(), self._looker() as session:
            return work(session, *args, **kwargs)

    def write(
        self, work: Callable[Concatenate[Session, P], T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """What `work(session, ...)` returns, once it is committed.

        Work that PostgreSQL undid in favour of another's is done again: it changes nothing but the database.
        """
        for attempt in range(1, ATTEMPTS):
            try:
                with self.writing() as session:
                    return work(session, *args, **kwargs)
            except Unavailable as refusal:
                if not _was_undone(refusal):
                    raise
            time.sleep(random.uniform(0.0, 0.02 * attempt))  # noqa: S311 (not to meet again)
        with self.writing() as session:
            return work(session, *args, **kwargs)

    def close(self) -> None:
        """Close every connection."""
        for kept in self._kept:
            kept.close()
        self.engine.dispose()


class AsyncSessions:
    """Transactions for an event loop: `Sessions` on threads of its own.

    An asynchronous driver would hop to its thread and back for every step of every statement; a whole
    transaction here hops once (measured on SQLite: a quarter of the time, a third of the CPU). On SQLite one
    thread writes: writers that meet at the file's lock sleep in growing steps, those that queue here go
    at once. What is no more than a few rows found by their keys the loop does itself there, sooner than a
    thread wakes and is heard of: the file's pages are in memory, and it waits for no lock.
    """

    def __init__(self, sessions: Sessions, at_hand: Sessions | None = None) -> None:
        self._sessions = sessions
        self._at_hand = at_hand
        """For what is no matter for a thread: it waits for nobody."""
        self._brief_left = BRIEF_AT_A_STRETCH
        self._slow_until = 0.0
        writers = 1 if sessions.engine.dialect.name == "sqlite" else THREADS
        self._readers = ThreadPoolExecutor(THREADS, thread_name_prefix="database-reader")
        self._writers = ThreadPoolExecutor(writers, thread_name_prefix="database-writer")

    async def read(
        self, work: Callable[Concatenate[Session, P], T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """What `work(session, ...)` finds."""
        return await self._on(self._readers, partial(self._sessions.read, work, *args, **kwargs))

    async def look(
        self, work: Callable[Concatenate[Session, P], T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """What `work(session, ...)` finds by one statement, which takes no time worth speaking of."""
        if self._at_hand is not None and self._is_quick():
            with suppress(Unavailable), self._timed():  # where it had to wait, it waits in a thread
                return self._at_hand.look(work, *args, **kwargs)
        return await self._on(self._readers, partial(self._sessions.look, work, *args, **kwargs))

    async def write(
        self, work: Callable[Concatenate[Session, P], T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """What `work(session, ...)` returns, once it is committed.

        A caller that is cancelled while it waits leaves a transaction that ends by itself, whole.
        """
        return await self._on(self._writers, partial(self._sessions.write, work, *args, **kwargs))

    async def write_briefly(
        self, work: Callable[Concatenate[Session, P], T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """The same of work that takes no longer than to hand it to a thread."""
        begun = False

        def now(session: Session, /, *args: P.args, **kwargs: P.kwargs) -> T:
            nonlocal begun
            begun = True
            return work(session, *args, **kwargs)

        if self._at_hand is not None and self._is_quick() and self._brief_left:
            self._brief_left -= 1
            try:
                with self._timed():
                    return self._at_hand.write(now, *args, **kwargs)
            except Unavailable:
                if begun:
                    raise
                # Another process writes: a thread waits for it.
        self._brief_left = BRIEF_AT_A_STRETCH
        return await self.write(work, *args, **kwargs)

    def _is_quick(self) -> bool:
        """Whether the loop has not waited for the disk a moment ago."""
        return time.monotonic() >= self._slow_until

    @contextmanager
    def _timed(self) -> Iterator[None]:
        """Notice where the loop waits."""
        began = time.monotonic()
        try:
            yield
        finally:
            ended = time.monotonic()
            if ended - began > SLOW_SECONDS:
                self._slow_until = ended + SLOW_FOR_SECONDS

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
        for sessions in (self._sessions, self._at_hand):
            if sessions is not None:
                sessions.close()


def sessions(settings: Settings) -> Sessions:
    """Transactions on the settings' database."""
    return Sessions(sync_engine(settings))


def async_sessions(settings: Settings) -> AsyncSessions:
    """Transactions on the settings' database, for an event loop."""
    own = sessions(settings)
    if own.engine.dialect.name != "sqlite":
        return AsyncSessions(own)
    return AsyncSessions(own, Sessions(sync_engine(settings, waits=False)))


def migrate(settings: Settings, *, back_to: str | None = None) -> str | None:
    """Bring the schema to the newest revision, or back to an older one (`base`: none), or change nothing.

    A schema that a later release has brought further is left as it is: releases run on the next one's. Gives
    its revision then, else None.

    Two at once take turns. The turn is the database's own, on SQLite its write lock and on PostgreSQL an
    advisory lock: whoever comes second reads the schema's revision after the first has committed.

    Raises `MigrationBlocked` where a running service keeps a table busy: nothing has changed then.
    """
    from alembic import command
    from alembic.config import Config
    from alembic.migration import MigrationContext
    from alembic.script import ScriptDirectory

    longest = MIGRATION_TURN_SECONDS + MIGRATION_STATEMENT_SECONDS
    engine = sync_engine(settings, answer_seconds=longest)
    try:
        with _unblocked(), engine.execution_options(writing=True).begin() as connection:
            if engine.dialect.name == "postgresql":
                _bound(connection, lock_timeout=MIGRATION_TURN_SECONDS, statement_timeout=0)
                connection.execute(select(func.pg_advisory_xact_lock(_MIGRATION_LOCK)))
                _bound(
                    connection,
                    lock_timeout=MIGRATION_LOCK_SECONDS,
                    statement_timeout=MIGRATION_STATEMENT_SECONDS,
                    idle_in_transaction_session_timeout=MIGRATION_STATEMENT_SECONDS,
                )
            config = Config(attributes={"connection": connection})
            config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
            if back_to is not None:
                command.downgrade(config, back_to)
                return None
            # They are numbered.
            newest = ScriptDirectory.from_config(config).get_current_head() or ""
            at = MigrationContext.configure(connection).get_current_revision() or ""
            if at.isdecimal() and at > newest:
                return at
            command.upgrade(config, "head")
            return None
    finally:
        engine.dispose()


def _bound(connection: Connection, **seconds: float) -> None:
    """Bound what the transaction may take."""
    for name, value in seconds.items():
        connection.exec_driver_sql(f"SET LOCAL {name} = {int(value * 1000)}")


@contextmanager
def _unblocked() -> Iterator[None]:
    try:
        with _answering():
            yield
    except Unavailable as refusal:
        cause = refusal.__cause__
        if isinstance(cause, DBAPIError) and _state(cause) == _LOCK_NOT_AVAILABLE:
            raise MigrationBlocked(
                f"a table's lock was not to be had within {MIGRATION_LOCK_SECONDS:g} s, because the running "
                "service uses it; nothing was changed: migrate again"
            ) from cause
        raise
