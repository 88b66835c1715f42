"""The command as a process: exit codes, signals, pipes, encodings."""

import os
import signal
import subprocess
import sys
import threading
import time

import msgspec
import pytest

from neural_mri.cli.exits import ExitCode
from neural_mri.contract.events import Ended
from neural_mri.contract.jobs import JobState
from tests.client.wire import Wire

SCAN = ("scan", "activation", "The Eiffel Tower is in")


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "neural_mri.cli", *arguments]


def ran(
    *arguments: str, stdin: bytes = b"", **environment: str
) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        command(*arguments),
        input=stdin,
        capture_output=True,
        env={**os.environ, **environment},
        timeout=30,
        check=False,
    )


def test_exit_codes_tell_how_it_went(wire: Wire) -> None:
    assert ran(*SCAN, "--quiet").returncode == ExitCode.DONE
    wire.next_end = Ended(state=JobState.EXPIRED, attempt=1)
    assert ran(*SCAN).returncode == ExitCode.FAILED
    wire.next_end = Ended(state=JobState.CANCELLED, attempt=1)
    assert ran(*SCAN).returncode == ExitCode.CANCELLED
    assert ran(*SCAN, "--tokens", "x").returncode == ExitCode.USAGE


def test_a_service_that_is_not_there_is_said_with_what_to_do() -> None:
    said = ran("health", "--url", "http://127.0.0.1:9")
    assert said.returncode == ExitCode.UNREACHABLE
    assert said.stdout == b""
    assert said.stderr.startswith(b"neural-mri: http://127.0.0.1:9 does not answer")
    assert b"make up" in said.stderr


def test_a_prompt_is_piped_in_and_json_out(wire: Wire) -> None:
    said = ran("scan", "activation", "-", "--json", stdin=b"The Eiffel Tower is in\n")
    assert said.returncode == ExitCode.DONE
    assert msgspec.json.decode(said.stdout)["request"]["prompt"] == "The Eiffel Tower is in"
    assert said.stderr == b""


def test_a_terminal_without_unicode_gets_plain_letters(wire: Wire) -> None:
    said = ran(*SCAN, PYTHONIOENCODING="ascii")
    assert said.returncode == ExitCode.DONE
    assert b"L3 MLP" in said.stdout
    assert b"####" in said.stdout
    said.stdout.decode("ascii")


def test_colours_are_drawn_when_they_are_asked_for(wire: Wire) -> None:
    said = ran(*SCAN, FORCE_COLOR="1", COLORTERM="truecolor", TERM="xterm-256color")
    assert b"\x1b[48;2;" in said.stdout


def test_progress_is_drawn_on_a_terminal_and_taken_away_again(wire: Wire) -> None:
    said = ran(*SCAN, FORCE_COLOR="1", TERM="xterm-256color")
    assert b"forward" in said.stderr
    assert b"4 of 4" in said.stderr
    hides, shows = said.stderr.count(b"\x1b[?25l"), said.stderr.count(b"\x1b[?25h")
    assert hides == shows == 1
    assert b"forward" not in ran(*SCAN, "--quiet", FORCE_COLOR="1").stderr


@pytest.mark.parametrize("presses", [1, 2])
def test_an_interruption_cancels_the_job_and_says_so(wire: Wire, presses: int) -> None:
    wire.next_hold = threading.Event()
    process = subprocess.Popen(command(*SCAN), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    until(lambda: any(path.endswith("/events") for path in wire.paths()))
    time.sleep(0.1)
    for _ in range(presses):
        process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=20)
    assert process.returncode == ExitCode.INTERRUPTED
    assert out == b""
    (job_id,) = wire.jobs
    assert b"interrupted: job " + str(job_id).encode() in err
    assert b"Traceback" not in err
    if presses == 1:
        assert wire.paths("DELETE") == [f"/api/jobs/{job_id}"]
        assert b"was asked to stop" in err


def test_who_waits_for_a_result_and_leaves_lets_the_job_go_on(wire: Wire) -> None:
    wire.next_hold = threading.Event()
    job_id = ran(*SCAN, "--no-wait", "--quiet").stdout.decode().strip()
    process = subprocess.Popen(
        command("result", job_id), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    until(lambda: any(path.endswith("/events") for path in wire.paths()))
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=20)
    assert (process.returncode, out) == (ExitCode.INTERRUPTED, b"")
    assert f"job {job_id} goes on; stop it with: neural-mri cancel {job_id}".encode() in err
    assert wire.paths("DELETE") == []


def until(condition: object, seconds: float = 15.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline
        time.sleep(0.01)
