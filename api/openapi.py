"""What the API can do, for programs: the OpenAPI 3.1 document.

Litestar knows the routes. What their requests and answers look like is said by `schemas`; a tag may be left
out where a route reads only one kind of request.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import msgspec
from litestar import Litestar, Request
from litestar.enums import MediaType
from litestar.handlers import HTTPRouteHandler
from litestar.openapi.config import OpenAPIConfig
from litestar.openapi.plugins import OpenAPIRenderPlugin
from litestar.openapi.spec import Components, SecurityScheme, Tag
from litestar.routes import HTTPRoute

from api import reference
from api.access import COOKIE
from api.batch_results import ZIP
from api.bodies import bodies_of
from api.schemas import ContractType, contract_types, schema_of, schemas_of
from neural_mri import __version__
from neural_mri.contract.results import ARROW_FILE, ARROW_STREAM

__all__ = ("CONFIG", "PATHS", "Operation", "document", "mended", "operations")

METHODS = ("get", "post", "put", "patch", "delete")
EMPTY = frozenset({"204", "304"})
"""Statuses whose answers have no content (RFC 9110, section 6.4.1)."""


class Operation(NamedTuple):
    """One method of one path."""

    path: str
    method: str
    spec: dict[str, Any]


def operations(document: Mapping[str, Any]) -> Iterator[Operation]:
    """Everything that can be asked."""
    for path, methods in document["paths"].items():
        for method in METHODS:
            if method in methods:
                yield Operation(path, method, methods[method])


def mended(schema: Mapping[str, Any], handlers: Iterable[HTTPRouteHandler]) -> dict[str, Any]:
    """Litestar's document, with what it says wrongly or not at all set right."""
    document: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(schema))
    by_name = {handler.operation_id: handler for handler in handlers}
    types = {kind for handler in by_name.values() for kind in _types_of(handler)}
    known = document["components"]["schemas"]
    for name, described in schemas_of(types).items():
        examples = known.get(name, {}).get("examples")
        known[name] = described if examples is None else {**described, "examples": examples}
    for operation in operations(document):
        spec = operation.spec
        spec["responses"] = dict(sorted(spec["responses"].items()))
        for status in EMPTY & spec["responses"].keys():
            spec["responses"][status].pop("content", None)
        _name_unions(operation, by_name[spec["operationId"]])
        _name_arrow_forms(operation)
        _name_streamed_body(operation, by_name[spec["operationId"]])
        if (body := spec.get("requestBody")) is not None:
            content = body["content"].get("application/json", {}).get("schema", {})
            body["required"] = {"type": "null"} not in content.get("oneOf", [])
            for name in references(content):
                _let_tag_out(known[name])
    return document


def document(app: Litestar) -> dict[str, Any]:
    """What the application says of itself, as it serves it."""
    return mended(app.openapi_schema.to_schema(), _handlers(app))


def _types_of(handler: HTTPRouteHandler) -> Iterator[ContractType]:
    """What a route's request and its answers consist of."""
    signature = handler.parsed_fn_signature
    for parameter in signature.parameters.values():
        if parameter.name != "services":
            yield from contract_types(parameter.annotation)
    for form in bodies_of(handler):
        yield from contract_types(form.annotation)
    yield from contract_types(signature.return_type.annotation)
    for answer in (handler.responses or {}).values():
        yield from contract_types(answer.data_container)


def _name_unions(operation: Operation, handler: HTTPRouteHandler) -> None:
    """Where an answer is one of several things, its tag tells which."""
    for status, answer in (handler.responses or {}).items():
        if len(list(contract_types(answer.data_container))) > 1:
            content = operation.spec["responses"][str(status)]["content"]
            content[answer.media_type]["schema"] = schema_of(answer.data_container)


def _let_tag_out(request: dict[str, Any]) -> None:
    """A request that a route reads alone needs no tag."""
    required = [field for field in request.pop("required", []) if field != "scan_mode"]
    if required:
        request["required"] = required


