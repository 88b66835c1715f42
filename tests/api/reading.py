"""Event streams as a reader meets them."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any, NamedTuple

import httpx
import msgspec
import pytest

from neural_mri.contract.problems import Unavailable

__all__ = ("Message", "Unanswered", "follow", "read_all")


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


class Unanswered:
    """A question to the database that is not answered so often, asked by the API beside the test."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, module: ModuleType, name: str, times: int = 2
    ) -> None:
        """Twice, since what is asked in passing is asked again in a thread at once."""
        self.left = times
        work = getattr(module, name)

        def asked(*given: Any, **named: Any) -> Any:
            if self.left:
                self.left -= 1
                raise Unavailable("the database does not answer now")
            return work(*given, **named)

        monkeypatch.setattr(module, name, asked)

    def passes(self) -> bool:
        """Whether it was asked for so often, within some seconds."""
        until = time.monotonic() + 10
        while self.left and time.monotonic() < until:
            time.sleep(0.02)
        return not self.left


def read_all(api: httpx.Client, path: str, last_id: str | None = None) -> list[Message]:
    """A stream to its end."""
    with follow(api, path, last_id) as stream:
        return list(stream)
