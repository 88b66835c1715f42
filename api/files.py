"""Bytes by range: a stored file as an answer (RFC 9110, sections 13 and 14).

One range a request: a reader of one attention head asks for the head's bytes alone. Several ranges at
once are answered with the whole, as the RFC allows.
"""

import asyncio
import os
import re
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from litestar.types import Receive, Scope, Send

from api.cancellation import cancelled
from neural_mri.contract.problems import Gone

__all__ = (
    "Extent",
    "FilePart",
    "Payload",
    "Remote",
    "Unsatisfiable",
    "extent",
    "header",
    "is_known",
)

CHUNK_BYTES = 256 * 1024

_RANGE = re.compile(r"bytes=(\d{0,18})-(\d{0,18})")


class Unsatisfiable(Exception):
    """The file has no such bytes."""


class Extent(NamedTuple):
    """Bytes `start` up to `end` of a file."""

    start: int
    end: int


class FilePart(NamedTuple):
    """Bytes of a larger file, which are answered with as if they were one of their own."""

    file: Path
    start: int
    end: int


Remote = Callable[[Extent | None], Awaitable[bytes]]
"""Fetches bytes that are on another machine: a part of them, or the whole. Raises `Gone`."""


def extent(text: str | None, size: int) -> Extent | None:
    """The bytes that a Range header asks for, of a file of `size` bytes.

    None where it asks for the whole, or for what is not served by range. Raises `Unsatisfiable`.
    """
    match = _RANGE.fullmatch(text or "")
    if match is None:
        return None
    first, last = match.groups()
    if not first and not last:
        return None
    if not first:
        part = Extent(max(0, size - int(last)), size)
    elif last and int(last) < int(first):
        return None
    else:
        part = Extent(int(first), min(int(last) + 1, size) if last else size)
    if part.start >= part.end:
        raise Unsatisfiable
    return part


class Payload:
    """A file, a part of one, or bytes, here or elsewhere, with a validator: answers GET, conditions and ranges.

    An ASGI application.
    """

    def __init__(
        self,
        source: Path | FilePart | bytes | Remote,
        *,
        size: int,
        etag: str,
        media_type: str,
        cache_control: str,
        headers: dict[str, str] | None = None,
    ) -> None:
        self._source = source
        self._size = size
        self._etag = f'"{etag}"'
        self._headers = {
            "content-type": media_type,
            "etag": self._etag,
            "cache-control": cache_control,
            "accept-ranges": "bytes",
            **(headers or {}),
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if is_known(header(scope, b"if-none-match"), self._etag):
            await self._start(send, 304)
            await _end(send)
            return
        condition = header(scope, b"if-range")
        try:
            part = (
                extent(header(scope, b"range"), self._size)
                if condition in (None, self._etag)
                else None
            )
        except Unsatisfiable:
            await self._start(send, 416, {"content-range": f"bytes */{self._size}"})
            await _end(send)
            return
        served = part or Extent(0, self._size)
        length = {"content-length": str(served.end - served.start)}
        source: Path | bytes
        if isinstance(self._source, FilePart):
            source, origin = self._source.file, -self._source.start
        elif isinstance(self._source, Path | bytes):
            source, origin = self._source, 0
        else:
            # Before the answer begins: what cannot be fetched is refused, not broken off.
            source = b"" if scope.get("head_only") else await self._source(part)
            origin = served.start
        with _opened(source, origin) as read:
            if part is None:
                await self._start(send, 200, length)
            else:
                place = f"bytes {part.start}-{part.end - 1}/{self._size}"
                await self._start(send, 206, {**length, "content-range": place})
            if scope.get("head_only"):
                await _end(send)
            else:
                await _send_body(read, served, receive, send)

    async def _start(self, send: Send, status: int, extra: dict[str, str] | None = None) -> None:
        headers = {**self._headers, **(extra or {})}
        await send(
            {
                "type": "http.response.start",
                "status": status,
                "headers": [(name.encode(), value.encode()) for name, value in headers.items()],
            }
        )


Read = Callable[[int, int], bytes]
"""Gives so many bytes from a place on; fewer at the end."""


@contextmanager
def _opened(source: Path | bytes, origin: int) -> Iterator[Read]:
    """A source to read from, whose first byte is number `origin`. Raises `Gone` when it is not there."""
    if isinstance(source, bytes):
        body = memoryview(source)
        yield lambda length, start: bytes(body[start - origin : start - origin + length])
        return
    try:
        file = os.open(source, os.O_RDONLY | os.O_NOFOLLOW)
    except FileNotFoundError as error:
        raise Gone(f"{source.name} was here a moment ago") from error
    try:
        yield lambda length, start: os.pread(file, length, start - origin)
    finally:
        os.close(file)


async def _send_body(read: Read, part: Extent, receive: Receive, send: Send) -> None:
    size = part.end - part.start
    if size <= CHUNK_BYTES:
        # Most likely in memory already: not worth a thread.
        body = read(size, part.start)
        await send({"type": "http.response.body", "body": body, "more_body": False})
        return
    gone = asyncio.create_task(_disconnected(receive))
    try:
        at = part.start
        while at < part.end and not gone.done():
            body = await asyncio.to_thread(read, min(CHUNK_BYTES, part.end - at), at)
            if not body:
                raise OSError(f"a file ended at byte {at}, {part.end} were expected")
            at += len(body)
            await send({"type": "http.response.body", "body": body, "more_body": at < part.end})
    finally:
        await cancelled(gone)


async def _end(send: Send) -> None:
    await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def is_known(condition: str | None, etag: str) -> bool:
    """Whether If-None-Match names this tag: the reader has these very bytes."""
    tags = {tag.strip().removeprefix("W/") for tag in (condition or "").split(",")}
    return "*" in tags or etag in tags


def header(scope: Scope, name: bytes) -> str | None:
    """A request header's value; its name in small letters."""
    raw: Any = scope["headers"]
    return next((value.decode("latin-1") for key, value in raw if key.lower() == name), None)
