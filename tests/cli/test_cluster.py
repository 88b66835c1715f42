"""`neural-mri cluster`: what is shown of a service, and when it stops."""

import os
import pty
import re
import signal
import subprocess
import sys
import time

import msgspec
import pytest

from neural_mri.cli.app import run
from neural_mri.contract.cluster import Cluster, ModelHeld, QueueLoad, Versions, WorkerSeen
from neural_mri.contract.jobs import Lane
from neural_mri.contract.models import ModelState
from tests.client.wire import Wire, json_answer

PATH = ("GET", "/api/cluster")
VERSIONS = Versions(service="1.2", python="3.11.7", database="postgresql 18.6", redis="9.1.2")
HELD = ModelHeld(
    name="tiny",
    revision="a" * 64,
    state=ModelState.RESIDENT,
    memory_bytes=5_000_000,
    load_seconds=3.25,
)
SEEN = Cluster(
    versions=VERSIONS,
    workers=(
        WorkerSeen(worker="worker-1@a", device="cuda", version="1.2", models=(HELD,), seen_at=1.0),
        WorkerSeen(worker="worker-2@b", device="cpu", version="1.1", seen_at=1.0),
    ),
    queues=(
        QueueLoad(
            queue="scan.aaaa",
            model="tiny",
            lane=Lane.BATCH,
            waiting=12,
            oldest_seconds=4.5,
            running=3,
        ),
    ),
)


def test_workers_models_and_queues_are_shown(
    wire: Wire, capsys: pytest.CaptureFixture[str]
) -> None:
    wire.answers[PATH].append(json_answer(SEEN))
    assert run(["cluster", "--once"]) == 0
    shown = capsys.readouterr().out
    assert "neural-mri 1.2, python 3.11.7, postgresql 18.6, redis 9.1.2" in shown
    assert re.search(r"worker-1@a +cuda +1\.2 +tiny +resident +5\.0 MB +3\.2 s", shown)
    assert re.search(r"worker-2@b +cpu +1\.1 +nothing", shown)
    assert re.search(r"tiny +batch +scan\.aaaa +12 +4\.5 s +3", shown)


def test_json_is_the_answer_itself(wire: Wire, capsys: pytest.CaptureFixture[str]) -> None:
    wire.answers[PATH].append(json_answer(SEEN))
    assert run(["cluster", "--json"]) == 0
    assert msgspec.json.decode(capsys.readouterr().out, type=Cluster) == SEEN


def test_what_is_not_known_is_not_shown_as_nothing(
    wire: Wire, capsys: pytest.CaptureFixture[str]
) -> None:
    away = msgspec.structs.replace(VERSIONS, redis=None)
    wire.answers[PATH].append(json_answer(Cluster(versions=away, workers=None, queues=())))
    run(["cluster"])  # nobody watches: once
    shown = capsys.readouterr().out
    assert "redis away" in shown
    assert "what workers do is not known" in shown
    assert "Nothing waits, nothing runs." in shown


@pytest.mark.parametrize("interval", ["0", "soon", "-1"])
def test_an_interval_that_is_none_is_refused(
    wire: Wire, capsys: pytest.CaptureFixture[str], interval: str
) -> None:
    assert run(["cluster", "--interval", interval]) == 2
    assert interval in capsys.readouterr().err


def test_on_a_terminal_it_goes_on_until_it_is_interrupted(wire: Wire) -> None:
    wire.answers[PATH].extend(json_answer(SEEN) for _ in range(1000))
    terminal, end = pty.openpty()
    command = [sys.executable, "-m", "neural_mri.cli", "cluster", "--interval", "0.1"]
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "120"}
    watching = subprocess.Popen(command, stdout=end, stderr=end, env=environment)
    os.close(end)
    try:
        deadline = time.monotonic() + 30
        shown = b""
        while len([asked for asked in wire.asked if asked.path == PATH[1]]) < 3:
            assert time.monotonic() < deadline, shown
            shown += os.read(terminal, 65536)
        watching.send_signal(signal.SIGINT)
        assert watching.wait(20) == 0
    finally:
        watching.kill()
        watching.wait()
        os.close(terminal)
    assert b"worker-1@a" in shown