def _name_arrow_forms(operation: Operation) -> None:
    """A table can be had as a file or as a stream, or with others; Litestar knows one media type a status."""
    content = operation.spec["responses"].get("200", {}).get("content", {})
    binary = {"schema": {"type": "string", "format": "binary"}}
    if ARROW_FILE in content or operation.spec["operationId"] == "getResult":
        content |= {ARROW_FILE: binary, ARROW_STREAM: binary}
    if operation.spec["operationId"] == "listBatchResults":
        content |= {ARROW_STREAM: binary, ZIP: binary}


def _name_streamed_body(operation: Operation, handler: HTTPRouteHandler) -> None:
    """A body that is read as it arrives is none of the handler's arguments."""
    forms = bodies_of(handler)
    if forms:
        operation.spec["requestBody"] = {
            "content": {
                form.media_type: {
                    "schema": (
                        {"type": "string", "format": "binary"}
                        if form.annotation is bytes
                        else {**schema_of(form.annotation), "examples": list(form.examples)}
                    )
                }
                for form in forms
            }
        }


def references(part: Any) -> Iterator[str]:
    """Names of the schemas that a part of the document refers to."""
    if isinstance(part, dict):
        if isinstance(part.get("$ref"), str):
            yield part["$ref"].rpartition("/")[2]
        for value in part.values():
            yield from references(value)
    elif isinstance(part, list):
        for value in part:
            yield from references(value)


class _Rendering(OpenAPIRenderPlugin):
    """Serves one rendering of the document, made when it is first asked for."""

    def __init__(
        self, path: str, media_type: MediaType, write: Callable[[dict[str, Any]], bytes]
    ) -> None:
        super().__init__(path=path, media_type=media_type)
        self._write = write
        self._written: bytes | None = None

    def render(self, request: Request[Any, Any, Any], openapi_schema: dict[str, Any]) -> bytes:
        if self._written is None:
            self._written = self._write(mended(openapi_schema, _handlers(request.app)))
        return self._written


def _handlers(app: Litestar) -> Iterator[HTTPRouteHandler]:
    for route in app.routes:
        if isinstance(route, HTTPRoute):
            yield from route.route_handlers


PATHS = ("/schema", "/schema/openapi.json", reference.STYLESHEET)
"""Where the renderings are."""

CONFIG = OpenAPIConfig(
    title="Neural MRI",
    version=__version__,
    description=(
        "Images of the inside of an open-weight language model. A scan is a job: its request is "
        "answered 202 with where to look, its events tell how far it has come, its result is Arrow. "
        "With `Prefer: wait=N` one call does it all. Every refusal is RFC 9457 problem details."
    ),
    path="/schema",
    tags=[
        Tag("scans", "Images of a model, each request a job."),
        Tag("stimulation", "A prompt read with something done to a component, before and after."),
        Tag("models", "What can be scanned."),
        Tag("jobs", "What was asked, and how far it has come."),
        Tag("events", "How a job comes along, as it does."),
        Tag("results", "What a scan measured."),
        Tag("batches", "Many scans in one request."),
        Tag("sessions", "Scans, notes and pictures kept together, and shared."),
        Tag("access", "Who may do what: API keys, and sessions of browsers."),
        Tag("service", "The service itself."),
    ],
    components=Components(
        security_schemes={
            "key": SecurityScheme(
                type="http", scheme="bearer", description="An API key: `nmri_<id>_<secret>`."
            ),
            "session": SecurityScheme(
                type="apiKey",
                name=COOKIE,
                security_scheme_in="cookie",
                description="What POST /api/login gives a browser for its key.",
            ),
        }
    ),
    # Nothing at all is needed where the service asks for no key.
    security=[{"key": []}, {"session": []}, {}],
    render_plugins=[
        _Rendering("/", MediaType.HTML, lambda document: reference.page(document).encode()),
        _Rendering("/openapi.json", MediaType.JSON, msgspec.json.encode),
        _Rendering("/page.css", MediaType.CSS, lambda _document: reference.STYLE.encode()),
    ],
)
