"""Bodies that are read as they arrive: too long to be held, or not JSON."""

from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from typing import Any, NamedTuple

from litestar import Request
from litestar.exceptions import InternalServerException
from litestar.exceptions.http_exceptions import RequestEntityTooLarge
from litestar.handlers.base import BaseRouteHandler

from neural_mri.contract.problems import InvalidRequest

__all__ = ("BODIES", "Form", "NumberedLine", "bodies_of", "bounded", "lines_of")

BODIES = "bodies"
"""Key in a route's `opt`: the `Form`s of a body that no argument of its handler reads."""


class Form(NamedTuple):
    """One of the forms in which a body can be sent."""

    media_type: str
    annotation: Any
    """What it holds; `bytes` where that is said in words."""
    examples: Sequence[Any] = ()


def bodies_of(handler: BaseRouteHandler) -> Sequence[Form]:
    """The forms of a route's streamed body; none where it has no such body."""
    forms: Sequence[Form] = handler.opt.get(BODIES, ())
    return forms


async def bounded(request: Request[Any, Any, Any], limit: int) -> AsyncGenerator[bytes]:
    """The body's bytes as they arrive. Raises a 413 beyond the limit, `InvalidRequest` where it breaks off."""
    if (request.content_length or 0) > limit:
        raise RequestEntityTooLarge
    size = 0
    try:
        async for chunk in request.stream():
            size += len(chunk)
            if size > limit:
                raise RequestEntityTooLarge
            yield chunk
    except InternalServerException as error:
        raise InvalidRequest(f"the body broke off after {size} bytes") from error


class NumberedLine(NamedTuple):
    """A line that is not blank."""

    number: int
    """Counted from 1, blank ones too."""
    body: bytes


async def lines_of(chunks: AsyncIterator[bytes], longest: int) -> AsyncGenerator[NumberedLine]:
    """The lines of a text, as they arrive. Raises `InvalidRequest` for one that is too long."""
    rest, number = b"", 0
    async for chunk in chunks:
        *whole, rest = (rest + chunk).split(b"\n")
        for line in whole:
            number += 1
            if line.strip():
                yield _checked(number, line, longest)
        if len(rest) > longest:
            _checked(number + 1, rest, longest)
    if rest.strip():
        yield _checked(number + 1, rest, longest)


def _checked(number: int, line: bytes, longest: int) -> NumberedLine:
    if len(line) > longest:
        raise InvalidRequest(
            f"line {number} has more than {longest} bytes, as many as a scan's request may have",
            line=number,
        )
    return NumberedLine(number, line)
