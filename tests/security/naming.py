"""Where requests name things: read from the document, so that no route is overlooked."""

import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from api.openapi import Operation, operations

__all__ = ("Place", "body_example", "filled", "places")

_NAMES_A_THING = re.compile(r"(^|_)(id|ids|job|jobs|key_id|session|sessions|batch|token|share)$")


class Place(NamedTuple):
    """A part of a request that names one thing among many."""

    operation: str
    where: str
    """`path`, `query` or `body`."""
    name: str

    def __str__(self) -> str:
        return f"{self.operation} {self.where} {self.name}"


def places(document: Mapping[str, Any]) -> Iterator[Place]:
    """Every path parameter; of the query and of bodies what is an id by its type or by its name."""
    for operation in operations(document):
        name = operation.spec["operationId"]
        for parameter in operation.spec.get("parameters", []):
            if parameter["in"] == "path" or (
                parameter["in"] == "query" and _is_id(parameter["name"], parameter["schema"])
            ):
                yield Place(name, parameter["in"], parameter["name"])
        for path in sorted(set(_ids_in(document, _body_schema(operation), "$", frozenset()))):
            yield Place(name, "body", path)


def _body_schema(operation: Operation) -> dict[str, Any]:
    content = operation.spec.get("requestBody", {}).get("content", {})
    schema: dict[str, Any] = content.get("application/json", {}).get("schema", {})
    return schema


def _is_id(name: str, schema: Any) -> bool:
    said = repr(schema)
    return "'uuid'" in said or ("'string'" in said and bool(_NAMES_A_THING.search(name)))


def _ids_in(
    document: Mapping[str, Any], schema: Any, path: str, seen: frozenset[str]
) -> Iterator[str]:
    if isinstance(schema, list):
        for each in schema:
            yield from _ids_in(document, each, path, seen)
    if not isinstance(schema, dict):
        return
    if (reference := schema.get("$ref")) is not None:
        name = reference.rpartition("/")[2]
        if name not in seen:
            inner = document["components"]["schemas"][name]
            yield from _ids_in(document, inner, path, seen | {name})
    for name, field in schema.get("properties", {}).items():
        if _is_id(name, {k: v for k, v in field.items() if k != "description"}):
            yield f"{path}.{name}"
        else:
            yield from _ids_in(document, field, f"{path}.{name}", seen)
    for combination in ("anyOf", "oneOf", "allOf", "items", "additionalProperties"):
        yield from _ids_in(document, schema.get(combination), path, seen)


def body_example(operation: Operation, document: Mapping[str, Any]) -> Any:
    """The first body that the document shows for an operation; None where it has none."""
    schema = _body_schema(operation)
    examples = schema.get("examples", [])
    if examples:
        return examples[0]
    return None if not schema else {}


def filled(path: str, values: Mapping[str, str]) -> str:
    """A path with its parameters' values; `x` for those not given."""
    return re.sub(r"{(\w+)}", lambda part: values.get(part[1], "x"), path)
