"""What a process that scans one checkpoint is asked, and what it answers: messages over two pipes.

Each message is four bytes of length, big-endian, and as many bytes of MessagePack. A process is started by
itself, or forked by one that has imported everything before: that one is sent `Open` over a socket, each
message a datagram, with the ends of two pipes for every process that is wanted.
"""

from typing import Any, BinaryIO, TypeAlias, TypeVar

import msgspec

from neural_mri.contract.baselines import Subject
from neural_mri.contract.problems import ProblemDocument
from neural_mri.contract.tokens import Tokens

__all__ = (
    "MOST_PROCESSES",
    "Answer",
    "Ask",
    "Describe",
    "Failure",
    "Measured",
    "Open",
    "Prepare",
    "Results",
    "Scans",
    "Tokenize",
    "Tokenized",
    "Which",
    "read_message",
    "write_message",
)

MOST_PROCESSES = 64
"""Of one checkpoint: two descriptors each go in one datagram, which takes 253 on Linux."""


class Which(msgspec.Struct, frozen=True, kw_only=True, tag="subject"):
    """Which checkpoint is it?"""


class Tokenize(msgspec.Struct, frozen=True, kw_only=True, tag="tokenize"):
    """What are the tokens of these texts?"""

    texts: tuple[str, ...]


class Scans(msgspec.Struct, frozen=True, kw_only=True, tag="scans"):
    """What do these scans measure? Those that can are done in one forward."""

    scans: tuple[bytes, ...]
    """As `encode_scan` writes them."""


class Prepare(msgspec.Struct, frozen=True, kw_only=True, tag="prepare"):
    """Be ready to scan; answered once the checkpoint is in memory."""


Ask: TypeAlias = Which | Tokenize | Prepare | Scans


class Open(msgspec.Struct, frozen=True, kw_only=True):
    """Fork processes that scan one checkpoint. Two descriptors come along for each: asks, then answers."""

    model: str
    """A folder, or the name of a registered model."""
    store: str
    """Where calibrations are kept for others to read."""
    threads: int


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


class Results(msgspec.Struct, frozen=True, kw_only=True, tag="results"):
    """What became of each scan, in their order."""

    results: tuple[Measured | Failure, ...]


Answer: TypeAlias = Describe | Tokenized | Results | Failure

T = TypeVar("T")

_LENGTH = 4


def write_message(pipe: BinaryIO, message: Any) -> None:
    """Send one message."""
    body = msgspec.msgpack.encode(message)
    pipe.write(len(body).to_bytes(_LENGTH, "big") + body)
    pipe.flush()


def read_message(pipe: BinaryIO, kind: type[T] | Any) -> T | Any | None:
    """The next message; None where the pipe has ended, in the middle of one or before it.

    Of a pipe without a buffer nothing beyond the message is read, so that waiting for more of it is sound.
    """
    length = _exactly(pipe, _LENGTH)
    body = None if length is None else _exactly(pipe, int.from_bytes(length, "big"))
    return None if body is None else msgspec.msgpack.decode(body, type=kind)


def _exactly(pipe: BinaryIO, size: int) -> bytearray | None:
    found = bytearray()
    while len(found) < size:
        part = pipe.read(size - len(found))
        if not part:
            return None
        found += part
    return found
