"""The outermost layer: what holds for every request, whether it reaches a route or not.

Litestar's own hooks miss its router's refusals, so this wraps the whole application: security headers,
host names, requests from other sites' pages, media types of bodies, HEAD, the request log, and the last
resort for faults.
"""

import time
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any, cast
from urllib.parse import urlsplit

import structlog
from litestar.enums import ScopeType
from litestar.types import ASGIApp, HTTPScope, Message, Receive, Scope, Send

from api.metrics import NO_ROUTE, Metrics
from api.problems import (
    CrossOrigin,
    UnknownHost,
    UnsupportedMediaType,
    incident,
    send_problem,
)
from neural_mri.backing import tracing
from neural_mri.backing.settings import Settings
from neural_mri.backing.tracing import NO_SPAN, Kind, Span
from neural_mri.contract.archives import SESSION_FILE
from neural_mri.contract.batches import NDJSON
from neural_mri.contract.problems import Problem

__all__ = ("CONTENT_SECURITY_POLICY", "Edge")

CONTENT_SECURITY_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' data: blob:",
        "media-src 'self' blob:",
        "connect-src 'self'",
        "font-src 'self'",
        "worker-src 'self' blob:",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
    )
)

GIVEN_UP = (
    "accelerometer",
    "bluetooth",
    "camera",
    "display-capture",
    "geolocation",
    "gyroscope",
    "hid",
    "magnetometer",
    "microphone",
    "midi",
    "payment",
    "serial",
    "usb",
    "xr-spatial-tracking",
)
"""Powers of browsers that no page here uses."""

SECURITY_HEADERS = (
    (b"content-security-policy", CONTENT_SECURITY_POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"permissions-policy", ", ".join(f"{power}=()" for power in GIVEN_UP).encode()),
    (b"x-frame-options", b"DENY"),  # as frame-ancestors says, for who does not know that
)

JSON = frozenset({"application/json"})
OTHER_BODIES: Mapping[str, frozenset[str]] = MappingProxyType(
    {
        "/api/batches": JSON | {NDJSON},
        "/api/sessions/import": frozenset({SESSION_FILE}),
    }
)
"""What is sent to the paths that take something else than JSON, or more."""

SAFE = frozenset({"GET", "HEAD", "OPTIONS"})
"""Methods that change nothing (RFC 9110, section 9.2.1)."""

log = structlog.get_logger(__name__)


