import asyncio
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from uuid import uuid4

import msgspec
import pytest
import structlog

from neural_mri.backing import broker, events, jobs, keys
from neural_mri.backing.broker import AsyncRedis, SyncRedis
from neural_mri.backing.database import Sessions
from neural_mri.backing.events import (
    START,
    AsyncPublisher,
    HeldModel,
    Publisher,
    Replay,
    WorkerBeat,
)
from neural_mri.backing.settings import Settings
from neural_mri.contract.events import Ended, Event, Progress, StateChanged, decode_event
from neural_mri.contract.jobs import JobState
from neural_mri.contract.models import ModelState
from tests.backing.making import ELSEWHERE, QUEUE, submission
from tests.servers import Valkey, valkey

JOB = uuid4()


def step(done: int) -> Progress:
    return Progress(stage="forward", done=done, total=30)


def replay(settings: Settings, after: str = START) -> Replay:
    async def read() -> Replay:
        async with broker.connect_async(settings) as client:
            return await events.replay(client, JOB, after)

    return asyncio.run(read())


@pytest.fixture
def publisher(redis: SyncRedis, redis_settings: Settings) -> Publisher:
    return Publisher(redis, redis_settings)


def test_events_are_read_back_in_order_as_they_were_published(
    publisher: Publisher, redis_settings: Settings
) -> None:
    said: list[Event] = [StateChanged(state=JobState.RUNNING, attempt=1), step(1), step(2)]
    for event in said:
        publisher.publish(JOB, event)
    found = replay(redis_settings)
    assert found.is_whole
    assert [decode_event(entry.data) for entry in found.entries] == said
    assert [entry.name for entry in found.entries] == ["state", "progress", "progress"]


def test_a_reader_goes_on_after_the_last_event_it_saw(
    publisher: Publisher, redis_settings: Settings
) -> None:
    for done in range(5):
        publisher.publish(JOB, step(done))
    seen = replay(redis_settings).entries[1].id
    rest = replay(redis_settings, after=seen)
    assert rest.is_whole
    assert [decode_event(entry.data) for entry in rest.entries] == [step(2), step(3), step(4)]
    assert replay(redis_settings, after=rest.entries[-1].id) == Replay((), is_whole=True)


def test_after_the_server_was_emptied_events_go_on_and_the_gap_is_told(
    publisher: Publisher, redis: SyncRedis, redis_settings: Settings
) -> None:
    publisher.publish(JOB, step(1))
    seen = replay(redis_settings).entries[0].id
    redis.flushall()
    assert replay(redis_settings, after=seen) == Replay((), is_whole=False)
    publisher.publish(JOB, step(2))
    found = replay(redis_settings, after=seen)
    assert not found.is_whole
    assert [decode_event(entry.data) for entry in found.entries] == [step(2)]


def test_a_stream_is_bounded_and_expires(redis: SyncRedis, redis_settings: Settings) -> None:
    bounded = msgspec.structs.replace(
        redis_settings, event_stream_length=16, event_stream_seconds=90.0
    )
    publisher = Publisher(redis, bounded)
    for done in range(400):
        publisher.publish(JOB, step(done))
    stream = keys.event_stream(JOB)
    # The server trims whole nodes of a hundred entries.
    assert 16 <= redis.xlen(stream) <= 216
    assert 80 < redis.ttl(stream) <= 90


def test_an_event_loop_publishes_the_same(redis: SyncRedis, redis_settings: Settings) -> None:
    async def publish() -> None:
        async with broker.connect_async(redis_settings) as client:
            await AsyncPublisher(client, redis_settings).publish(JOB, step(7))

    asyncio.run(publish())
    assert [decode_event(entry.data) for entry in replay(redis_settings).entries] == [step(7)]


# Changes of state


def test_each_change_of_a_job_is_announced_and_its_end_once(
    sessions: Sessions, publisher: Publisher, redis_settings: Settings
) -> None:
    job = sessions.write(jobs.submit, submission())
    [held] = sessions.write(jobs.claim, queue=QUEUE, owner=ELSEWHERE, limit=1, lease_seconds=60.0)
    problem = {"type": "about:blank", "title": "Broken", "status": 500}
    failed = sessions.write(jobs.advance, job.id, JobState.FAILED, attempt=1, problem=problem)
    assert failed is not None
    for each in (job, held, failed):
        assert events.change_of(each).state is each.state
        publisher.announce(msgspec.structs.replace(each, id=JOB))
    said = [decode_event(entry.data) for entry in replay(redis_settings).entries]
    assert said == [
        StateChanged(state=JobState.QUEUED, attempt=0),
        StateChanged(state=JobState.CLAIMED, attempt=1),
        Ended(state=JobState.FAILED, attempt=1, problem=problem),
    ]


def test_the_end_of_a_success_says_where_the_result_is(sessions: Sessions) -> None:
    job = sessions.write(jobs.submit, submission())
    done = msgspec.structs.replace(job, state=JobState.SUCCEEDED, manifest="m", cached=True)
    assert events.change_of(done) == Ended(
        state=JobState.SUCCEEDED, attempt=0, cached=True, result=f"/api/jobs/{job.id}/result"
    )


