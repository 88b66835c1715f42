"""What requests and answers look like, as JSON Schema: the contract's types, and what is said of each field.

msgspec knows its own types best: tags of nested unions, bounds inside unions, which structs refuse unknown
fields. What a field means stands under it in the source, and is read there.
"""

import ast
import inspect
import sys
from collections.abc import Iterable, Iterator, Mapping
from enum import Enum
from functools import cache
from itertools import pairwise
from typing import Any, get_args

import msgspec

__all__ = ("ContractType", "contract_types", "schema_of", "schemas_of")

TEMPLATE = "#/components/schemas/{name}"

ContractType = type[msgspec.Struct] | type[Enum]


def contract_types(annotation: Any) -> Iterator[ContractType]:
    """The structs and enumerations that an annotation names."""
    if isinstance(annotation, type) and issubclass(annotation, msgspec.Struct | Enum):
        yield annotation
    for inner in get_args(annotation):
        yield from contract_types(inner)


def schema_of(annotation: Any) -> dict[str, Any]:
    """The schema of a type, which refers to those of `schemas_of`."""
    (schema,), _ = msgspec.json.schema_components([annotation], ref_template=TEMPLATE)
    return schema


def schemas_of(types: Iterable[ContractType]) -> dict[str, dict[str, Any]]:
    """Schemas by name of these types, and of all that they are made of.

    Raises `ValueError` where two of them have one name.
    """
    named = _reachable(types)
    _, schemas = msgspec.json.schema_components(named.values(), ref_template=TEMPLATE)
    return {name: _explained(schema, named.get(name)) for name, schema in schemas.items()}


def _reachable(types: Iterable[ContractType]) -> dict[str, ContractType]:
    named: dict[str, ContractType] = {}
    waiting = list(types)
    while waiting:
        kind = waiting.pop()
        known = named.setdefault(kind.__name__, kind)
        if known is not kind:
            raise ValueError(f"{known!r} and {kind!r} have one name: a document would mix them up")
        if issubclass(kind, msgspec.Struct):
            for field in msgspec.structs.fields(kind):
                waiting.extend(
                    inner for inner in contract_types(field.type) if inner.__name__ not in named
                )
    return named


def _explained(schema: dict[str, Any], kind: ContractType | None) -> dict[str, Any]:
    """The schema, saying what is said in the source."""
    if "description" in schema:
        schema["description"] = inspect.cleandoc(schema["description"])
    if kind is None:  # a named tuple: its schema is that of a list
        return schema
    notes = _notes(kind)
    if issubclass(kind, Enum):
        meanings = [notes.get(member.name, "") for member in kind]
        # The order of msgspec's `enum` is its own.
        meant = {member.value: meaning for member, meaning in zip(kind, meanings, strict=True)}
        schema["enum"] = list(meant)
        if any(meanings):
            schema["x-enum-descriptions"] = meanings
        return schema
    for name, field in schema.get("properties", {}).items():
        if name in notes:
            field["description"] = notes[name]
    return schema


def _notes(kind: type) -> Mapping[str, str]:
    """What stands under each name in the body of a class, and of those it inherits from."""
    notes: dict[str, str] = {}
    for each in reversed(kind.__mro__):
        notes |= _notes_in(each.__module__).get(each.__qualname__, {})
    return notes


@cache
def _notes_in(module: str) -> Mapping[str, Mapping[str, str]]:
    """By class, what stands under names: an assignment, and a string as the next statement."""
    try:
        source = inspect.getsource(sys.modules[module])
    except (OSError, TypeError):  # built in, or shipped without its source
        return {}
    return {
        node.name: dict(_documented(node.body))
        for node in ast.parse(source).body
        if isinstance(node, ast.ClassDef)
    }


def _documented(body: list[ast.stmt]) -> Iterator[tuple[str, str]]:
    for statement, following in pairwise(body):
        match statement, following:
            case (
                ast.AnnAssign(target=ast.Name(id=name)) | ast.Assign(targets=[ast.Name(id=name)]),
                ast.Expr(value=ast.Constant(value=str(text))),
            ):
                yield name, inspect.cleandoc(text)