class Edge:
    """Wraps the application."""

    def __init__(self, app: ASGIApp, settings: Settings, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics
        names = (name.strip().lower() for name in settings.allowed_hosts.split(","))
        self._hosts = frozenset(name for name in names if name)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, or hand a life-span on."""
        if scope["type"] != ScopeType.HTTP:
            await self._app(scope, receive, send)
            return
        answer = _Answer(send, head_only=scope["method"] == "HEAD")
        # A connection's requests may run one after another in one context.
        structlog.contextvars.clear_contextvars()
        span = _span(scope)
        tracing.stand_in(span)
        began = time.perf_counter()
        try:
            self._check(scope)
            if scope["method"] == "HEAD":
                # Every GET can be asked for its headers alone; routes need not know.
                scope = cast("HTTPScope", {**scope, "method": "GET", "head_only": True})
            await self._app(scope, receive, answer)
        except Problem as problem:
            await send_problem(answer, problem)
        except Exception as error:
            if answer.status is not None:
                raise
            fault = incident(error, method=scope["method"], path=scope["path"])
            await send_problem(answer, fault)
        finally:
            seconds = time.perf_counter() - began
            self._metrics.answered(scope, answer.status, seconds)
            _log(scope, answer.status, seconds, span)
            _end(span, scope, answer.status)

    def _check(self, scope: Any) -> None:
        headers = {name.lower(): value.decode("latin-1") for name, value in scope["headers"]}
        host = headers.get(b"host", "")
        if "*" not in self._hosts and _hostname(host) not in self._hosts:
            raise UnknownHost(
                f"{host!r} is not among the host names this service answers to; "
                "NEURAL_MRI_ALLOWED_HOSTS lists them",
                host=host,
            )
        if scope["method"] in SAFE:
            return
        _check_origin(headers, host)
        _check_media_type(headers, OTHER_BODIES.get(scope["path"], JSON))


def _hostname(host: str) -> str:
    """A Host header without its port: `[::1]:8642` is `[::1]`."""
    host = host.lower()
    if host.startswith("["):
        return host.partition("]")[0] + "]"
    return host.partition(":")[0]


def _check_origin(headers: dict[bytes, str], host: str) -> None:
    """Refuse what a page of another site sends in its visitor's name.

    Browsers say where a request comes from by Sec-Fetch-Site, older ones by Origin; programs say neither
    and act for themselves.
    """
    site, origin = headers.get(b"sec-fetch-site"), headers.get(b"origin")
    if site is not None:
        foreign = site not in ("same-origin", "none")
    else:
        foreign = origin is not None and urlsplit(origin).netloc.lower() != host.lower()
    if foreign:
        raise CrossOrigin(f"the request comes from a page of {origin or 'another site'}")


def _check_media_type(headers: dict[bytes, str], expected: frozenset[str]) -> None:
    has_body = headers.get(b"content-length", "0") != "0" or b"transfer-encoding" in headers
    coding = headers.get(b"content-encoding", "identity").strip().lower()
    if has_body and coding != "identity":
        # Not undone here: a kilobyte may hold a gigabyte.
        raise UnsupportedMediaType(f"the body is packed ({coding}): expected it as it is")
    given = headers.get(b"content-type", "").partition(";")[0].strip().lower()
    if has_body and given not in expected:
        raise UnsupportedMediaType(
            f"the body is {given or 'of no stated type'}: expected content-type: "
            + " or ".join(sorted(expected))
        )


class _Answer:
    """Passes an answer on, with the headers that every answer has."""

    def __init__(self, send: Send, *, head_only: bool) -> None:
        self._send = send
        self._head_only = head_only
        self.status: int | None = None

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            message["headers"] = [*message["headers"], *_missing(message["headers"])]
        elif message["type"] == "http.response.body" and self._head_only:
            message["body"] = b""
        await self._send(message)


def _missing(headers: Iterable[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """The headers to add: an answer that says nothing of caches is not to be kept in any."""
    given = {name.lower() for name, _ in headers}
    added = [header for header in SECURITY_HEADERS if header[0] not in given]
    if b"cache-control" not in given:
        added.append((b"cache-control", b"no-store"))
    return added


def _is_of_interest(scope: Any) -> bool:
    path: str = scope["path"]
    return path.startswith("/api/") and path != "/api/health"


def _log(scope: Any, status: int | None, seconds: float, span: Span) -> None:
    trace = {} if span.trace_id is None else {"trace_id": span.trace_id}
    (log.info if _is_of_interest(scope) else log.debug)(
        "request_answered",
        method="HEAD" if scope.get("head_only") else scope["method"],
        path=scope["path"],
        status=status,
        seconds=round(seconds, 6),
        **trace,
    )


def _span(scope: Any) -> Span:
    """The request's, in its caller's trace where it names one. A stream lasts as long as its reader likes."""
    if not _is_of_interest(scope) or scope["path"].endswith("/events"):
        return NO_SPAN
    given = next((value for name, value in scope["headers"] if name == b"traceparent"), b"")
    parent = tracing.parsed(given.decode("latin-1"))
    return tracing.begin(scope["method"], parent, kind=Kind.SERVER)


def _end(span: Span, scope: Any, status: int | None) -> None:
    """Name it by its route: an address would make as many names as there are jobs."""
    route = str(scope.get("path_template") or NO_ROUTE)
    method = "HEAD" if scope.get("head_only") else str(scope["method"])
    span.note(
        {
            "http.request.method": method,
            "http.route": route,
            "http.response.status_code": status or 0,
        }
    )
    if status is None or status >= 500:
        span.fail()
    span.end(name=f"{method} {route}")
