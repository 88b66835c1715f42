"""Traces: where the time of a request goes, from its arrival to the stored result.

A request's span is the parent of what workers do for it, processes and perhaps hours later: its W3C
`traceparent` stands in the job's row. Spans name routes, models, kinds, states and jobs; never a prompt, an
answer or a key. OpenTelemetry is imported where `NEURAL_MRI_TRACES_ENDPOINT` is set, and nowhere else; its
own variables (`OTEL_TRACES_SAMPLER`, `OTEL_EXPORTER_OTLP_HEADERS`, `OTEL_RESOURCE_ATTRIBUTES`) say the rest.
"""

import importlib.util
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from enum import Enum
from types import MappingProxyType
from typing import Any

from neural_mri import __version__
from neural_mri.backing.settings import InvalidSettings, Settings

__all__ = (
    "NOTHING",
    "NO_SPAN",
    "Kind",
    "Span",
    "begin",
    "check",
    "exported",
    "here",
    "parsed",
    "stand_in",
)

Value = str | int | float | bool

NOTHING: Mapping[str, Value] = MappingProxyType({})

EXPORT_SECONDS = 3
"""How long one delivery may take: who ends waits for the last."""

_TRACEPARENT = re.compile(
    r"(?P<version>(?!ff)[0-9a-f]{2})-(?P<ids>(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2})"
    r"(?P<more>-.*)?"
)


class Kind(Enum):
    """What part a span plays between processes; the values are OpenTelemetry's."""

    INTERNAL = 0
    SERVER = 1
    CONSUMER = 4


class Span:
    """Something that takes time. This one is told to nobody: it carries a caller's trace, or none."""

    def __init__(self, traceparent: str | None = None) -> None:
        self.traceparent = traceparent
        """The span as W3C Trace Context writes it; None where there is no trace."""

    @property
    def trace_id(self) -> str | None:
        """What all spans of the trace have in common, and log lines name."""
        return None if self.traceparent is None else self.traceparent[3:35]

    def note(self, attributes: Mapping[str, Value]) -> None:
        """Say more of it."""

    def fail(self) -> None:
        """It went wrong."""

    def end(self, *, name: str | None = None) -> None:
        """It is over; under another name perhaps than it was begun with."""


NO_SPAN = Span()


class _Told(Span):
    """A span that is sent to the collector once it has ended."""

    def __init__(self, span: Any) -> None:
        context = span.get_span_context()
        super().__init__(
            f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"
        )
        self._span = span

    def note(self, attributes: Mapping[str, Value]) -> None:
        self._span.set_attributes(dict(attributes))

    def fail(self) -> None:
        from opentelemetry.trace import StatusCode

        self._span.set_status(StatusCode.ERROR)

    def end(self, *, name: str | None = None) -> None:
        if name is not None:
            self._span.update_name(name)
        self._span.end()

    def end_at(self, moment: float) -> None:
        """It was over at that time, in seconds since 1970."""
        self._span.end(_nanoseconds(moment))


_tracer: Any = None
"""OpenTelemetry's, while spans are sent."""

_here: ContextVar[Span] = ContextVar("span", default=NO_SPAN)


def check(settings: Settings) -> None:
    """Refuse to send spans without what sends them. Raises `InvalidSettings`."""
    if settings.traces_endpoint and importlib.util.find_spec("opentelemetry.sdk") is None:
        raise InvalidSettings(
            "NEURAL_MRI_TRACES_ENDPOINT is set, but OpenTelemetry is not installed: "
            "pip install 'neural-mri[traces]'"
        )


@contextmanager
def exported(settings: Settings, *, process: str) -> Iterator[None]:
    """Send this process's spans to the settings' collector while the block runs, if they name one."""
    global _tracer  # noqa: PLW0603 (as logs are: one a process)
    if not settings.traces_endpoint:
        yield
        return
    provider = _provider(settings, process)
    _tracer = provider.get_tracer("neural_mri", __version__)
    try:
        yield
    finally:
        _tracer = None
        provider.shutdown()


def _provider(settings: Settings, process: str) -> Any:
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    resource = Resource.create(
        {
            "service.name": f"neural-mri-{process}",
            "service.version": __version__,
            "process.pid": os.getpid(),
        }
    )
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    endpoint = f"{settings.traces_endpoint.rstrip('/')}/v1/traces"
    exporter = OTLPSpanExporter(endpoint=endpoint, timeout=EXPORT_SECONDS)
    provider.add_span_processor(BatchSpanProcessor(exporter))
    return provider


def parsed(header: str | None) -> str | None:
    """A caller's `traceparent`, as we pass it on; None for what is none (W3C Trace Context, section 3.2)."""
    match = _TRACEPARENT.fullmatch(header or "")
    if match is None or (match["version"] == "00" and match["more"]):
        return None
    return f"00-{match['ids']}"


def begin(
    name: str,
    parent: str | None,
    *,
    kind: Kind = Kind.INTERNAL,
    since: float | None = None,
    until: float | None = None,
    attributes: Mapping[str, Value] = NOTHING,
) -> Span:
    """A span that has just begun, or that began at `since`, in seconds since 1970; over, if `until` is given.

    Where nothing is sent it carries its parent on.
    """
    if _tracer is None:
        return NO_SPAN if parent is None else Span(parent)
    from opentelemetry.trace import SpanKind

    begun = _Told(
        _tracer.start_span(
            name,
            context=_context(parent),
            kind=SpanKind(kind.value),
            attributes=dict(attributes),
            start_time=None if since is None else _nanoseconds(since),
        )
    )
    if until is not None:
        begun.end_at(until)
    return begun


def _context(traceparent: str | None) -> Any:
    from opentelemetry import trace
    from opentelemetry.context import Context

    if traceparent is None:
        return Context()
    _, trace_id, span_id, flags = traceparent.split("-")
    parent = trace.SpanContext(
        int(trace_id, 16),
        int(span_id, 16),
        is_remote=True,
        trace_flags=trace.TraceFlags(int(flags, 16)),
    )
    return trace.set_span_in_context(trace.NonRecordingSpan(parent), Context())


def here() -> Span:
    """The span of the request that is being answered."""
    return _here.get()


def stand_in(span: Span) -> None:
    """From here on, in this task, `here` is this span."""
    _here.set(span)


def _nanoseconds(seconds: float) -> int:
    return int(seconds * 1e9)
