"""Server-sent events, from bytes to messages, as the WHATWG HTML standard section 9.2.6 reads them.

No I/O: feed it what arrived, in whatever pieces, and take the messages that are complete. A message cut
off before its blank line is none, and does not move the last event id: a client that resumes from the id
of its last message gets every message once.
"""

import re
from collections.abc import Iterator
from typing import NamedTuple

__all__ = ("Message", "Parser")

_LINE_END = re.compile(rb"\r\n|\r|\n")
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class Message(NamedTuple):
    """One dispatched event."""

    event: str
    data: str
    id: str
    """The last event id as of this message: its own, or an earlier message's."""


class Parser:
    """Reads one stream. After a reconnect, make another with `last_id` of the one before."""

    def __init__(self, last_id: str = "") -> None:
        self.retry_seconds: float | None = None
        """The pause the server asks for before a reconnect, once it has."""
        self._id = last_id
        self._event = ""
        self._data: list[str] = []
        self._pending = bytearray()
        self._searched = 0
        self._after_cr = False
        self._at_start = True

    def feed(self, chunk: bytes) -> Iterator[Message]:
        """The messages that `chunk` completes."""
        self._pending += chunk
        for line in self._lines():
            if line:
                self._field(line)
            elif (message := self._dispatch()) is not None:
                yield message

    def _lines(self) -> Iterator[str]:
        if self._at_start:
            if len(self._pending) < len(_BYTE_ORDER_MARK) and _BYTE_ORDER_MARK.startswith(
                self._pending
            ):
                return  # it may yet become a byte order mark
            self._at_start = False
            if self._pending.startswith(_BYTE_ORDER_MARK):
                del self._pending[: len(_BYTE_ORDER_MARK)]
        if self._after_cr and self._pending:
            # The CR that ended the last line was the first half of a CRLF.
            if self._pending.startswith(b"\n"):
                del self._pending[0]
            self._after_cr = False
        while match := _LINE_END.search(self._pending, self._searched):
            line = self._pending[: match.start()].decode(errors="replace")
            self._after_cr = match[0] == b"\r" and match.end() == len(self._pending)
            del self._pending[: match.end()]
            self._searched = 0
            yield line
        self._searched = len(self._pending)

    def _field(self, line: str) -> None:
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        match name:
            case "data":
                self._data.append(value)
            case "event":
                self._event = value
            case "id" if "\0" not in value:
                self._id = value
            case "retry" if value.isascii() and value.isdigit():
                self.retry_seconds = int(value) / 1000
            case _:
                pass  # comments, and fields the standard tells readers to ignore

    def _dispatch(self) -> Message | None:
        event, data = self._event, self._data
        self._event, self._data = "", []
        if not data:
            return None
        return Message(event or "message", "\n".join(data), self._id)
