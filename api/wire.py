"""HTTP/1.1 as it arrives: how long a request may take to come, and how large its head may be.

uvicorn waits for ever for a request that has begun, and keeps whatever its head holds. A caller who sends a
byte now and then would hold a connection, and one who sends no end of a header all of the memory.
"""

import asyncio
from enum import Enum
from http import HTTPStatus
from typing import Any

import msgspec
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from neural_mri.contract.problems import MEDIA_TYPE

__all__ = ("BoundedProtocol",)

HEAD_SECONDS = 10.0
"""From a connection, or a request's first byte, to the end of its head."""
BODY_SECONDS = 20.0
"""For a body, and a second more for each `BODY_BYTES_PER_SECOND`."""
BODY_BYTES_PER_SECOND = 2_000
LARGEST_HEAD_BYTES = 65_536
LOOK_AGAIN_SECONDS = 1.0


class _Part(Enum):
    """What is being waited for."""

    HEAD = "head"
    BODY = "body"


class BoundedProtocol(HttpToolsProtocol):
    """One connection."""

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self._part = _Part.HEAD
        self._head_bytes = 0
        self._body_until = 0.0
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """Somebody has come, who should say something."""
        super().connection_made(transport)
        self._look_in(HEAD_SECONDS)

    def connection_lost(self, exc: Exception | None) -> None:
        """Somebody has gone."""
        self._rest()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Some of a request has come."""
        if self._part is _Part.HEAD:
            self._head_bytes += len(data)
        super().data_received(data)
        if self.transport.is_closing() or self._part is not _Part.HEAD:
            return
        if self._head_bytes > LARGEST_HEAD_BYTES:
            self._refuse(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, _TOO_LARGE)
        elif self._timer is None and self._head_bytes:
            self._look_in(HEAD_SECONDS)

    def on_message_begin(self) -> None:
        """A request begins."""
        super().on_message_begin()
        self._look_in(HEAD_SECONDS)

    def on_headers_complete(self) -> None:
        """Its head is there."""
        size = len(self.url) + sum(len(name) + len(value) for name, value in self.headers)
        if size > LARGEST_HEAD_BYTES:
            self._refuse(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, _TOO_LARGE)
            return
        self._part = _Part.BODY
        self._body_until = self.loop.time() + BODY_SECONDS
        super().on_headers_complete()
        self._look_in(BODY_SECONDS)

    def on_body(self, body: bytes) -> None:
        """Some of its body."""
        self._body_until += len(body) / BODY_BYTES_PER_SECOND
        if self.cycle is not None:
            super().on_body(body)

    def on_message_complete(self) -> None:
        """All of it."""
        self._rest()
        self._part, self._head_bytes = _Part.HEAD, 0
        if self.cycle is not None:
            super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        """What came is no HTTP."""
        self._refuse(HTTPStatus.BAD_REQUEST, msg)

    def _look_in(self, seconds: float) -> None:
        self._rest()
        self._timer = self.loop.call_later(seconds, self._look)

    def _rest(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _look(self) -> None:
        """Whether what is awaited is late, and by whose fault."""
        self._timer = None
        cycle: Any = self.cycle  # None before the first
        is_answering = cycle is not None and not cycle.response_complete
        if self._part is _Part.HEAD and is_answering:
            self._look_in(LOOK_AGAIN_SECONDS)  # of the next request something has come already
        elif self._part is _Part.BODY and self.flow.read_paused:
            self._look_in(LOOK_AGAIN_SECONDS)  # it is we who do not read
        elif self._part is _Part.BODY and (left := self._body_until - self.loop.time()) > 0:
            self._look_in(left)
        elif self._part is _Part.HEAD and not self._head_bytes:
            self.transport.close()  # nothing was asked
        else:
            self._refuse(
                HTTPStatus.REQUEST_TIMEOUT, f"the {self._part.value} of the request did not arrive"
            )

    def _refuse(self, status: HTTPStatus, detail: str) -> None:
        """Say why, if nothing else has been said yet, and end the connection."""
        if self.transport.is_closing():
            return
        cycle: Any = self.cycle
        if cycle is None or not cycle.response_started or cycle.response_complete:
            problem = {
                "type": "about:blank",
                "title": status.phrase,
                "status": status.value,
                "detail": detail,
            }
            body = msgspec.json.encode(problem)
            self.transport.write(
                b"%bcontent-type: %b\r\ncontent-length: %d\r\ncache-control: no-store\r\n"
                b"x-content-type-options: nosniff\r\nconnection: close\r\n\r\n%b"
                % (STATUS_LINE[status.value], MEDIA_TYPE.encode(), len(body), body)
            )
        self.transport.close()


_TOO_LARGE = f"the head of a request may have {LARGEST_HEAD_BYTES} bytes"
