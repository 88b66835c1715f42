"""Keeping processes alive: what ends is started again, at once and then ever more patiently."""

import signal
import time
from collections.abc import Callable

from deploy.embedded.processes import Process, Program, Roster, end_all
from neural_mri.backing.restarts import HEALTHY_SECONDS, pause_before_restart

__all__ = ("Supervisor",)


class _Kept:
    """A program to keep running."""

    def __init__(self, process: Process) -> None:
        self.process = process
        self.failures = 0
        self.restart_at: float | None = None
        """When to start it again, on the monotonic clock; None while it runs."""


class Supervisor:
    """Starts programs and keeps them running until they are stopped."""

    def __init__(self, roster: Roster, report: Callable[[str], None]) -> None:
        self._roster = roster
        self._report = report
        self._kept: dict[str, _Kept] = {}

    def start(self, program: Program) -> None:
        """Run a program from now on."""
        self._kept[program.name] = _Kept(Process(program))
        self._remember()

    def process(self, name: str) -> Process:
        """The latest process of that program."""
        return self._kept[name].process

    def failures(self, name: str) -> int:
        """How often in a row it ended soon after its start."""
        return self._kept[name].failures

    def kill(self, name: str, why: str) -> None:
        """End a process that no longer does its work: its parent or the next tick starts another."""
        self._report(f"{name}: {why}; killing and restarting it")
        self.process(name).kill_worker()

    def tick(self) -> None:
        """Start again what has ended, once its pause is over. Called several times a second."""
        now = time.monotonic()
        for name, kept in self._kept.items():
            status = kept.process.exit_status()
            if status is None:
                if kept.process.seconds > HEALTHY_SECONDS:
                    kept.failures = 0
                continue
            if kept.restart_at is None:
                kept.failures += 1
                pause = pause_before_restart(kept.failures)
                kept.restart_at = now + pause
                self._report(
                    f"{name} ended ({_how(status)}); starting it again"
                    + (f" in {pause:g} s" if pause else "")
                    + f" (log: {kept.process.program.log})"
                )
            if now >= kept.restart_at:
                kept.restart_at = None
                kept.process = Process(kept.process.program)
                self._remember()

    def stop(self, *names: str, grace_seconds: float, hurried: Callable[[], bool]) -> None:
        """Stop these programs together, for good; those that were never started are no matter."""
        kept = [self._kept.pop(name) for name in names if name in self._kept]
        end_all((each.process for each in kept), grace_seconds=grace_seconds, hurried=hurried)

    def _remember(self) -> None:
        self._roster.keep(kept.process for kept in self._kept.values())


def _how(status: int) -> str:
    return (
        f"exit status {status}" if status >= 0 else signal.strsignal(-status) or f"signal {-status}"
    )
