"""The client for programs that run an event loop: the same methods, awaited.

Every call is made by the plain client in a thread of a pool, which waits for the network there; arguments,
answers, errors and their types are the plain client's. A call whose task is cancelled goes on in its thread to
its end, and its answer is dropped. What `run`, `diagnose` and the methods that scan have begun is cancelled on the
service first, as where they are interrupted, and a diagnosis asks for nothing more; what `submit` has begun is stopped
with `cancel`.
"""

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial, update_wrapper
from types import MethodType, TracebackType
from typing import Any, Concatenate, Generic, ParamSpec, Protocol, Self, TypeVar, overload

from neural_mri.client.access import Access
from neural_mri.client.batches import Batches
from neural_mri.client.client import Client
from neural_mri.client.errors import ClientClosed
from neural_mri.client.exchange import PARTING_SECONDS
from neural_mri.client.parting import Parting
from neural_mri.client.sessions import Sessions, SharedSession

__all__ = ("AsyncAccess", "AsyncBatches", "AsyncClient", "AsyncSessions", "AsyncSharedSession")

P = ParamSpec("P")
Plain = TypeVar("Plain")
Closed = TypeVar("Closed", bound="_Closes")
Answer = TypeVar("Answer")

_MOST_CALLS = 64
"""Calls and streams of one client that wait at the same time; more wait for their turn."""
_MOST_STOPS = 4
"""Of what stops others, and therefore cannot wait for the turn of those."""


class _Threads:
    """Where the calls of one client are made."""

    def __init__(self) -> None:
        self._calls = ThreadPoolExecutor(_MOST_CALLS, thread_name_prefix="neural-mri")
        self._stops = ThreadPoolExecutor(_MOST_STOPS, thread_name_prefix="neural-mri-stop")

    def begin(self, call: Callable[[], Answer], *, stops: bool = False) -> Future[Answer]:
        """A call, begun in its turn. Raises `ClientClosed`."""
        pool = self._stops if stops else self._calls
        try:
            return pool.submit(call)
        except RuntimeError as error:
            raise ClientClosed from error

    def shut_down(self) -> None:
        """Take no more calls. Those that wait for their turn are told by the plain client that it is closed."""
        self._calls.shutdown(wait=False)
        self._stops.shutdown(wait=False)


class _InThreads(Generic[Plain]):
    """Something of the plain client's, and the threads in which its methods run."""

    def __init__(self, plain: Plain, threads: _Threads) -> None:
        self.plain = plain
        self.threads = threads


class _Called(Generic[Plain, P, Answer]):
    """A plain method, to be awaited. One that `stops` others goes before those that wait for their turn."""

    def __init__(
        self, method: Callable[Concatenate[Plain, P], Answer], *, stops: bool = False
    ) -> None:
        self._method = method
        self._stops = stops
        update_wrapper(self, method)  # type: ignore[arg-type]

    @overload
    def __get__(self, owner: None, kind: type) -> Self: ...
    @overload
    def __get__(
        self, owner: _InThreads[Plain], kind: type
    ) -> Callable[P, Coroutine[Any, Any, Answer]]: ...

    def __get__(self, owner: _InThreads[Plain] | None, kind: type) -> Any:
        if owner is None:
            return self

        threads = owner.threads
        bound = MethodType(self._method, owner.plain)

        async def call(*args: P.args, **kwargs: P.kwargs) -> Answer:
            parting = Parting()
            making = partial(parting.during, bound, *args, **kwargs)
            try:
                return await asyncio.wrap_future(threads.begin(making, stops=self._stops))
            except asyncio.CancelledError:
                await _leave(threads, parting)
                raise

        return update_wrapper(call, bound)


async def _leave(threads: _Threads, parting: Parting) -> None:
    """Wait until what was begun is stopped, for a client that is closed next could not say it any more."""
    work = parting.leave()
    if work is not None:
        with suppress(ClientClosed):
            leaving = threads.begin(partial(work.leave, PARTING_SECONDS), stops=True)
            await asyncio.wrap_future(leaving)