# A server that is away


@pytest.fixture
def mortal() -> Iterator[Valkey]:
    with valkey() as server:
        yield server


def test_a_publisher_outlives_its_server_and_says_so_once(
    mortal: Valkey, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(events, "RECONNECT_SECONDS", 0.0)
    settings = Settings(redis_url=mortal.url)
    publisher = Publisher(broker.connect(settings), settings)
    publisher.publish(JOB, step(1))
    with structlog.testing.capture_logs() as logged:
        mortal.kill()
        for done in range(5):
            publisher.publish(JOB, step(done))
        mortal.start()
        publisher.publish(JOB, step(9))
    assert [(line["event"], line.get("dropped")) for line in logged] == [
        ("events_dropped", None),
        ("events_resumed", 5),
    ]
    assert [decode_event(entry.data) for entry in replay(settings).entries] == [step(9)]


def test_who_only_asks_who_watches_says_an_outage_once(
    mortal: Valkey, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(events, "RECONNECT_SECONDS", 0.0)
    settings = Settings(redis_url=mortal.url)
    publisher = Publisher(broker.connect(settings), settings)
    with structlog.testing.capture_logs() as logged:
        mortal.kill()
        for _ in range(5):
            assert publisher.publish_all((), [JOB]) == frozenset()
        mortal.start()
        assert publisher.publish_all((), [JOB]) == frozenset()
    assert [line["event"] for line in logged] == ["events_dropped", "events_resumed"]


def test_for_a_while_after_a_failure_nothing_is_even_tried(
    mortal: Valkey, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Thousands of frames cost a scan one failed attempt, not one each."""
    monkeypatch.setattr(events, "RECONNECT_SECONDS", 600.0)
    settings = Settings(redis_url=mortal.url)
    redis = broker.connect(settings)
    publisher = Publisher(redis, settings)
    mortal.kill()
    publisher.publish(JOB, step(0))
    mortal.start()
    for done in range(1000):
        publisher.publish(JOB, step(done))
    assert redis.exists(keys.event_stream(JOB)) == 0


@pytest.mark.parametrize("call", ["publish", "flag_cancel"])
def test_an_event_loop_survives_a_dead_server(tmp_path: Path, call: str) -> None:
    settings = Settings(redis_url=f"unix://{tmp_path}/nobody.sock")

    async def tell() -> None:
        async with broker.connect_async(settings) as client:
            publisher = AsyncPublisher(client, settings)
            calls: dict[str, Callable[[], Awaitable[None]]] = {
                "publish": lambda: publisher.publish(JOB, step(1)),
                "flag_cancel": lambda: publisher.flag_cancel(JOB),
            }
            await calls[call]()

    asyncio.run(tell())


# Cancel flags and heartbeats


def test_a_worker_sees_which_of_its_jobs_are_asked_to_stop(
    publisher: Publisher, redis: SyncRedis
) -> None:
    other = uuid4()
    publisher.flag_cancel(JOB)
    assert events.asked_to_stop(redis, [other, JOB]) == {JOB}
    assert events.asked_to_stop(redis, []) == frozenset()


def test_without_a_server_nothing_is_asked_to_stop(tmp_path: Path) -> None:
    away = broker.connect(Settings(redis_url=f"unix://{tmp_path}/nobody.sock"))
    assert events.asked_to_stop(away, [JOB]) == frozenset()


def worker_beat(name: str) -> WorkerBeat:
    held = HeldModel(name="tiny", revision="0" * 64, state=ModelState.RESIDENT, memory_bytes=5)
    return WorkerBeat(worker=name, device="cpu", models=(held,), at=1.5)


def test_workers_that_beat_are_heard_by_both_kinds_of_process(
    redis: SyncRedis, redis_settings: Settings
) -> None:
    async def hear() -> list[WorkerBeat]:
        client: AsyncRedis
        async with broker.connect_async(redis_settings) as client:
            return await events.heartbeats_async(client)

    assert events.heartbeats(redis) == asyncio.run(hear()) == []
    for name in ("b", "a"):
        events.beat(redis, worker_beat(name))
    assert events.heartbeats(redis) == [worker_beat("a"), worker_beat("b")]
    assert asyncio.run(hear()) == events.heartbeats(redis)


def test_a_worker_that_fell_silent_is_forgotten(redis: SyncRedis) -> None:
    for name in ("a", "b"):
        events.beat(redis, worker_beat(name))
    assert 0 < redis.ttl(keys.heartbeat("a")) <= events.BEAT_SECONDS
    redis.delete(keys.heartbeat("a"))
    assert events.heartbeats(redis) == [worker_beat("b")]
    assert redis.smembers(keys.WORKERS) == {b"b"}


def test_beating_at_a_dead_server_is_no_error(tmp_path: Path) -> None:
    away = broker.connect(Settings(redis_url=f"unix://{tmp_path}/nobody.sock"))
    events.beat(away, worker_beat("a"))
