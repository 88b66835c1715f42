"""Child processes that never outlive the launcher.

On Linux the kernel ends a child when the thread that made it ends, so children are started from the main
thread only. Elsewhere, and for the second it takes, `Roster` remembers them for the next launcher.
"""

import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, NamedTuple

import psutil

__all__ = ("Process", "Program", "Roster", "end_all")

LARGEST_LOG_BYTES = 10 * 2**20
POLL_SECONDS = 0.02


class Program(NamedTuple):
    """What to run."""

    name: str
    command: tuple[str, ...]
    environment: Mapping[str, str]
    log: Path | None = None
    """Where its output goes; the terminal where there is none."""
    folder: Path | None = None
    """Where it runs; where the launcher runs if not said."""
    death_signal: signal.Signals = signal.SIGKILL
    """What it gets when the launcher is killed. Everything but Valkey is safe to kill."""


class Process:
    """A running program, leader of its own session: a terminal's Ctrl-C does not reach it."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.started = time.monotonic()
        output: IO[bytes] | None = None
        if program.log is not None:
            _rotate(program.log)
            output = program.log.open("ab")
        try:
            self._popen = subprocess.Popen(
                program.command,
                env=dict(program.environment),
                cwd=program.folder,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT if output is not None else None,
                start_new_session=True,
                # The launcher runs one thread, so that what this does between fork and exec is safe.
                preexec_fn=_dies_with(os.getpid(), program.death_signal),  # noqa: PLW1509
            )
        finally:
            if output is not None:
                output.close()

    @property
    def pid(self) -> int:
        """The process id, which is also the id of its group and session."""
        return self._popen.pid

    @property
    def seconds(self) -> float:
        """How long ago it was started."""
        return time.monotonic() - self.started

    def exit_status(self) -> int | None:
        """How it ended (minus the signal that ended it), or None while it runs."""
        return self._popen.poll()

    def send(self, signum: signal.Signals) -> None:
        """Signal the process and its children."""
        if self.exit_status() is None:
            os.killpg(self.pid, signum)

    def kill_worker(self) -> None:
        """End the process that works: the one it has forked for that, or itself where there is none."""
        forked = self._forked()
        if not forked:
            self.send(signal.SIGKILL)
            return
        for each in forked:
            with suppress(psutil.NoSuchProcess):
                each.kill()
        self.send(signal.SIGCONT)  # a stopped parent would fork no other

    def _forked(self) -> list[psutil.Process]:
        try:
            children: list[psutil.Process] = psutil.Process(self.pid).children()
        except psutil.NoSuchProcess:
            return []
        return children

    def last_lines(self, count: int) -> str:
        """The end of its log."""
        if self.program.log is None:
            return ""
        lines = self.program.log.read_text(errors="replace").splitlines()
        return "\n".join(lines[-count:])


class Roster:
    """The file that remembers which processes were started, in case the launcher is killed."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._created: dict[int, float] = {}

    def end_leftovers(self) -> None:
        """End what an earlier launcher left running."""
        try:
            entries = json.loads(self._path.read_text())
        except (FileNotFoundError, ValueError):
            return
        left = []
        for pid, created in entries:
            try:
                process = psutil.Process(pid)
                # Ids are used again: only the process started at that moment is ours.
                if abs(process.create_time() - created) < 1:
                    process.terminate()
                    left.append(process)
            except psutil.NoSuchProcess:
                continue
        _, alive = psutil.wait_procs(left, timeout=5)
        for process in alive:
            process.kill()
        self._path.unlink()

    def keep(self, processes: Iterable[Process]) -> None:
        """Remember exactly these."""
        self._created = {
            process.pid: self._created.get(process.pid) or _creation_time(process.pid)
            for process in processes
        }
        beside = self._path.with_suffix(".new")
        beside.write_text(json.dumps(list(self._created.items())))
        beside.replace(self._path)

    def forget(self) -> None:
        """Nothing runs any more."""
        self._path.unlink(missing_ok=True)


def end_all(
    processes: Iterable[Process], *, grace_seconds: float, hurried: Callable[[], bool]
) -> None:
    """Ask all of them to stop, and kill those that have not within the grace, or once hurried."""
    waiting = [process for process in processes if process.exit_status() is None]
    for process in waiting:
        process.send(signal.SIGTERM)
        process.send(signal.SIGCONT)  # a stopped process would never hear of it
    deadline = time.monotonic() + grace_seconds
    while waiting and time.monotonic() < deadline and not hurried():
        time.sleep(POLL_SECONDS)
        waiting = [process for process in waiting if process.exit_status() is None]
    for process in waiting:
        process.send(signal.SIGKILL)
    for process in waiting:
        while process.exit_status() is None:
            time.sleep(POLL_SECONDS)


def _creation_time(pid: int) -> float:
    try:
        created: float = psutil.Process(pid).create_time()
    except psutil.NoSuchProcess:
        return 0.0
    return created


def _dies_with(parent: int, signum: signal.Signals) -> Callable[[], None] | None:
    """What a child does before it becomes the program: ask to be signalled when its parent ends."""
    if sys.platform != "linux":
        return None
    prctl = ctypes.CDLL(None).prctl
    set_parent_death_signal = 1

    def ask() -> None:
        prctl(set_parent_death_signal, int(signum))
        if os.getppid() != parent:  # it ended before we asked
            os._exit(1)

    return ask


def _rotate(log: Path) -> None:
    if log.exists() and log.stat().st_size > LARGEST_LOG_BYTES:
        log.replace(log.with_suffix(".1.log"))
