"""Requests byte by byte: what no client would send."""

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from tests.security.guarded import Guarded

__all__ = ("Reply", "connected", "replies", "sent")


class Reply(NamedTuple):
    """One answer."""

    status: int
    headers: dict[str, str]
    body: bytes


@contextmanager
def connected(service: Guarded, *, timeout: float = 10.0) -> Iterator[socket.socket]:
    """A connection of one's own."""
    with socket.create_connection(service.address, timeout=timeout) as connection:
        yield connection


def sent(service: Guarded, request: bytes) -> list[Reply]:
    """All answers to what was sent over a connection of its own, until it was closed, or silent."""
    with connected(service) as connection:
        connection.sendall(request)
        return replies(connection)


def replies(connection: socket.socket) -> list[Reply]:
    """What comes until the connection is closed, or nothing more comes."""
    came = b""
    try:
        while part := connection.recv(65536):
            came += part
    except (TimeoutError, ConnectionResetError):
        pass
    found = []
    while came:
        head, _, rest = came.partition(b"\r\n\r\n")
        line, *lines = head.split(b"\r\n")
        assert line.startswith(b"HTTP/1.1 "), came
        headers = {}
        for each in lines:
            name, _, value = each.decode("latin-1").partition(": ")
            headers[name.lower()] = value
        if headers.get("transfer-encoding") == "chunked":
            body, came = _unchunked(rest)
        else:
            size = int(headers.get("content-length", 0))
            body, came = rest[:size], rest[size:]
        found.append(Reply(int(line.split()[1]), headers, body))
    return found


def _unchunked(rest: bytes) -> tuple[bytes, bytes]:
    body = b""
    while True:
        size, _, rest = rest.partition(b"\r\n")
        length = int(size or b"0", 16)
        body, rest = body + rest[:length], rest[length + 2 :]
        if not length:
            return body, rest
