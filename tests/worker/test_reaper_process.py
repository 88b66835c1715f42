"""The reaper as a process: it begins, ends, hangs, and outlives what it stands on."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import structlog
from redis import exceptions

from neural_mri.backing import broker, database, jobs, keys, queue, storage
from neural_mri.backing.broker import SyncRedis
from neural_mri.backing.database import Sessions
from neural_mri.backing.settings import Settings
from neural_mri.contract.jobs import JobState
from tests.backing.stores import paths
from tests.chaos.clock import Clock, may_step
from tests.servers import sqlite_only
from tests.worker.reaping import AT_ONCE, QUEUE, claim, eventually, state, submit
from worker.reaper import SWEEP_TIMES, Ending, Reaper

QUICK = "from worker import reaper; reaper.EXPIRE_EVERY_SECONDS = 0.1; reaper.main()"
"""A reaper that looks for what has waited too long at every turn."""


@sqlite_only
@pytest.mark.skipif(not may_step(), reason="no C compiler, or no Linux")
def test_the_process_gives_no_job_up_for_a_clock_that_is_put_forward(
    settings: Settings, sessions: Sessions, redis: SyncRedis, tmp_path: Path
) -> None:
    clock = Clock(tmp_path / "clock")
    [job] = submit(sessions)
    environment = {**os.environ, **settings.environment(), **clock.environment}
    with subprocess.Popen(
        [sys.executable, "-c", QUICK], env=environment, stderr=subprocess.PIPE, text=True
    ) as running:
        assert eventually(lambda: queue.waiting_tickets(redis, QUEUE) == 1)
        clock.set(settings.queued_seconds + 60.0)
        [late] = submit(sessions)
        assert eventually(lambda: queue.waiting_tickets(redis, QUEUE) == 2)
        time.sleep(0.5)
        running.send_signal(signal.SIGTERM)
        _, said = running.communicate(timeout=10)
    assert "clock_was_set" in said
    assert state(sessions, job.id) is state(sessions, late.id) is JobState.QUEUED


@sqlite_only
def test_a_database_that_is_away_is_tried_again(
    settings: Settings, redis: SyncRedis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database, "BUSY_TIMEOUT_SECONDS", 0.01)
    sessions = database.sessions(settings)
    [job] = submit(sessions)
    claim(sessions)
    reaper = Reaper(settings, sessions, redis, storage.open_store(settings))
    other = database.sessions(settings)
    with structlog.testing.capture_logs() as logged:
        with other.writing():
            for _ in range(3):
                reaper.round()
        reaper.round()
    other.close()
    said = [line["event"] for line in logged if line.get("on") == "database"]
    assert said == ["round_failed", "round_succeeded_again"]
    assert state(sessions, job.id) is JobState.QUEUED
    sessions.close()


def test_it_stops_when_told_to(settings: Settings, sessions: Sessions, redis: SyncRedis) -> None:
    stop = threading.Event()
    reaper = Reaper(settings, sessions, redis, storage.open_store(settings))
    running = threading.Thread(target=reaper.run, args=(stop.wait,))
    running.start()
    stop.set()
    running.join(5)
    assert not running.is_alive()


@pytest.fixture
def process(settings: Settings) -> Iterator[subprocess.Popen[str]]:
    """The reaper as it is really run."""
    environment = {**os.environ, **settings.environment()}
    with subprocess.Popen(
        [sys.executable, "-m", "worker.reaper"],
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
    ) as running:
        yield running
        running.kill()


def test_the_process_repairs_what_two_crashes_left_and_ends_on_sigterm(
    process: subprocess.Popen[str], sessions: Sessions, redis: SyncRedis
) -> None:
    [job] = submit(sessions)
    claim(sessions)
    assert eventually(lambda: state(sessions, job.id) is JobState.QUEUED)
    assert eventually(lambda: queue.waiting_tickets(redis, QUEUE) == 1)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=10)
    assert process.returncode == 0
    assert "reaper_stopped" in said


def test_one_that_hangs_ends_and_says_where(settings: Settings, sessions: Sessions) -> None:
    submit(sessions)
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes what is sent, and never answers
        port = silent.getsockname()[1]
        hung = msgspec.structs.replace(
            settings, redis_url=f"redis://127.0.0.1:{port}/0", reaper_hung_seconds=0.5
        )
        ended = subprocess.run(
            [sys.executable, "-m", "worker.reaper"],
            env={**os.environ, **hung.environment()},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    assert ended.returncode == 1
    assert "Timeout (0:00:00.5" in ended.stderr
    assert "in _top_up" in ended.stderr


def test_a_pause_is_no_hanging(
    settings: Settings, sessions: Sessions, redis: SyncRedis, tmp_path: Path
) -> None:
    slow = msgspec.structs.replace(settings, reaper_interval_seconds=60.0, reaper_hung_seconds=1.0)
    beats: list[float] = []
    reaper = Reaper(slow, sessions, redis, storage.open_store(settings), beats.append)
    reaper.run(lambda seconds: seconds == 60.0)
    assert beats[-1] == 61.0
    assert set(beats[:-1]) == {1.0, SWEEP_TIMES}


def test_a_slow_store_is_no_hanging(
    settings: Settings, sessions: Sessions, redis: SyncRedis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.reaper.ABANDONED_SECONDS", AT_ONCE)
    store = storage.open_store(settings)
    for job in submit(sessions, 3):
        lost = claim(sessions)
        sessions.write(jobs.advance, lost.id, JobState.FAILED, attempt=1, problem={"detail": "no"})
        store.put(keys.packed_path(job.id, 1), b"{}")
    files: list[int] = []
    """How many there were at each beat."""
    beat = lambda _seconds: files.append(len(paths(store)))  # noqa: E731
    Reaper(settings, sessions, redis, store, beat).round()
    assert files[-3:] == [3, 2, 1]
    assert not paths(store)


def test_an_end_is_heard_at_any_moment_and_remembered() -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        before = signal.getsignal(number)
        with Ending() as ending:
            assert not ending.comes_within(0)
            signal.raise_signal(number)
            assert ending.comes_within(0)
            assert ending.comes_within(60)
        assert signal.getsignal(number) is before


def test_the_process_refuses_settings_it_does_not_know() -> None:
    environment = {**os.environ, "NEURAL_MRI_LEESE_SECONDS": "5"}
    ended = subprocess.run(
        [sys.executable, "-m", "worker.reaper"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 2
    assert "NEURAL_MRI_LEESE_SECONDS is not a setting" in ended.stderr


def test_the_process_never_loads_torch() -> None:
    script = "import sys, worker.reaper; print('torch' in sys.modules, 'celery' in sys.modules)"
    said = subprocess.check_output([sys.executable, "-c", script], text=True)
    assert said.split() == ["False", "False"]


def test_redis_errors_are_what_the_reaper_expects() -> None:
    assert issubclass(exceptions.ConnectionError, broker.AWAY)
    assert issubclass(exceptions.TimeoutError, broker.AWAY)
