"""The awaited client gives what the plain one gives, many at a time, and leaves nothing waiting."""

import asyncio
import inspect
import threading
from collections.abc import Callable

import pytest

from neural_mri.client import AsyncClient, Client, Refused
from neural_mri.client.access import Access
from neural_mri.client.asynchronous import AsyncAccess, AsyncBatches, AsyncSessions
from neural_mri.client.batches import Batches
from neural_mri.client.sessions import Sessions
from neural_mri.contract.events import Ended
from neural_mri.contract.jobs import JobState
from neural_mri.contract.scans import ActivationScan
from tests.client.wire import Wire, life_of_a_scan

PROMPT = "The Eiffel Tower is in"


@pytest.mark.parametrize(
    ("awaited", "plain"),
    [
        (AsyncClient, Client),
        (AsyncAccess, Access),
        (AsyncBatches, Batches),
        (AsyncSessions, Sessions),
    ],
)
def test_whatever_can_be_asked_can_be_awaited(awaited: type, plain: type) -> None:
    def offered(kind: type) -> set[str]:
        return {name for name in dir(kind) if not name.startswith("_")}

    assert offered(awaited) == offered(plain)


def test_a_method_says_what_the_plain_one_says() -> None:
    async def method() -> Callable[..., object]:
        async with AsyncClient() as client:
            return client.scan_circuits

    awaited, plain = asyncio.run(method()), Client().scan_circuits
    assert awaited.__doc__ == plain.__doc__
    assert inspect.signature(awaited) == inspect.signature(plain)


def test_results_are_the_plain_clients(wire: Wire) -> None:
    async def scanned() -> bytes:
        async with AsyncClient(wire.url) as client:
            return (await client.scan_activation(PROMPT)).arrow()

    with Client(wire.url) as client:
        assert asyncio.run(scanned()) == client.scan_activation(PROMPT).arrow()


def test_many_wait_at_the_same_time(wire: Wire) -> None:
    async def together() -> list[JobState]:
        async with AsyncClient(wire.url) as client:
            jobs = await asyncio.gather(
                *(client.submit(ActivationScan(prompt=f"{PROMPT} {n}")) for n in range(20))
            )
            return [job.state for job in await asyncio.gather(*map(client.wait, jobs))]

    assert asyncio.run(together()) == [JobState.SUCCEEDED] * 20


def test_the_events_of_a_job_are_those_it_had(wire: Wire) -> None:
    async def watched() -> list[object]:
        async with AsyncClient(wire.url) as client:
            job = await client.submit(ActivationScan(prompt=PROMPT))
            return [event async for event in client.watch(job)]

    assert asyncio.run(watched()) == life_of_a_scan(Ended(state=JobState.SUCCEEDED, attempt=1))


def test_a_stream_that_is_left_is_closed(wire: Wire) -> None:
    async def left() -> object:
        async with AsyncClient(wire.url) as client:
            job = await client.submit(ActivationScan(prompt=PROMPT))
            stream = client.watch(job)
            first = await anext(stream)
            await stream.aclose()
            return first

    assert asyncio.run(left()) == life_of_a_scan(Ended(state=JobState.SUCCEEDED, attempt=1))[0]


def test_a_refusal_is_raised_where_it_is_awaited(wire: Wire) -> None:
    async def refused() -> None:
        async with AsyncClient(wire.url) as client:
            await client.job("00000000-0000-0000-0000-000000000000")

    with pytest.raises(Refused):
        asyncio.run(refused())


def test_a_closed_client_leaves_no_thread(wire: Wire) -> None:
    async def asked() -> None:
        async with AsyncClient(wire.url) as client:
            await asyncio.gather(*(client.health() for _ in range(8)))

    asyncio.run(asked())
    for thread in threading.enumerate():
        if thread.name.startswith("neural-mri"):
            thread.join(5)
            assert not thread.is_alive()
