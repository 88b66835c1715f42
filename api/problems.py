"""Refusals and faults as `application/problem+json` (RFC 9457), whoever notices them.

Our own `Problem`s say their type; Litestar's refusals become `InvalidRequest`, `NotFound` or `about:blank`;
anything else is our fault: 500, an incident id, nothing of its inside, and the whole of it in the log.
"""

import secrets
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

import msgspec
import structlog
from litestar import Request, Response
from litestar.exceptions import (
    ClientException,
    HTTPException,
    InternalServerException,
    MethodNotAllowedException,
    NotFoundException,
    ValidationException,
)
from litestar.openapi.datastructures import ResponseSpec
from litestar.types import ExceptionHandlersMap, Send
from sqlalchemy.exc import DataError

from api.expectations import explained
from neural_mri.contract.auth import Unauthenticated
from neural_mri.contract.problems import (
    MEDIA_TYPE,
    InvalidRequest,
    LimitReached,
    NotFound,
    Problem,
    ProblemDocument,
    TooMany,
    Unavailable,
)

__all__ = (
    "HANDLERS",
    "CrossOrigin",
    "InternalError",
    "JsonRequest",
    "MethodNotAllowed",
    "NotAcceptable",
    "ProblemDetails",
    "UnknownHost",
    "UnsupportedMediaType",
    "incident",
    "refusals",
    "send_problem",
)

RETRY_AFTER_SECONDS = 1
SENT = "sent"
"""Key in a request's state: its body's JSON, where it was read as that."""

log = structlog.get_logger(__name__)


class CrossOrigin(Problem):
    """Another site's page may not change anything here."""

    status = 403


class MethodNotAllowed(Problem):
    """This cannot be done at this address."""

    status = 405


class NotAcceptable(Problem):
    """None of the media types in Accept is to be had."""

    status = 406


class UnsupportedMediaType(Problem):
    """The body is not JSON."""

    status = 415


class UnknownHost(Problem):
    """This service does not answer to that host name."""

    status = 421


class InternalError(Problem):
    """Something went wrong here."""

    status = 500


class InvalidField(msgspec.Struct, frozen=True, kw_only=True):
    """One value that could not be read."""

    field: str
    location: str
    """`body`, `query`, `path` or `header`."""
    message: str
    """What was expected, and what was found."""


class ProblemDetails(msgspec.Struct, frozen=True, kw_only=True):
    """RFC 9457 problem details: why the request was refused, and what was expected."""

    type: str
    """`urn:neural-mri:problem:...`, or `about:blank` where the status says it all."""
    title: str
    status: int
    detail: str
    errors: tuple[InvalidField, ...] | msgspec.UnsetType = msgspec.UNSET
    """Every value at fault, where a request could not be read."""


def refusals(*statuses: int) -> dict[int, ResponseSpec]:
    """The documented refusals of a route; those that any route may give are added."""
    return {
        status: ResponseSpec(
            data_container=ProblemDetails,
            description=HTTPStatus(status).phrase,
            media_type=MEDIA_TYPE,
            generate_examples=False,
        )
        for status in sorted({*statuses, 400, 401, 403, 429, 500, 503})
    }


def incident(error: BaseException, *, method: str, path: str) -> InternalError:
    """Log a fault of ours whole; the problem that tells of it tells nothing but where to look."""
    number = secrets.token_hex(6)
    log.error(
        "request_failed",
        incident=number,
        method=method,
        path=path,
        exc_info=(type(error), error, error.__traceback__),
    )
    return InternalError(
        f"the fault is on our side and has been logged as incident {number}", incident=number
    )


def headers_of(problem: Problem) -> dict[str, str]:
    """What a refusal says beside its body."""
    match problem:
        case LimitReached():
            return {}  # it would be refused again at any time
        case TooMany() | Unavailable():
            seconds = problem.members.get("retry_after_seconds", RETRY_AFTER_SECONDS)
            return {"retry-after": str(seconds)}
        case Unauthenticated():
            return {"www-authenticate": 'Bearer realm="neural-mri"'}
        case MethodNotAllowed():
            return {"allow": ", ".join(problem.members["allow"])}
        case _:
            return {}


async def send_problem(send: Send, problem: Problem) -> None:
    """Answer with a problem outside Litestar."""
    body = msgspec.json.encode(problem.document())
    headers = {
        "content-type": MEDIA_TYPE,
        "content-length": str(len(body)),
        **headers_of(problem),
    }
    await send(
        {
            "type": "http.response.start",
            "status": problem.status,
            "headers": [(name.encode(), value.encode()) for name, value in headers.items()],
        }
    )
    await send({"type": "http.response.body", "body": body, "more_body": False})


def _answer(
    document: ProblemDocument, status: int, headers: Mapping[str, str] | None = None
) -> Response[bytes]:
    return Response(
        msgspec.json.encode(document),
        status_code=status,
        media_type=MEDIA_TYPE,
        headers=dict(headers or {}),
    )


