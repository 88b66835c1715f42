"""Bytes by range: a stored file as an answer (RFC 9110, sections 13 and 14).

One range a request: a reader of one attention head asks for the head's bytes alone. Several ranges at
once are answered with the whole, as the RFC allows.
"""

import asyncio
import os
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import structlog
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
STALL_SECONDS = 30.0
"""A reader that takes no further chunk for so long is cut."""

log = structlog.get_logger(__name__)

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


class Remote(Protocol):
    """Bytes that are on another machine, fetched in pieces of its own size."""

    async def first(self, part: Extent | None) -> bytes:
        """The first piece of a part; of the whole, once that is seen to be what was written. Raises `Gone`."""

    async def piece(self, part: Extent) -> bytes:
        """A later piece, all of it. Raises `Gone`."""


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
        is_head = bool(scope.get("head_only"))
        async with _opened(self._source, part, served, is_head=is_head) as pieces:
            if part is None:
                await self._start(send, 200, length)
            else:
                place = f"bytes {part.start}-{part.end - 1}/{self._size}"
                await self._start(send, 206, {**length, "content-range": place})
            if is_head:
                await _end(send)
            else:
                await _send_body(pieces, served.end - served.start, receive, send)

    async def _start(self, send: Send, status: int, extra: dict[str, str] | None = None) -> None:
        headers = {**self._headers, **(extra or {})}
        await send(
            {
                "type": "http.response.start",
                "status": status,
                "headers": [(name.encode(), value.encode()) for name, value in headers.items()],
            }
        )


@asynccontextmanager
async def _opened(
    source: Path | FilePart | bytes | Remote, part: Extent | None, served: Extent, *, is_head: bool
) -> AsyncIterator[AsyncIterator[bytes]]:
    """What is served of a source, piece by piece. Raises `Gone` when it is not there.

    Before the answer begins: what cannot be had is refused, not broken off.
    """
    match source:
        case bytes():
            yield _at_once(source[served.start : served.end])
            return
        case FilePart(file=path, start=origin):
            pass
        case Path() as path:
            origin = 0
        case remote:
            yield _fetched(remote, served, b"" if is_head else await remote.first(part))
            return
    try:
        file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    except FileNotFoundError as error:
        raise Gone(f"{path.name} was here a moment ago") from error
    try:
        yield _read(file, Extent(origin + served.start, origin + served.end))
    finally:
        os.close(file)


async def _at_once(body: bytes) -> AsyncIterator[bytes]:
    yield body


async def _fetched(source: Remote, served: Extent, first: bytes) -> AsyncIterator[bytes]:
    """Pieces as large as the first."""
    yield first
    at, at_once = served.start + len(first), len(first)
    while at < served.end:
        yield await source.piece(Extent(at, min(served.end, at + at_once)))
        at += at_once


async def _read(file: int, part: Extent) -> AsyncIterator[bytes]:
    # One that is small is most likely in memory already: not worth a thread.
    is_small = part.end - part.start <= CHUNK_BYTES
    at = part.start
    while at < part.end:
        wanted = (file, min(CHUNK_BYTES, part.end - at), at)
        body = os.pread(*wanted) if is_small else await asyncio.to_thread(os.pread, *wanted)
        if not body:
            raise OSError(f"a file ended at byte {at}, {part.end} were expected")
        at += len(body)
        yield body


async def _send_body(pieces: AsyncIterator[bytes], size: int, receive: Receive, send: Send) -> None:
    """Send so many bytes; a reader that takes nothing for long is cut, and may go on by a range."""
    gone = None if size <= CHUNK_BYTES else asyncio.create_task(_disconnected(receive))
    left = size
    try:
        async for piece in pieces:
            for at in range(0, max(1, len(piece)), CHUNK_BYTES):
                if gone is not None and gone.done():
                    return
                body = piece[at : at + CHUNK_BYTES]
                left -= len(body)
                try:
                    async with asyncio.timeout(STALL_SECONDS):
                        await send(
                            {"type": "http.response.body", "body": body, "more_body": left > 0}
                        )
                except TimeoutError:
                    log.info("reader_cut", seconds=STALL_SECONDS)
                    return
    finally:
        if gone is not None:
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