class _Streamed(Generic[Plain, P, Answer]):
    """A plain method that gives one thing after another, for `async for`."""

    def __init__(self, method: Callable[Concatenate[Plain, P], Iterator[Answer]]) -> None:
        self._method = method
        update_wrapper(self, method)  # type: ignore[arg-type]

    @overload
    def __get__(self, owner: None, kind: type) -> Self: ...
    @overload
    def __get__(
        self, owner: _InThreads[Plain], kind: type
    ) -> Callable[P, AsyncGenerator[Answer]]: ...

    def __get__(self, owner: _InThreads[Plain] | None, kind: type) -> Any:
        if owner is None:
            return self

        bound = MethodType(self._method, owner.plain)

        def stream(*args: P.args, **kwargs: P.kwargs) -> AsyncGenerator[Answer]:
            return _stream(owner.threads, partial(bound, *args, **kwargs))

        return update_wrapper(stream, bound)


async def _stream(
    threads: _Threads, start: Callable[[], Iterator[Answer]]
) -> AsyncGenerator[Answer]:
    iterator = await asyncio.wrap_future(threads.begin(start))
    end = object()
    coming: Future[Any] | None = None
    try:
        while True:
            coming = threads.begin(partial(next, iterator, end))
            item = await asyncio.wrap_future(coming)
            if item is end:
                return
            yield item
    finally:
        close = getattr(iterator, "close", None)
        if close is not None:
            # A generator can't be closed while a thread is in it: whoever leaves does not wait for that.
            if coming is None or coming.done():
                _close(threads, close)
            else:
                coming.add_done_callback(lambda _: _close(threads, close))


def _close(threads: _Threads, close: Callable[[], object]) -> None:
    """Close a generator where its connection may be waited for; of a closed client none is left."""
    try:
        threads.begin(close, stops=True)
    except ClientClosed:
        close()


class AsyncBatches(_InThreads[Batches]):
    """`Batches`, awaited."""

    submit = _Called(Batches.submit)
    run = _Called(Batches.run)  # type: ignore[arg-type]  # its options have no names
    list = _Called(Batches.list)
    get = _Called(Batches.get)
    cancel = _Called(Batches.cancel, stops=True)
    wait = _Called(Batches.wait)
    lines = _Streamed(Batches.lines)
    outcomes = _Streamed(Batches.outcomes)
    summaries = _Streamed(Batches.summaries)
    watch = _Streamed(Batches.watch)
    table = _Called(Batches.table)
    save = _Called(Batches.save)


class AsyncSharedSession(_InThreads[SharedSession]):
    """`SharedSession`, awaited."""

    get = _Called(SharedSession.get)
    open = _Called(SharedSession.open)
    fork = _Called(SharedSession.fork)
    add = _Called(SharedSession.add)
    export = _Called(SharedSession.export)
    watch = _Streamed(SharedSession.watch)


class AsyncSessions(_InThreads[Sessions]):
    """`Sessions`, awaited."""

    create = _Called(Sessions.create)
    save = _Called(Sessions.save)
    add = _Called(Sessions.add)
    get = _Called(Sessions.get)
    open = _Called(Sessions.open)
    revisions = _Called(Sessions.revisions)
    revision = _Called(Sessions.revision)
    rename = _Called(Sessions.rename)
    pin = _Called(Sessions.pin)
    fork = _Called(Sessions.fork)
    delete = _Called(Sessions.delete)
    difference = _Called(Sessions.difference)
    export = _Called(Sessions.export)
    import_file = _Called(Sessions.import_file)
    watch = _Streamed(Sessions.watch)
    share = _Called(Sessions.share)
    shares = _Called(Sessions.shares)
    revoke = _Called(Sessions.revoke)
    list = _Streamed(Sessions.list)

    async def shared(self, token: str) -> AsyncSharedSession:
        """What a link leads to."""
        return AsyncSharedSession(self.plain.shared(token), self.threads)


