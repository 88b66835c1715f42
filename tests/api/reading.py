"""Event streams as a reader meets them."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import httpx
import msgspec

__all__ = ("Message", "follow", "read_all")


class Message(NamedTuple):
    """One event."""

    id: str
    name: str
    data: dict[str, Any]


class Stream:
    """A connection, event by event. `comments` counts heartbeats; `retry` is what the server wished."""

    def __init__(self, response: httpx.Response) -> None:
        self.response = response
        self.comments = 0
        self.retry: int | None = None
        self._messages = self._read()

    def __iter__(self) -> Iterator[Message]:
        return self._messages

    def __next__(self) -> Message:
        return next(self._messages)

    def _read(self) -> Iterator[Message]:
        fields: dict[str, str] = {}
        for line in self.response.iter_lines():
            if line.startswith(":"):
                self.comments += 1
            elif line.startswith("retry:"):
                self.retry = int(line.removeprefix("retry:"))
            elif line:
                name, _, value = line.partition(": ")
                fields[name] = value
            elif fields:
                data = msgspec.json.decode(fields["data"])
                yield Message(fields["id"], fields["event"], data)
                fields = {}


@contextmanager
def follow(api: httpx.Client, path: str, last_id: str | None = None) -> Iterator[Stream]:
    """A stream that is cut when the block ends."""
    headers = {} if last_id is None else {"last-event-id": last_id}
    with api.stream("GET", path, headers=headers) as response:
        assert response.status_code == 200, response.read()
        yield Stream(response)


def read_all(api: httpx.Client, path: str, last_id: str | None = None) -> list[Message]:
    """A stream to its end."""
    with follow(api, path, last_id) as stream:
        return list(stream)