def _problem(_request: Request[Any, Any, Any], problem: Problem) -> Response[bytes]:
    return _answer(problem.document(), problem.status, headers_of(problem))


def _refused(request: Request[Any, Any, Any], error: HTTPException) -> Response[bytes]:
    """What Litestar itself refuses."""
    match error:
        case ValidationException():
            return _problem(request, _invalid(request, error))
        case NotFoundException():
            return _problem(request, NotFound(f"there is nothing at {request.url.path}"))
        case ClientException(status_code=400):
            return _problem(request, InvalidRequest(error.detail))
        case MethodNotAllowedException():
            return _problem(request, _not_allowed(request, error))
    if error.status_code >= 500:
        return _fault(request, error)
    status = HTTPStatus(error.status_code)
    too_large = status is HTTPStatus.REQUEST_ENTITY_TOO_LARGE
    document = {
        "type": "about:blank",
        "title": status.phrase,
        "status": int(status),
        "detail": "the body is larger than this service reads" if too_large else error.detail,
    }
    return _answer(document, status, error.headers)


def _not_allowed(request: Request[Any, Any, Any], error: HTTPException) -> MethodNotAllowed:
    allowed = {method.strip() for method in (error.headers or {}).get("allow", "").split(",")}
    if "GET" in allowed:
        allowed.add("HEAD")
    return MethodNotAllowed(
        f"{request.method} is not possible at {request.url.path}", allow=sorted(allowed)
    )


def _invalid(request: Request[Any, Any, Any], error: ValidationException) -> InvalidRequest:
    """Names each value at fault and what was expected."""
    faults: Any = error.extra if isinstance(error.extra, list) else []
    errors = [
        InvalidField(
            field=_field(request, fault),
            location=_location(fault),
            message=_message(request, fault),
        )
        for fault in faults
    ]
    said = "; ".join(
        fault.message if fault.field == fault.location else f"{fault.field}: {fault.message}"
        for fault in errors
    )
    return InvalidRequest(said or error.detail, errors=msgspec.to_builtins(errors))


def _field(request: Request[Any, Any, Any], fault: Mapping[str, Any]) -> str:
    """What the caller calls the value: Litestar names the handler's argument."""
    key, location = str(fault.get("key", "")), _location(fault)
    if key in ("", "data"):
        return location
    argument = request.route_handler.parsed_fn_signature.parameters.get(key)
    definition = argument.kwarg_definition if argument is not None and location != "body" else None
    return getattr(definition, "name", None) or key


def _location(fault: Mapping[str, Any]) -> str:
    source = fault.get("source", "body")
    return str(getattr(source, "value", source))


def _message(request: Request[Any, Any, Any], fault: Mapping[str, Any]) -> str:
    said, key = str(fault.get("message", "")), str(fault.get("key", ""))
    # Where a body is missing altogether, Litestar says only the name of its own argument.
    if said == "'data'":
        return "expected a JSON object, got no body"
    location = _location(fault)
    argument = request.route_handler.parsed_fn_signature.parameters.get(
        "data" if location == "body" else key
    )
    if argument is None:
        return said
    if location == "body":
        sent = request.scope["state"].get(SENT)
        return explained(said, argument.annotation, sent, "" if key == "data" else key)
    if location == "query":
        sent = request.query_params.get(_field(request, fault))
        return explained(said, argument.annotation, sent)
    return explained(said, argument.annotation)


def _fault(request: Request[Any, Any, Any], error: Exception) -> Response[bytes]:
    return _problem(request, incident(error, method=request.method, path=request.url.path))


def _beyond(request: Request[Any, Any, Any], error: DataError | OverflowError) -> Response[bytes]:
    """What no column can hold, NUL characters and numbers of many digits, only a caller brings here."""
    # Not the error's own words: SQLAlchemy's quote every value of the statement.
    log.warning("value_refused_by_database", path=request.url.path, error=type(error).__name__)
    return _problem(
        request,
        InvalidRequest(
            "a value cannot be looked up or kept: it holds a NUL character, or a number beyond 64 bits"
        ),
    )


class JsonRequest(Request[Any, Any, Any]):
    """Refuses bodies that Litestar would break on: they are the caller's fault, not ours."""

    async def body(self) -> bytes:
        """The body as it was sent. Raises `InvalidRequest` where its sender went away."""
        try:
            return await super().body()
        except InternalServerException as error:
            raise InvalidRequest("the body broke off") from error

    async def json(self) -> Any:
        """The body, decoded. Raises `InvalidRequest`."""
        try:
            self.scope["state"][SENT] = await super().json()
            return self.scope["state"][SENT]
        except RecursionError as error:
            raise InvalidRequest("the body is nested too deeply") from error
        except UnicodeDecodeError as error:
            raise InvalidRequest(f"the body is not UTF-8: {error.reason}") from error


HANDLERS: ExceptionHandlersMap = {
    Problem: _problem,
    HTTPException: _refused,
    DataError: _beyond,
    OverflowError: _beyond,
    Exception: _fault,
}
"""For Litestar."""
