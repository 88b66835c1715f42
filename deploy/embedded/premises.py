"""Whether this machine and this folder can carry the service.

Each check passes silently or raises `Refusal`, whose message is the one sentence a person reads. Nothing
here starts a process.
"""

import errno
import fcntl
import hashlib
import os
import re
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from neural_mri.backing.settings import Settings

__all__ = (
    "Refusal",
    "check_port",
    "check_space",
    "locked",
    "prepare_folder",
    "socket_path",
)

LONGEST_SOCKET_PATH_BYTES = 103
"""macOS allows 104 bytes with the closing NUL, Linux 108."""

SPACE_TO_RUN_BYTES = 200 * 2**20
SPACE_TO_CONVERT_BYTES = 2**30
"""SmolLM2's converted weights take 538 MB, and as much again for a moment while they are written."""


class Refusal(Exception):
    """The service cannot run here; the message says why and what would help."""


def check_port(host: str, port: int) -> None:
    """Whether the API will be able to listen."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            why = "is already taken" if error.errno == errno.EADDRINUSE else f"({error.strerror})"
            raise Refusal(
                f"port {port} of {host} {why}: stop what listens there, or choose another with "
                f"NEURAL_MRI_PORT={port % 65535 + 1}."
            ) from error


def prepare_folder(folder: Path) -> None:
    """Make the data folder, readable by its owner alone, and see that it can be written to."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder.chmod(0o700)
        for name in ("logs", "models", "results", "valkey"):
            (folder / name).mkdir(mode=0o700, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise Refusal(
            f"the data folder {folder} cannot be used ({error.strerror}): choose another with "
            "NEURAL_MRI_DATA_DIR."
        ) from error


def check_space(folder: Path, needed_bytes: int) -> None:
    """Whether the data folder's disk has room."""
    free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        raise Refusal(
            f"the disk of {folder} has {free // 2**20} MB free, and {needed_bytes // 2**20} MB are "
            "needed: make room, or choose another folder with NEURAL_MRI_DATA_DIR."
        )


def socket_path(settings: Settings) -> Path:
    """Where the bundled server's socket can be: in the data folder if its path is short and plain.

    Otherwise in a folder of ours under the system's temporary one, the same at every start.
    """
    wished = settings.valkey_socket
    if _can_be_a_socket(wished):
        return wished
    digest = hashlib.sha256(os.fsencode(settings.folder)).hexdigest()[:12]
    for parent in (Path(tempfile.gettempdir()), Path("/tmp")):  # noqa: S108  made 0700 below
        shelter = parent / f"neural-mri-{os.getuid()}-{digest}"
        if _can_be_a_socket(shelter / wished.name):
            break
    else:
        raise Refusal(
            f"no path under {tempfile.gettempdir()} is short enough for a socket: set TMPDIR."
        )
    shelter.mkdir(mode=0o700, exist_ok=True)
    status = shelter.lstat()
    if shelter.is_symlink() or status.st_uid != os.getuid() or status.st_mode & 0o077:
        raise Refusal(f"{shelter} is not a folder of yours alone: remove it.")
    return shelter / wished.name


def _can_be_a_socket(path: Path) -> bool:
    # Plain characters, because the path also travels inside a redis URL.
    text = str(path)
    return len(os.fsencode(text)) <= LONGEST_SOCKET_PATH_BYTES and bool(
        re.fullmatch(r"[A-Za-z0-9_./+-]+", text)
    )


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the data folder. The system lets go of it when this process ends, however it ends."""
    with (folder / "launcher.lock").open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            lock.seek(0)
            holder = lock.read().strip() or "another process"
            raise Refusal(
                f"Neural MRI is already running on {folder} (process {holder}): stop it first, or "
                "choose another folder with NEURAL_MRI_DATA_DIR."
            ) from error
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield
