"""One connection to the API that costs its caller little: the callers share the machine with what they measure."""

import asyncio
from collections.abc import Mapping
from types import TracebackType
from typing import Any, NamedTuple, Self

import msgspec

from neural_mri.backing.settings import Settings

__all__ = ("Answer", "Caller")


class Answer(NamedTuple):
    """What the API said."""

    status: int
    body: bytes

    def json(self) -> Any:
        """The body, decoded."""
        return msgspec.json.decode(self.body)


class Caller:
    """A user's kept connection. Use as a context manager."""

    def __init__(self, settings: Settings, key: str | None = None) -> None:
        self._settings = settings
        self._key = "" if key is None else f"authorization: Bearer {key}\r\n"

    async def __aenter__(self) -> Self:
        self._reader, self._writer = await asyncio.open_connection(
            self._settings.host, self._settings.port
        )
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self._writer.close()

    async def post(self, path: str, body: Mapping[str, Any], *, wait: int | None = None) -> Answer:
        """Send a request, and hold out for the job's end where `wait` says so."""
        prefer = "" if wait is None else f"prefer: wait={wait}\r\n"
        return await self.ask("POST", path, msgspec.json.encode(body), prefer)

    async def get(self, path: str) -> Answer:
        """Read something."""
        return await self.ask("GET", path)

    async def ask(self, method: str, path: str, body: bytes = b"", headers: str = "") -> Answer:
        """Send a request and read its answer."""
        kind = f"content-type: application/json\r\ncontent-length: {len(body)}\r\n" if body else ""
        head = f"{method} {path} HTTP/1.1\r\nhost: 127.0.0.1\r\n{self._key}{kind}{headers}\r\n"
        self._writer.write(head.encode() + body)
        answered = (await self._reader.readuntil(b"\r\n\r\n")).lower()
        status = int(answered[9:12])
        _, _, after = answered.partition(b"content-length:")
        length = int(after.partition(b"\r\n")[0]) if after else 0
        return Answer(status, await self._reader.readexactly(length))
