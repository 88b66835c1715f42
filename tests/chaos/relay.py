"""A wire between two parties of the service that can go bad in ways of its own.

    python -m tests.chaos.relay ADDRESS PORT TARGET

Forwards connections to the target, a port at the same address or a socket's path. A line on its input, a word of `WAYS` and
seconds, has it misbehave for so long. It ends with its input.
"""

import asyncio
import os
import random
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Self

__all__ = ("WAYS", "Relay")

WAYS = ("stall", "lose", "cut", "refuse", "fail")
"""Nothing comes through, and all of it afterwards; what is connected is forgotten by whatever lay between, and nobody
is told, while who connects meanwhile is kept waiting likewise; answers break off; nobody gets through; whoever asks
is answered with the HTTP status 500."""

THROUGH = ""
MOST = 1 << 16
LONGEST_HALF = 2000
"""Bytes of an answer that come through before it breaks off."""
FORGOTTEN_SECONDS = 75.0
"""When the target gives up somebody who has been forgotten, as a server's keepalives would."""
SORRY = b"HTTP/1.1 500 Internal Server Error\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
ROOT = Path(__file__).parents[2]


class _Link:
    """One connection, both ways."""

    def __init__(self, asking: asyncio.StreamWriter, answering: asyncio.StreamWriter) -> None:
        self.asking = asking
        self.answering = answering
        self.is_lost = False
        self.left: int | None = None
        """Bytes of answers that still come through; None for all."""

    def lose(self) -> None:
        """Be forgotten: whatever comes is dropped, and nobody hears of it until the target gives up."""
        self.is_lost = True
        loop = asyncio.get_running_loop()
        loop.call_later(FORGOTTEN_SECONDS, self.answering.transport.abort)

    def close(self) -> None:
        for writer in (self.asking, self.answering):
            with suppress(OSError, RuntimeError):
                writer.transport.abort()


class _Wire:
    """All connections to one target."""

    def __init__(self, address: str, target: str) -> None:
        self._address, self._target = address, target
        self._links: set[_Link] = set()
        self._way = THROUGH
        self._ended = asyncio.Event()
        self._ended.set()

    async def misbehave(self, way: str, seconds: float) -> None:
        self._way = way
        self._ended.clear()
        if way == "lose":
            for link in self._links:
                link.lose()
        await asyncio.sleep(seconds)
        for link in self._links:
            link.left = None
        self._way = THROUGH
        self._ended.set()

    async def connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._way == "refuse":
            writer.transport.abort()
            return
        try:
            answers, answering = await self._reached()
        except OSError:
            writer.transport.abort()
            return
        link = _Link(writer, answering)
        if self._way == "lose":
            link.lose()
        self._links.add(link)
        try:
            async with asyncio.TaskGroup() as both:
                both.create_task(self._questions(link, reader))
                both.create_task(self._answers(link, answers))
        except* OSError:
            pass
        self._links.discard(link)
        link.close()

    async def _reached(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        if self._target.isdecimal():
            return await asyncio.open_connection(self._address, int(self._target))
        return await asyncio.open_unix_connection(self._target)

    async def _questions(self, link: _Link, reader: asyncio.StreamReader) -> None:
        while data := await reader.read(MOST):
            if self._way == "stall":
                await self._ended.wait()
            if link.is_lost:
                continue
            if self._way == "fail":
                link.asking.write(SORRY)
                await link.asking.drain()
                link.asking.close()
                break
            link.answering.write(data)
            await link.answering.drain()
        if not link.is_lost:
            link.answering.close()

    async def _answers(self, link: _Link, reader: asyncio.StreamReader) -> None:
        while data := await reader.read(MOST):
            if self._way == "stall":
                await self._ended.wait()
            if link.is_lost:
                continue
            if self._way in ("cut", "refuse") and link.left is None:
                # Whoever was connected is sent away when it next hears anything: no question is half asked.
                link.left = random.randrange(LONGEST_HALF) if self._way == "cut" else 0
            if link.left is not None and link.left < len(data):
                link.asking.write(data[: link.left])
                with suppress(OSError):
                    await link.asking.drain()
                link.close()
                return
            if link.left is not None:
                link.left -= len(data)
            link.asking.write(data)
            await link.asking.drain()
        if not link.is_lost:
            link.asking.close()


async def _serve(address: str, port: int, target: str) -> None:
    wire = _Wire(address, target)
    server = await asyncio.start_server(wire.connect, address, port)
    loop = asyncio.get_running_loop()
    orders = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(orders), sys.stdin)
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    async with server:
        while order := await orders.readline():
            way, seconds = order.decode().split()
            await wire.misbehave(way, float(seconds))
    os._exit(0)  # at once: with everything that is connected


class Relay:
    """The process, and what it can be told."""

    def __init__(self, address: str, port: int, target: int | Path) -> None:
        self.address, self.port = address, port
        self._target = target
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Forward from now on."""
        command = [sys.executable, "-m", "tests.chaos.relay"]
        command += [self.address, str(self.port), str(self._target)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT
        )
        assert self._process.stdout is not None
        if self._process.stdout.readline() != b"ready\n":
            raise RuntimeError("the relay did not start")

    def misbehave(self, way: str, seconds: float) -> None:
        """Go bad for so long."""
        assert way in WAYS
        assert self._process is not None
        assert self._process.stdin is not None
        self._process.stdin.write(f"{way} {seconds:.3f}\n".encode())
        self._process.stdin.flush()
        time.sleep(seconds)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def stop(self) -> None:
        """End, and every connection with it."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            for pipe in (self._process.stdin, self._process.stdout):
                if pipe is not None:
                    pipe.close()
            self._process = None


if __name__ == "__main__":
    asyncio.run(_serve(sys.argv[1], int(sys.argv[2]), sys.argv[3]))
