"""The OpenAPI document as a page for people.

Made here, without script, style or font from anywhere else: it works offline and under the strictest
content policy.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

__all__ = ("STYLE", "STYLESHEET", "page")

STYLESHEET = "/schema/page.css"

STYLE = """\
:root { color-scheme: dark light; }
body { font: 15px/1.55 ui-sans-serif, system-ui, sans-serif; max-width: 70rem; margin: 2rem auto;
  padding: 0 1.25rem; background: Canvas; color: CanvasText; }
h1 { font-size: 1.6rem; }
h2 { margin-top: 3rem; border-bottom: 1px solid GrayText; }
h3 { font-size: 1.05rem; margin: 2.25rem 0 .25rem; }
h3 code { font-weight: 700; }
h4 { font-size: .9rem; margin: 1rem 0 .25rem; }
code, pre { font-family: ui-monospace, "JetBrains Mono", monospace; font-size: .92em; }
pre { overflow-x: auto; padding: .75rem 1rem; border: 1px solid GrayText; border-radius: 4px; }
table { border-collapse: collapse; width: 100%; margin: .25rem 0 1rem; }
th, td { text-align: left; vertical-align: top; padding: .25rem .9rem .25rem 0; }
td { border-top: 1px solid GrayText; }
a { color: LinkText; }
a:focus-visible { outline: 2px solid; outline-offset: 2px; }
"""

METHODS = ("get", "post", "put", "patch", "delete")


def page(document: Mapping[str, Any]) -> str:
    """The whole page."""
    info = document["info"]
    return "\n".join(
        (
            "<!doctype html>",
            '<html lang="en">',
            '<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(info['title'])} {escape(info['version'])}: the API</title>",
            f'<link rel="stylesheet" href="{STYLESHEET}">',
            f"<h1>{escape(info['title'])} {escape(info['version'])}</h1>",
            f"<p>{_prose(info.get('description', ''))}</p>",
            '<p>For programs: <a href="/schema/openapi.json">openapi.json</a></p>',
            *_contents(document),
            *_operations(document),
            "<h2>Schemas</h2>",
            *_schemas(document["components"]["schemas"]),
            "</html>",
        )
    )


def _contents(document: Mapping[str, Any]) -> Iterator[str]:
    yield '<nav aria-label="Operations"><table><tbody>'
    for path, method, spec in _each(document):
        yield (
            f'<tr><td><a href="#{escape(spec["operationId"])}"><code>{method.upper()} '
            f"{escape(path)}</code></a></td><td>{escape(spec.get('summary', ''))}</td></tr>"
        )
    yield "</tbody></table></nav>"


def _each(document: Mapping[str, Any]) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    for path, methods in document["paths"].items():
        for method in METHODS:
            if method in methods:
                yield path, method, methods[method]


def _operations(document: Mapping[str, Any]) -> Iterator[str]:
    for tag in document.get("tags", []):
        yield f"<h2>{escape(tag['name'].capitalize())}</h2>"
        yield f"<p>{_prose(tag.get('description', ''))}</p>"
        for path, method, spec in _each(document):
            if tag["name"] in spec.get("tags", []):
                yield from _operation(path, method, spec)


def _operation(path: str, method: str, spec: Mapping[str, Any]) -> Iterator[str]:
    yield (
        f'<h3 id="{escape(spec["operationId"])}"><code>{method.upper()} {escape(path)}</code></h3>'
    )
    yield f"<p>{_prose(spec.get('summary', ''))}.</p>"
    yield from _paragraphs(spec.get("description", ""))
    if parameters := spec.get("parameters"):
        yield from _table(
            ("Parameter", "In", "Type", "Meaning"),
            [
                (
                    _code(parameter["name"]),
                    escape(parameter["in"]),
                    _type(parameter.get("schema", {})),
                    _prose(parameter.get("description", "")),
                )
                for parameter in parameters
            ],
        )
    for media_type, body in spec.get("requestBody", {}).get("content", {}).items():
        yield f"<h4>Body: {_code(media_type)}, {_type(body.get('schema', {}))}</h4>"
        for example in body.get("schema", {}).get("examples", []):
            yield f"<pre>{escape(json.dumps(example, indent=2, ensure_ascii=False))}</pre>"
    yield from _table(
        ("Status", "Answer", "Type"),
        [
            (
                _code(status),
                _prose(answer.get("description", "")),
                ", ".join(
                    f"{_code(media_type)} {_type(body.get('schema', {}))}"
                    for media_type, body in answer.get("content", {}).items()
                ),
            )
            for status, answer in spec["responses"].items()
        ],
    )


def _schemas(schemas: Mapping[str, Any]) -> Iterator[str]:
    for name, schema in sorted(schemas.items()):
        yield f'<h3 id="schema-{escape(name)}">{_code(name)}</h3>'
        yield from _paragraphs(schema.get("description", ""))
        if "properties" in schema:
            yield from _fields(schema)
        elif "x-enum-descriptions" in schema:
            values = zip(schema["enum"], schema["x-enum-descriptions"], strict=True)
            yield from _table(
                ("Value", "Meaning"),
                [(_code(json.dumps(value)), _prose(meaning)) for value, meaning in values],
            )
        else:
            yield f"<p>{_type(schema)}</p>"


def _fields(schema: Mapping[str, Any]) -> Iterator[str]:
    required = schema.get("required", [])
    yield from _table(
        ("Field", "Type", "Default", "Meaning"),
        [
            (
                _code(field) + (" (required)" if field in required else ""),
                _type(kind),
                _code(json.dumps(kind["default"])) if "default" in kind else "",
                _prose(kind.get("description", "")),
            )
            for field, kind in schema["properties"].items()
        ],
    )
    if schema.get("additionalProperties") is False:
        yield "<p>Any other field is refused.</p>"


def _type(schema: Mapping[str, Any]) -> str:
    """A schema in a few words, linked where it has a name."""
    if "$ref" in schema:
        return _link(schema["$ref"])
    if "discriminator" in schema:
        tagged = schema["discriminator"]
        return f"what {_code(tagged['propertyName'])} says: " + ", ".join(
            f"{_code(json.dumps(tag))} {_link(reference)}"
            for tag, reference in tagged["mapping"].items()
        )
    for union in ("oneOf", "anyOf", "allOf"):
        if union in schema:
            return " or ".join(_type(kind) for kind in schema[union])
    if "const" in schema:
        return _code(json.dumps(schema["const"]))
    if "enum" in schema:
        return " or ".join(_code(json.dumps(value)) for value in schema["enum"])
    return _plain_type(schema)


def _link(reference: str) -> str:
    name = reference.rpartition("/")[2]
    return f'<a href="#schema-{escape(name)}">{escape(name)}</a>'


def _plain_type(schema: Mapping[str, Any]) -> str:
    kind = schema.get("type", "anything")
    if kind == "array" and "prefixItems" in schema:
        return f"array of {', '.join(map(_type, schema['prefixItems']))}"
    if kind == "array":
        counted = _between("{} to {} items,", "minItems", "maxItems", schema)
        return f"array{counted} of {_type(schema.get('items') or {})}"
    if kind == "object" and isinstance(schema.get("additionalProperties"), Mapping):
        return f"object of {_type(schema['additionalProperties'])}"
    if kind == "string":
        pattern = f", as {_code(schema['pattern'])}" if "pattern" in schema else ""
        return f"string{_between('{} to {} characters', 'minLength', 'maxLength', schema)}{pattern}"
    bounds = [
        f"{word} {schema[key]:g}"
        for key, word in (
            ("minimum", "from"),
            ("exclusiveMinimum", "above"),
            ("maximum", "to"),
            ("exclusiveMaximum", "below"),
        )
        if key in schema
    ]
    words = " or ".join(kind) if isinstance(kind, list) else kind
    return escape(" ".join((words, *bounds)))


def _between(words: str, least: str, most: str, schema: Mapping[str, Any]) -> str:
    """How many there may be, where that is bounded."""
    if most in schema:
        return ", " + words.format(schema.get(least, 0), schema[most])
    if schema.get(least):
        return ", " + words.format(schema[least], "any number of")
    return ""


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    yield (
        "<table><thead><tr>" + "".join(f"<th>{name}</th>" for name in head) + "</tr></thead><tbody>"
    )
    for row in rows:
        yield "<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>"
    yield "</tbody></table>"


def _code(text: str) -> str:
    return f"<code>{escape(text)}</code>"


def _paragraphs(text: str) -> Iterator[str]:
    for paragraph in text.split("\n\n"):
        yield f"<p>{_prose(paragraph)}</p>"


def _prose(text: str) -> str:
    """Text in which `back ticks` mark code."""
    parts = escape(text).split("`")
    return "".join(
        f"<code>{part}</code>" if index % 2 else part for index, part in enumerate(parts)
    )
