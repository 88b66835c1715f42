"""The awaited client gives what the plain one gives, many at a time, and leaves nothing waiting."""

import asyncio
import inspect
import logging
import threading
import time
from collections.abc import AsyncGenerator, Callable, Coroutine
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, get_origin, get_type_hints
from uuid import UUID, uuid4

import pytest

from neural_mri.client import (
    AsyncClient,
    Client,
    ClientClosed,
    OpenedSession,
    Refused,
    Result,
    Unreachable,
)
from neural_mri.client.access import Access
from neural_mri.client.asynchronous import (
    AsyncAccess,
    AsyncBatches,
    AsyncSessions,
    AsyncSharedSession,
)
from neural_mri.client.batches import Batches
from neural_mri.client.sessions import Sessions, SharedSession
from neural_mri.contract.batches import BatchCounts, BatchState, BatchView
from neural_mri.contract.events import Ended
from neural_mri.contract.jobs import JobState, Lane
from neural_mri.contract.scans import ActivationScan
from neural_mri.contract.sessions import SessionPage
from neural_mri.contract.suites import Case, Expectation, Item, Language, Measure, Suite
from neural_mri.contract.tokens import Span, Tokens
from neural_mri.diagnostics import Records
from tests.client.wire import Wire, json_answer, life_of_a_scan

PROMPT = "The Eiffel Tower is in"

PAIRS = [
    (AsyncClient, Client),
    (AsyncAccess, Access),
    (AsyncBatches, Batches),
    (AsyncSessions, Sessions),
    (AsyncSharedSession, SharedSession),
]


@pytest.mark.parametrize(("awaited", "plain"), PAIRS)
def test_whatever_can_be_asked_can_be_awaited(awaited: type, plain: type) -> None:
    def offered(kind: type) -> set[str]:
        return {name for name in dir(kind) if not name.startswith("_")}

    assert offered(awaited) == offered(plain)


@pytest.mark.parametrize(("awaited", "plain"), PAIRS)
def test_what_comes_one_by_one_is_streamed_and_nothing_that_is_given_asks_for_itself(
    awaited: type, plain: type
) -> None:
    for name, method in inspect.getmembers(plain, inspect.isfunction):
        if name.startswith("_") or name == "close":
            continue
        given = get_type_hints(method)["return"]
        offered = getattr(awaited, name)
        comes = "Iterator" in str(get_origin(given))
        assert comes == (type(offered).__name__ == "_Streamed"), name
        if inspect.isclass(given) and not inspect.iscoroutinefunction(offered):
            holds = "exchange" in get_type_hints(given.__init__)
            assert not holds or issubclass(given, (Result, OpenedSession)), name


def test_a_call_is_a_coroutine_and_a_list_of_sessions_is_streamed(wire: Wire) -> None:
    wire.answers["GET", "/api/sessions"] = [json_answer(SessionPage(sessions=()))]

    async def asked() -> tuple[dict[str, Any], list[Any], object]:
        async with AsyncClient(wire.url) as client:
            health = asyncio.create_task(client.health())
            listed = [each async for each in client.sessions.list()]
            return await health, listed, await client.sessions.shared("a" * 22)

    health, listed, shared = asyncio.run(asked())
    assert health == {"status": "ok"}
    assert listed == []
    assert isinstance(shared, AsyncSharedSession)


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


# Leaving


async def so(is_so: Callable[[], bool]) -> None:
    while not is_so():  # noqa: ASYNC110 -- threads bring it about
        await asyncio.sleep(0.01)


async def cancelled(call: Coroutine[Any, Any, object], when: Callable[[], bool]) -> None:
    """Begin a call, and cancel its task as soon as something is so."""
    task = asyncio.create_task(call)
    await so(when)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


@pytest.mark.parametrize("method", ["run", "scan_activation"])
def test_a_scan_whose_task_is_cancelled_is_cancelled_on_the_service(
    wire: Wire, method: str
) -> None:
    wire.next_hold = threading.Event()

    async def leave() -> None:
        async with AsyncClient(wire.url) as client:
            asked = PROMPT if method != "run" else ActivationScan(prompt=PROMPT)
            call = getattr(client, method)(asked)
            await cancelled(call, lambda: any("events" in path for path in wire.paths()))

    asyncio.run(leave())
    (job_id,) = wire.jobs
    assert wire.paths("DELETE") == [f"/api/jobs/{job_id}"]


def test_a_scan_is_cancelled_though_its_task_was_while_it_was_asked_for(wire: Wire) -> None:
    job = wire.submit(ActivationScan(prompt=PROMPT))
    job.hold = threading.Event()
    slow = json_answer(job.view, 202)._replace(seconds=0.3)
    wire.answers["POST", "/api/scan/activation"] = [slow]

    async def leave() -> None:
        async with AsyncClient(wire.url) as client:
            await cancelled(client.scan_activation(PROMPT), lambda: bool(wire.asked))

    asyncio.run(leave())
    assert wire.paths("DELETE") == [f"/api/jobs/{job.view.id}"]