class _Closes(Protocol):
    def close(self) -> None: ...


class _Opened(_InThreads[Closed]):
    """What is closed in the end, with its threads."""

    async def close(self) -> None:
        """Close the connections. What still waits ends with `Unreachable`, what is asked later with `ClientClosed`."""
        await asyncio.to_thread(self.plain.close)
        self.threads.shut_down()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()


class AsyncAccess(_Opened[Access]):
    """`Access`, awaited. Use it as an asynchronous context manager, or `close` it."""

    def __init__(
        self,
        base_url: str | None = None,
        *,
        timeout_seconds: float | None = None,
        patience_seconds: float | None = None,
        api_key: str | None = None,
    ) -> None:
        """Make one; nothing is sent yet. Arguments and errors are `Access`'s."""
        access = Access(
            base_url,
            timeout_seconds=timeout_seconds,
            patience_seconds=patience_seconds,
            api_key=api_key,
        )
        super().__init__(access, _Threads())

    create = _Called(Access.create)
    keys = _Called(Access.keys)
    revoke = _Called(Access.revoke)
    usage = _Called(Access.usage)
    users = _Called(Access.users)
    set_limits = _Called(Access.set_limits)
    audit = _Streamed(Access.audit)


class AsyncClient(_Opened[Client]):
    """A `Client` whose methods are awaited. Use it as an asynchronous context manager, or `close` it.

        async with AsyncClient() as mri:
            scans = await asyncio.gather(*(mri.scan_activation(prompt) for prompt in prompts))

    What comes one by one, as from `watch` and `sessions.list`, is for `async for`. Results are plain `Result` objects.
    """

    def __init__(
        self,
        base_url: str | None = None,
        *,
        timeout_seconds: float | None = None,
        patience_seconds: float | None = None,
        headers: Mapping[str, str] | None = None,
        api_key: str | None = None,
    ) -> None:
        """Make a client; nothing is sent yet. Arguments and errors are `Client`'s."""
        client = Client(
            base_url,
            timeout_seconds=timeout_seconds,
            patience_seconds=patience_seconds,
            headers=headers,
            api_key=api_key,
        )
        super().__init__(client, _Threads())

    @property
    def batches(self) -> AsyncBatches:
        """Many scans in one request."""
        return AsyncBatches(self.plain.batches, self.threads)

    @property
    def sessions(self) -> AsyncSessions:
        """Scans kept together, opened again, compared and shared."""
        return AsyncSessions(self.plain.sessions, self.threads)

    @property
    def base_url(self) -> str:
        """Where the service is."""
        return self.plain.base_url

    health = _Called(Client.health)
    cluster = _Called(Client.cluster)
    usage = _Called(Client.usage)
    models = _Called(Client.models)
    model = _Called(Client.model)
    load = _Called(Client.load)
    unload = _Called(Client.unload)
    tokenize = _Called(Client.tokenize)
    scan_structural = _Called(Client.scan_structural)
    scan_activation = _Called(Client.scan_activation)
    scan_attention = _Called(Client.scan_attention)
    scan_weights = _Called(Client.scan_weights)
    scan_circuits = _Called(Client.scan_circuits)
    scan_anomaly = _Called(Client.scan_anomaly)
    perturb = _Called(Client.perturb)
    patching = _Called(Client.patching)
    trace = _Called(Client.trace)
    calibrate = _Called(Client.calibrate)
    run = _Called(Client.run)
    diagnose = _Called(Client.diagnose)
    submit = _Called(Client.submit)
    job = _Called(Client.job)
    jobs = _Called(Client.jobs)
    cancel = _Called(Client.cancel, stops=True)
    delete = _Called(Client.delete)
    watch = _Streamed(Client.watch)
    watch_many = _Streamed(Client.watch_many)
    wait = _Called(Client.wait)
    result = _Called(Client.result)
