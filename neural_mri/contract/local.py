"""What a process that scans one checkpoint is asked, and what it answers: messages over two pipes.

Each message is four bytes of length, big-endian, and as many bytes of MessagePack.
"""

from typing import Any, BinaryIO, TypeAlias, TypeVar

import msgspec

from neural_mri.contract.baselines import Subject
from neural_mri.contract.problems import ProblemDocument
from neural_mri.contract.tokens import Tokens

__all__ = (
    "Answer",
    "Ask",
    "Describe",
    "Failure",
    "Measured",
    "Prepare",
    "Scan",
    "Tokenize",
    "Tokenized",
    "Which",
    "read_message",
    "write_message",
)


class Which(msgspec.Struct, frozen=True, kw_only=True, tag="subject"):
    """Which checkpoint is it?"""


class Tokenize(msgspec.Struct, frozen=True, kw_only=True, tag="tokenize"):
    """What are the tokens of these texts?"""

    texts: tuple[str, ...]


class Scan(msgspec.Struct, frozen=True, kw_only=True, tag="scan"):
    """What does this scan measure?"""

    scan: bytes
    """As `encode_scan` writes it."""


class Prepare(msgspec.Struct, frozen=True, kw_only=True, tag="prepare"):
    """Be ready to scan; answered once the checkpoint is in memory."""


Ask: TypeAlias = Which | Tokenize | Prepare | Scan


class Describe(msgspec.Struct, frozen=True, kw_only=True, tag="subject"):
    """The checkpoint."""

    subject: Subject


class Tokenized(msgspec.Struct, frozen=True, kw_only=True, tag="tokens"):
    """The tokens, in the order of the texts."""

    tokens: tuple[Tokens, ...]


class Measured(msgspec.Struct, frozen=True, kw_only=True, tag="measured"):
    """A scan's tables."""

    scan_key: str
    tables: dict[str, bytes]
    """Arrow files by name."""


class Failure(msgspec.Struct, frozen=True, kw_only=True, tag="failure"):
    """It could not be done."""

    problem: ProblemDocument


Answer: TypeAlias = Describe | Tokenized | Measured | Failure

T = TypeVar("T")

_LENGTH = 4


def write_message(pipe: BinaryIO, message: Any) -> None:
    """Send one message."""
    body = msgspec.msgpack.encode(message)
    pipe.write(len(body).to_bytes(_LENGTH, "big") + body)
    pipe.flush()


def read_message(pipe: BinaryIO, kind: type[T] | Any) -> T | Any | None:
    """The next message; None where the pipe has ended, in the middle of one or before it."""
    length = pipe.read(_LENGTH)
    if len(length) < _LENGTH:
        return None
    size = int.from_bytes(length, "big")
    body = pipe.read(size)
    return None if len(body) < size else msgspec.msgpack.decode(body, type=kind)