def test_a_batch_whose_task_is_cancelled_is_cancelled_on_the_service(wire: Wire) -> None:
    batch = BatchView(
        id=uuid4(),
        state=BatchState.RUNNING,
        lane=Lane.BATCH,
        lines=1,
        refused=0,
        repeated=0,
        counts=BatchCounts(queued=1),
        created_at=datetime.now(UTC),
    )
    path = f"/api/batches/{batch.id}"
    wire.answers["POST", "/api/batches"] = [json_answer(batch, 202)]
    wire.answers["GET", path] = [json_answer(batch)._replace(seconds=5)]
    wire.answers["DELETE", path] = [json_answer(batch)]

    async def leave() -> None:
        async with AsyncClient(wire.url) as client:
            running = client.batches.run([ActivationScan(prompt=PROMPT)])
            await cancelled(running, lambda: path in wire.paths())

    asyncio.run(leave())
    assert wire.paths("DELETE") == [path]


def read(*texts: str) -> Tokens:
    spans = tuple(Span(at, at + 1) for at in range(len(texts)))
    return Tokens(ids=tuple(map(ord, texts)), texts=texts, spans=spans)


def suite_of(*prompts: str) -> Suite:
    words = {Language.EN: "letters"}
    case = Case(
        id="letters",
        title=words,
        about=words,
        expectation=Expectation.TOP,
        source="here",
        licence="none",
        items=tuple(Item(prompt=prompt, answer="z") for prompt in prompts),
    )
    measures = (Measure.NORMS,)
    return Suite(name="small", version="1.0.0", title=words, measures=measures, cases=(case,))


def test_a_diagnosis_whose_task_is_cancelled_is_cancelled_on_the_service(
    wire: Wire, tmp_path: Path
) -> None:
    batch = BatchView(
        id=uuid4(),
        state=BatchState.RUNNING,
        lane=Lane.BATCH,
        lines=3,
        refused=0,
        repeated=0,
        counts=BatchCounts(queued=3),
        created_at=datetime.now(UTC),
    )
    path = f"/api/batches/{batch.id}"
    wire.answers["POST", "/api/tokenize"] = [
        json_answer(read(*text)) for text in ("ab", "abz", "cd", "cdz")
    ]
    wire.answers["POST", "/api/batches"] = [json_answer(batch, 202)]
    wire.answers["GET", f"{path}/events"] = [json_answer({})._replace(seconds=5)]
    wire.answers["DELETE", path] = [json_answer(batch)]

    async def leave() -> None:
        async with AsyncClient(wire.url) as client:
            running = client.diagnose(suite_of("ab", "cd"), records=Records(tmp_path))
            await cancelled(running, lambda: f"{path}/events" in wire.paths())

    asyncio.run(leave())
    assert wire.paths("DELETE")[0] == path


def test_a_diagnosis_whose_task_is_cancelled_asks_for_nothing_more(
    wire: Wire, tmp_path: Path
) -> None:
    prompts = [f"a{chr(ord('b') + n)}" for n in range(20)]
    texts = [text for prompt in prompts for text in (prompt, f"{prompt}z")]
    wire.answers["POST", "/api/tokenize"] = [
        json_answer(read(*text))._replace(seconds=0.05) for text in texts
    ]

    def asked() -> list[str]:
        return wire.paths("POST")

    async def leave() -> None:
        async with AsyncClient(wire.url) as client:
            running = client.diagnose(suite_of(*prompts), records=Records(tmp_path))
            await cancelled(running, lambda: bool(asked()))
            at_most = len(asked()) + 1
            await asyncio.sleep(0.5)
            assert len(asked()) <= at_most

    asyncio.run(leave())


def test_what_waits_when_the_client_is_closed_waits_no_longer(wire: Wire) -> None:
    wire.answers["GET", "/api/health"] = [json_answer({})._replace(seconds=60)]

    async def left() -> float:
        client = AsyncClient(wire.url)
        waiting = asyncio.create_task(client.health())
        await so(lambda: bool(wire.asked))
        started = time.monotonic()
        await client.close()
        with pytest.raises(Unreachable):
            await waiting
        for late in (client.health(), client.sessions.list().__anext__()):
            with pytest.raises(ClientClosed):
                await late
        return time.monotonic() - started

    assert asyncio.run(left()) < 20


def test_a_job_is_cancelled_though_every_thread_waits(
    wire: Wire, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("neural_mri.client.asynchronous._MOST_CALLS", 2)
    job = wire.submit(ActivationScan(prompt=PROMPT))
    job.hold = threading.Event()

    async def cancelled() -> None:
        async with AsyncClient(wire.url) as client:
            waiting = [asyncio.create_task(client.wait(job.view.id)) for _ in range(4)]
            await asyncio.sleep(0)
            await asyncio.wait_for(client.cancel(job.view.id), 30)
            ended = await asyncio.gather(*waiting, return_exceptions=True)
            assert all(isinstance(each, Exception) for each in ended)

    asyncio.run(cancelled())


def test_a_stream_that_is_kept_after_a_break_says_nothing_when_the_client_is_closed(
    wire: Wire, caplog: pytest.LogCaptureFixture
) -> None:
    kept: list[AsyncGenerator[Any, None]] = []

    async def watched(job: UUID) -> None:
        async with AsyncClient(wire.url) as client:
            stream = client.watch(job)
            kept.append(stream)
            async for _ in stream:
                break

    job = wire.submit(ActivationScan(prompt=PROMPT))
    with caplog.at_level(logging.WARNING):
        asyncio.run(watched(job.view.id))
    assert caplog.records == []
