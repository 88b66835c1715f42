"""Those who wait for a job's end, on a real Valkey."""

import asyncio
import math
import time
from collections.abc import Awaitable, Callable
from uuid import uuid4

import pytest

from api import ends as ends_module
from api.ends import Ends, Wait
from neural_mri.backing import broker
from neural_mri.backing.events import Publisher
from neural_mri.backing.settings import Settings
from neural_mri.contract.events import Ended, StateChanged
from neural_mri.contract.jobs import JobState
from tests.servers import Valkey, valkey

JOB, OTHER = uuid4(), uuid4()
SUCCEEDED = Ended(state=JobState.SUCCEEDED, attempt=1)
LONG = 5.0


async def heard(ends: Ends, *, is_heard: bool = True) -> None:
    for _ in range(500):
        if ends.is_heard is is_heard:
            return
        await asyncio.sleep(0.01)
    pytest.fail(f"after 5 s is_heard is {ends.is_heard}")


def listening(settings: Settings, work: Callable[[Ends, Wait], Awaitable[None]]) -> None:
    async def run() -> None:
        ends = Ends(settings)
        ends.start()
        try:
            await heard(ends)
            with ends.waiting() as wait:
                await work(ends, wait)
            assert not ends._waiting
        finally:
            await ends.stop()

    asyncio.run(run())


async def seconds(wait: Wait) -> float:
    began = time.monotonic()
    await wait.pause(LONG)
    return time.monotonic() - began


def test_the_end_of_a_job_wakes_who_waits_for_it(shared_settings: Settings) -> None:
    with broker.connect(shared_settings) as redis:
        publisher = Publisher(redis, shared_settings)

        async def work(_ends: Ends, wait: Wait) -> None:
            wait.add(JOB)
            publisher.publish(JOB, SUCCEEDED)
            assert await seconds(wait) < LONG / 2

        listening(shared_settings, work)


def test_no_other_event_and_no_other_jobs_end_does(shared_settings: Settings) -> None:
    with broker.connect(shared_settings) as redis:
        publisher = Publisher(redis, shared_settings)

        async def work(_ends: Ends, wait: Wait) -> None:
            wait.add(JOB)
            publisher.publish(JOB, StateChanged(state=JobState.RUNNING, attempt=1))
            publisher.publish(OTHER, SUCCEEDED)
            began = time.monotonic()
            await wait.pause(0.3)
            assert time.monotonic() - began >= 0.3

        listening(shared_settings, work)


def test_that_a_job_has_not_ended_is_known_of_the_time_that_was_listened_to(
    shared_settings: Settings,
) -> None:
    with broker.connect(shared_settings) as redis:
        publisher = Publisher(redis, shared_settings)

        async def work(ends: Ends, wait: Wait) -> None:
            asked, ended = time.monotonic(), uuid4()
            assert ends.nothing_since(asked, ended, OTHER)
            assert not ends.nothing_since(asked - 3600, ended), "nobody listened so long ago"
            assert not ends.nothing_since(-math.inf, ended)
            wait.add(ended)
            publisher.publish(ended, SUCCEEDED)
            assert await seconds(wait) < LONG / 2
            assert not ends.nothing_since(asked, OTHER, ended)
            assert not ends.nothing_since(time.monotonic(), ended)
            assert ends.nothing_since(asked, OTHER)

        listening(shared_settings, work)


def test_ends_that_are_forgotten_are_not_taken_for_none(
    shared_settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ends_module, "REMEMBERED", 2)
    with broker.connect(shared_settings) as redis:
        publisher = Publisher(redis, shared_settings)

        async def work(ends: Ends, wait: Wait) -> None:
            asked, told = time.monotonic(), [uuid4() for _ in range(3)]
            wait.add(told[-1])
            for job_id in told:
                publisher.publish(job_id, SUCCEEDED)
            assert await seconds(wait) < LONG / 2
            assert not ends.nothing_since(asked, told[0]), "it ended, and has been forgotten"
            assert ends.nothing_since(time.monotonic(), OTHER)

        listening(shared_settings, work)


def test_who_waits_looks_again_when_redis_goes_and_when_it_comes_back(
    shared_settings: Settings,
) -> None:
    with valkey() as server:

        async def work(ends: Ends, wait: Wait) -> None:
            wait.add(JOB)
            server.kill()
            assert await seconds(wait) < LONG
            await heard(ends, is_heard=False)
            await asyncio.to_thread(server.start)
            assert await seconds(wait) < LONG
            await heard(ends)

        listening(_at(shared_settings, server), work)


def _at(settings: Settings, server: Valkey) -> Settings:
    return Settings(data_dir=settings.data_dir, redis_url=server.url)
