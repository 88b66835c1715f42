"""Following a job's events to its end, through broken connections and restarts of the service."""

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import closing
from http import HTTPStatus
from types import MappingProxyType
from typing import NamedTuple, get_args
from uuid import UUID

import msgspec

from neural_mri.client.errors import (
    NotUnderstood,
    Refused,
    Unreachable,
    ended_without_result,
)
from neural_mri.client.exchange import QUIET_SECONDS, Exchange, require
from neural_mri.client.patience import Patience
from neural_mri.client.sse import Message, Parser
from neural_mri.contract.events import Ended, Event, decode_event, encode_event, event_name
from neural_mri.contract.jobs import TERMINAL, JobState, JobView

__all__ = ("MOST_TOGETHER", "JobEvent", "follow", "follow_many", "messages", "wait_for")

MOST_TOGETHER = 32
"""Jobs that one stream tells of."""

NO_HEADERS: Mapping[str, str] = MappingProxyType({})
EVENT_STREAM = "text/event-stream"
STREAM_HEADERS: Mapping[str, str] = MappingProxyType(
    {"Accept": EVENT_STREAM, "Cache-Control": "no-store"}
)

_MOST_BARREN = 3
"""After so many connections in a row without a message, the job itself is asked how it stands."""

_KNOWN = frozenset(kind.__struct_config__.tag for kind in get_args(Event))


def follow(exchange: Exchange, job_id: UUID) -> Iterator[Event]:
    """A job's events from its first to `Ended`, each once.

    A broken connection is opened again after the last event received. Raises `Unreachable` when the
    service has not been heard for `exchange.patience_seconds`, and `Refused` when it will not show the job.
    """
    patience = exchange.patience()
    last_id, barren = "", 0
    while True:
        source = _last_word if barren == _MOST_BARREN else _messages
        barren = (barren + 1) % (_MOST_BARREN + 1)
        try:
            with closing(source(exchange, job_id, last_id, patience)) as messages:
                for message in messages:
                    last_id, barren = message.id, 0
                    if message.event not in _KNOWN:
                        continue  # of a newer service: nothing we could show
                    event = _event(message)
                    yield event
                    if isinstance(event, Ended):
                        return
        except (Unreachable, Refused) as error:
            patience.bear(error)
        else:
            patience.rest()


class JobEvent(NamedTuple):
    """An event of one of several jobs."""

    job: UUID
    event: Event


class _Whose(msgspec.Struct):
    job: UUID


def follow_many(exchange: Exchange, job_ids: Iterable[UUID]) -> Iterator[JobEvent]:
    """The events of several jobs as they come, on one stream, until each has `Ended`.

    Raises as `follow` does, and `ValueError` for more jobs than one stream carries.
    """
    left = list(dict.fromkeys(job_ids))
    if len(left) > MOST_TOGETHER:
        raise ValueError(f"{len(left)} jobs are too many: one stream tells of {MOST_TOGETHER}")
    return _follow_together(exchange, left)


def _follow_together(exchange: Exchange, left: list[UUID]) -> Iterator[JobEvent]:
    if not left:
        return
    query: dict[str, str] = {}

    def ask_for_those_left() -> None:
        query["jobs"] = ",".join(map(str, left))

    ask_for_those_left()
    for message in messages(exchange, "/api/events", query=query):
        if message.event not in _KNOWN:
            continue  # of a newer service: nothing we could show
        event = _event(message)
        job_id = msgspec.json.decode(message.data, type=_Whose).job
        if job_id not in left:
            continue  # a service that has lost where we were tells of ends once more
        yield JobEvent(job_id, event)
        if isinstance(event, Ended):
            left.remove(job_id)
            if not left:
                return
            ask_for_those_left()  # after a break: one that has ended may have been deleted
    for job_id in left:
        # The service holds that we have heard of each end, and has told us of these before a break.
        job = exchange.ask(JobView, "GET", f"/api/jobs/{job_id}")
        yield JobEvent(job_id, _end_of(job))


def messages(
    exchange: Exchange,
    path: str,
    *,
    headers: Mapping[str, str] = NO_HEADERS,
    query: Mapping[str, str] | None = None,
) -> Iterator[Message]:
    """The messages of any stream, through broken connections, until the service says that it has ended.

    Each connection asks with the query as it is by then. Raises as `follow` does, and `NotUnderstood` where the answer
    is no stream of events.
    """
    patience = exchange.patience()
    last_id = ""
    while True:
        resuming = {**STREAM_HEADERS, **headers}
        if last_id:
            resuming["Last-Event-ID"] = last_id
        parser = Parser(last_id)
        try:
            with exchange.stream(
                path, headers=resuming, quiet_seconds=QUIET_SECONDS, query=query
            ) as response:
                if response.status_code == HTTPStatus.NO_CONTENT:
                    return
                require(response, EVENT_STREAM, "a stream of events")
                for chunk in response.iter_bytes():
                    for message in parser.feed(chunk):
                        patience.got_on()
                        last_id = message.id
                        yield message
                    patience.heard(parser.retry_seconds)
        except (Unreachable, Refused) as error:
            patience.bear(error)
        else:
            patience.rest()


def wait_for(
    exchange: Exchange, job: JobView, on_event: Callable[[Event], None] | None = None
) -> JobView:
    """The job once it has succeeded, each event on the way given to `on_event`.

    Raises `JobFailed` or `JobCancelled` when it ended otherwise, and what `follow` raises.
    """
    if job.state not in TERMINAL:
        for event in follow(exchange, job.id):
            if on_event is not None:
                on_event(event)
        job = exchange.ask(JobView, "GET", f"/api/jobs/{job.id}")
    if job.state is not JobState.SUCCEEDED:
        raise ended_without_result(job)
    return job


def _messages(
    exchange: Exchange, job_id: UUID, last_id: str, patience: Patience
) -> Generator[Message, None, None]:
    """The messages of one connection."""
    headers = dict(STREAM_HEADERS)
    if last_id:
        headers["Last-Event-ID"] = last_id
    parser = Parser(last_id)
    path = f"/api/jobs/{job_id}/events"
    with exchange.stream(path, headers=headers, quiet_seconds=QUIET_SECONDS) as response:
        if response.status_code == HTTPStatus.NO_CONTENT:
            yield from _last_word(exchange, job_id, last_id, patience)
            return
        require(response, EVENT_STREAM, "a stream of events")
        for chunk in response.iter_bytes():
            for message in parser.feed(chunk):
                patience.got_on()
                yield message
            patience.heard(parser.retry_seconds)


def _last_word(
    exchange: Exchange, job_id: UUID, last_id: str, patience: Patience
) -> Generator[Message, None, None]:
    """The `ended` of a job whose stream no longer brings it; nothing while the job goes on."""
    job = exchange.ask(JobView, "GET", f"/api/jobs/{job_id}")
    patience.heard()
    if job.state in TERMINAL:
        ended = _end_of(job)
        yield Message(event_name(ended), encode_event(ended).decode(), last_id)


def _end_of(job: JobView) -> Ended:
    return Ended(
        state=job.state,
        attempt=job.attempt,
        cached=job.cached,
        result=job.links.get("result"),
        problem=job.problem,
    )


def _event(message: Message) -> Event:
    try:
        return decode_event(message.data)
    except msgspec.DecodeError as error:
        raise NotUnderstood(
            f"the event stream holds a `{message.event}` event that this version cannot read: {error}"
        ) from error
