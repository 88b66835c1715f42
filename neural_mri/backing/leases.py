"""Who holds a job, and whether that process is still alive.

A process is named by host, pid and start time: a pid alone is given to another process soon enough.
"""

import os
import socket
from functools import cache
from pathlib import Path
from typing import NamedTuple, Self

import psutil

__all__ = ("LeaseOwner",)


class LeaseOwner(NamedTuple):
    """A process that holds jobs, written `host/pid/start`."""

    host: str
    pid: int
    start_ticks: int
    """Start time in clock ticks since boot (field 22 of /proc/PID/stat)."""

    @classmethod
    def here(cls) -> Self:
        """This process."""
        pid = os.getpid()
        ticks = _start_ticks(pid)
        if ticks is None:
            raise RuntimeError(f"process {pid} cannot read its own start time")
        return cls(_host(), pid, ticks)

    @classmethod
    def parse(cls, text: str) -> Self:
        """An owner as it was written. Raises `ValueError` naming a text that is none."""
        match text.rsplit("/", 2):
            case [host, pid, start] if host and pid.isdecimal() and start.isdecimal():
                return cls(host, int(pid), int(start))
        raise ValueError(f"{text!r} is not a lease owner: expected host/pid/start")

    def __str__(self) -> str:
        return f"{self.host}/{self.pid}/{self.start_ticks}"

    def is_dead_here(self) -> bool:
        """Whether the process ran on this host and provably runs no more.

        False for a process of another host: nothing can be proved about it from here.
        """
        return self.host == _host() and _start_ticks(self.pid) != self.start_ticks


@cache
def _host() -> str:
    """This host's name and, where there are such, the namespace in which its pids mean something.

    Containers that share their host's name do not share its pids.
    """
    namespace = Path("/proc/self/ns/pid")
    if not namespace.is_symlink():
        return socket.gethostname()
    return f"{socket.gethostname()}:{namespace.readlink().name.removeprefix('pid:').strip('[]')}"


def _start_ticks(pid: int) -> int | None:
    """When a process started, in ticks; None when it runs no more or is a zombie."""
    if not Path("/proc/self/stat").exists():
        return _start_hundredths(pid)
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The second field is the program's name in brackets and may hold anything.
    fields = stat.rpartition(")")[2].split()
    state, start_ticks = fields[0], fields[19]
    return None if state in "ZX" else int(start_ticks)


def _start_hundredths(pid: int) -> int | None:
    """The same where there is no /proc: hundredths of a second since 1970."""
    try:
        process = psutil.Process(pid)
        if process.status() == psutil.STATUS_ZOMBIE:
            return None
        seconds: float = process.create_time()
    except psutil.NoSuchProcess:
        return None
    return round(seconds * 100)
