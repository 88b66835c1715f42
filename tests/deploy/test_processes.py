import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from deploy.embedded.processes import Process, Program, Roster, end_all
from deploy.embedded.supervision import Supervisor
from neural_mri.backing.restarts import pause_before_restart

ROOT = Path(__file__).parents[2]


def python(name: str, code: str, log: Path | None = None) -> Program:
    return Program(name, (sys.executable, "-c", code), os.environ, log)


def until(condition: Callable[[], bool], seconds: float = 5.0) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def is_gone(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


def test_a_process_that_ignores_the_request_to_stop_is_killed(tmp_path: Path) -> None:
    stubborn = Process(
        python(
            "stubborn",
            "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
            "print('up', flush=True); time.sleep(60)",
            tmp_path / "log",
        )
    )
    assert until(lambda: "up" in stubborn.last_lines(1))
    began = time.monotonic()
    end_all([stubborn], grace_seconds=0.3, hurried=lambda: False)
    assert stubborn.exit_status() == -signal.SIGKILL
    assert time.monotonic() - began < 3


def test_a_frozen_process_still_stops_when_asked() -> None:
    frozen = Process(python("frozen", "import time; time.sleep(60)"))
    os.kill(frozen.pid, signal.SIGSTOP)
    end_all([frozen], grace_seconds=5.0, hurried=lambda: False)
    assert frozen.exit_status() == -signal.SIGTERM


def test_children_of_a_process_stop_with_it(tmp_path: Path) -> None:
    parent = Process(
        python(
            "parent",
            "import subprocess, time; "
            "print(subprocess.Popen(['sleep', '60']).pid, flush=True); time.sleep(60)",
            tmp_path / "log",
        )
    )
    assert until(lambda: parent.last_lines(1) != "")
    end_all([parent], grace_seconds=5.0, hurried=lambda: False)
    assert until(lambda: is_gone(int(parent.last_lines(1))))


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends children with their parent")
def test_killing_the_launcher_leaves_no_process(tmp_path: Path) -> None:
    launcher = (
        "import os, sys, time; from deploy.embedded.processes import Process, Program\n"
        "sleeper = Process(Program('sleeper', ('sleep', '60'), os.environ))\n"
        "print(sleeper.pid, flush=True); time.sleep(60)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", launcher], stdout=subprocess.PIPE, text=True, cwd=ROOT
    ) as process:
        assert process.stdout is not None
        child = int(process.stdout.readline())
        assert not is_gone(child)
        process.kill()
    assert until(lambda: is_gone(child))


def test_the_roster_ends_what_an_earlier_launcher_left(tmp_path: Path) -> None:
    left = Process(python("left", "import time; time.sleep(60)"))
    Roster(tmp_path / "running.json").keep([left])
    Roster(tmp_path / "running.json").end_leftovers()
    assert until(lambda: left.exit_status() is not None)
    assert not (tmp_path / "running.json").exists()


def test_the_roster_spares_a_process_that_was_given_a_used_id(tmp_path: Path) -> None:
    stranger = Process(python("stranger", "import time; time.sleep(60)"))
    try:
        (tmp_path / "running.json").write_text(f"[[{stranger.pid}, 12345.0]]")
        Roster(tmp_path / "running.json").end_leftovers()
        assert stranger.exit_status() is None
    finally:
        end_all([stranger], grace_seconds=5.0, hurried=lambda: False)


def test_what_ends_is_started_again_and_said(tmp_path: Path) -> None:
    said: list[str] = []
    supervisor = Supervisor(Roster(tmp_path / "running.json"), said.append)
    supervisor.start(python("sleeper", "import time; time.sleep(60)", tmp_path / "sleeper.log"))
    first = supervisor.process("sleeper").pid
    try:
        os.kill(first, signal.SIGKILL)

        def restarted() -> bool:
            supervisor.tick()
            return supervisor.process("sleeper").pid != first

        assert until(restarted)
        assert "Killed" in said[0]
        assert "sleeper.log" in said[0]
    finally:
        supervisor.stop("sleeper", grace_seconds=5.0, hurried=lambda: False)


def test_what_keeps_ending_is_counted_and_waited_for(tmp_path: Path) -> None:
    supervisor = Supervisor(Roster(tmp_path / "running.json"), lambda _text: None)
    supervisor.start(python("broken", "raise SystemExit(3)", tmp_path / "broken.log"))

    def failed(times: int) -> Callable[[], bool]:
        def ticked() -> bool:
            supervisor.tick()
            return supervisor.failures("broken") >= times

        return ticked

    began = time.monotonic()
    assert until(failed(3))
    assert time.monotonic() - began > pause_before_restart(2)


def test_pauses_grow_from_nothing_to_half_a_minute() -> None:
    pauses = [pause_before_restart(failures) for failures in range(1, 20)]
    assert pauses[0] == 0
    assert pauses == sorted(pauses)
    assert pauses[-1] == 30
