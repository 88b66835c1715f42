import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import msgspec
import pytest

from deploy.embedded import watch as module
from deploy.embedded.watch import Watch
from neural_mri.backing import broker, database, events, jobs, keys
from neural_mri.backing.broker import SyncRedis
from neural_mri.backing.events import HeldModel, WorkerBeat
from neural_mri.backing.jobs import LeaseOwner, Submission
from neural_mri.backing.settings import Settings
from neural_mri.contract.jobs import JobKind
from neural_mri.contract.models import ModelState
from tests.servers import Valkey, valkey

PID = 4242
REVISION = "0123456789abcdef" * 4
QUEUE = keys.scan_queue(REVISION)


@pytest.fixture(scope="module")
def server() -> Iterator[Valkey]:
    with valkey() as server:
        yield server


@pytest.fixture
def settings(tmp_path: Path, server: Valkey) -> Settings:
    settings = Settings(data_dir=tmp_path, redis_url=server.url)
    database.migrate(settings)
    return settings


@pytest.fixture
def redis(settings: Settings) -> Iterator[SyncRedis]:
    with broker.connect(settings) as client:
        client.flushall()
        yield client


@pytest.fixture
def watch(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Iterator[Watch]:
    monkeypatch.setattr(module, "SILENT_SECONDS", 0.2)
    monkeypatch.setattr(module, "STARVING_SECONDS", 0.2)
    with closing(Watch(settings)) as watch:
        yield watch


def say(redis: SyncRedis, state: ModelState = ModelState.RESIDENT, pid: int = PID) -> None:
    held = HeldModel(name="tiny", revision=REVISION, state=state)
    events.beat(
        redis, WorkerBeat(worker=f"worker-{pid}@here", device="cpu", models=(held,), at=time.time())
    )


def submit(settings: Settings, queue: str = QUEUE) -> None:
    with closing(database.sessions(settings)) as sessions:
        sessions.write(
            jobs.submit,
            Submission(
                owner="ada",
                kind=JobKind.SCAN,
                model="tiny",
                revision=REVISION,
                queue=queue,
                request=b"{}",
            ),
        )


def claim(settings: Settings, pid: int) -> None:
    with closing(database.sessions(settings)) as sessions:
        sessions.write(
            jobs.claim,
            queue=QUEUE,
            owner=LeaseOwner("here", pid, 1),
            limit=1,
            lease_seconds=60,
        )


def after_a_while(watch: Watch) -> str | None:
    """What the watch says when it has looked for long enough."""
    watch.what_is_wrong(PID)
    time.sleep(0.3)
    return watch.what_is_wrong(PID)


def test_a_worker_that_fell_silent_is_named(watch: Watch, redis: SyncRedis) -> None:
    say(redis)
    assert watch.what_is_wrong(PID) is None
    redis.delete(keys.heartbeat(f"worker-{PID}@here"))
    assert after_a_while(watch) == "has said nothing for too long"


def test_a_worker_that_has_not_spoken_yet_may_still_be_starting(
    watch: Watch, redis: SyncRedis
) -> None:
    assert after_a_while(watch) is None


def test_a_new_worker_is_not_blamed_for_the_silence_of_the_last(
    watch: Watch, redis: SyncRedis
) -> None:
    say(redis, pid=PID - 1)
    watch.what_is_wrong(PID - 1)
    time.sleep(0.3)
    assert watch.what_is_wrong(PID) is None


def test_a_worker_is_known_by_the_process_that_has_forked_it(
    watch: Watch, redis: SyncRedis
) -> None:
    forked = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    with forked:
        say(redis, pid=forked.pid)
        assert watch.what_is_wrong(os.getpid()) is None
        redis.delete(keys.heartbeat(f"worker-{forked.pid}@here"))
        time.sleep(0.3)
        assert watch.what_is_wrong(os.getpid()) == "has said nothing for too long"
        forked.kill()
        forked.wait()
        assert watch.what_is_wrong(os.getpid()) is None, "the next one may still be starting"


def test_a_worker_that_lets_work_wait_is_named(
    watch: Watch, redis: SyncRedis, settings: Settings
) -> None:
    say(redis)
    submit(settings)
    assert after_a_while(watch) == "does nothing while work waits for it"


def test_a_busy_worker_may_let_work_wait(
    watch: Watch, redis: SyncRedis, settings: Settings
) -> None:
    say(redis)
    submit(settings)
    submit(settings)
    claim(settings, PID)
    assert after_a_while(watch) is None


def test_a_job_of_another_worker_is_no_excuse(
    watch: Watch, redis: SyncRedis, settings: Settings
) -> None:
    say(redis)
    submit(settings)
    submit(settings)
    claim(settings, PID + 1)
    assert after_a_while(watch) == "does nothing while work waits for it"


def test_work_for_another_model_is_not_this_workers(
    watch: Watch, redis: SyncRedis, settings: Settings
) -> None:
    say(redis)
    submit(settings, queue=keys.scan_queue("f" * 64))
    assert after_a_while(watch) is None


def test_a_worker_that_loads_a_model_may_let_work_wait(
    watch: Watch, redis: SyncRedis, settings: Settings
) -> None:
    say(redis, ModelState.LOADING)
    submit(settings)
    assert after_a_while(watch) is None


def test_nothing_is_held_against_a_worker_while_redis_is_away(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SILENT_SECONDS", 0.2)
    nowhere = msgspec.structs.replace(settings, redis_url=f"unix://{tmp_path}/nobody.sock")
    with closing(Watch(nowhere)) as watch:
        assert after_a_while(watch) is None
