"""The OpenAPI document: true, whole, and readable offline."""

import re
from collections.abc import Iterator
from html.parser import HTMLParser
from typing import Any

import httpx
import pytest

from api.openapi import METHODS, operations
from api.routes import ROUTES
from neural_mri import __version__
from tests.api.specimens import PROMPT
from tests.api.world import World

NOBODYS = "01a208e5-620a-7f6d-98da-3f510d18b436"


@pytest.fixture
def document(api: httpx.Client) -> dict[str, Any]:
    answer = api.get("/schema/openapi.json")
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("application/json")
    body: dict[str, Any] = answer.json()
    return body


def parts(document: Any) -> Iterator[dict[str, Any]]:
    """Every object in a document."""
    if isinstance(document, dict):
        yield document
        for value in document.values():
            yield from parts(value)
    elif isinstance(document, list):
        for value in document:
            yield from parts(value)


def test_the_document_is_well_formed(document: dict[str, Any]) -> None:
    assert document["openapi"].startswith("3.1")
    assert document["info"]["version"] == __version__
    tags = {tag["name"] for tag in document["tags"]}
    for operation in operations(document):
        spec = operation.spec
        assert set(spec["tags"]) <= tags
        assert spec["summary"]
        assert spec["responses"]
        in_path = set(re.findall(r"{(\w+)}", operation.path))
        declared = {p["name"] for p in spec.get("parameters", []) if p["in"] == "path"}
        assert declared == in_path
        for parameter in spec.get("parameters", []):
            assert parameter["schema"]
            assert parameter["in"] in {"path", "query", "header"}


def test_every_reference_leads_somewhere(document: dict[str, Any]) -> None:
    for part in parts(document):
        if isinstance(reference := part.get("$ref"), str):
            target: Any = document
            for step in reference.removeprefix("#/").split("/"):
                target = target[step]


def test_every_route_is_documented_once_under_a_name_of_its_own(document: dict[str, Any]) -> None:
    documented = {(op.method.upper(), op.path) for op in operations(document)}
    served = {
        (str(method), re.sub(r":\w+}", "}", path))
        for handler in ROUTES
        for path in handler.paths
        for method in handler.http_methods
        if str(method).lower() in METHODS
    }
    assert documented == served
    ids = [op.spec["operationId"] for op in operations(document)]
    assert len(set(ids)) == len(ids)


def test_every_documented_route_answers_as_documented(
    api: httpx.Client, world: World, document: dict[str, Any]
) -> None:
    api.post("/api/scan/activation", json={"prompt": PROMPT})
    done = world.perform(world.claim(world.queue()))
    key = api.post("/api/keys", json={}).json()
    fill = {"job_id": str(done.id), "table": "activations", "layer": "0", "key_id": key["id"]}
    bodies = {
        "/api/keys": {},
        "/api/login": {"key": key["key"]},
        "/api/model/load": {"model": "tiny"},
        "/api/scan/attention": {"prompt": "a", "layers": [0]},
        "/api/scan/structural": {},
    }
    with world.working(world.queue()):
        # What takes away comes last.
        for operation in sorted(operations(document), key=lambda op: op.method == "delete"):
            path = operation.path.format(**fill)
            if path == "/api/events":
                path += f"?jobs={done.id}"
            body = bodies.get(path, {"prompt": "a"}) if operation.method == "post" else None
            answer = api.request(operation.method.upper(), path, json=body)
            place = f"{operation.method} {path}: {answer.status_code}"
            assert answer.status_code < 400 or (answer.status_code, path) == (
                409,
                "/api/model/unload",
            ), f"{place} {answer.text}"
            spec = operation.spec["responses"][str(answer.status_code)]
            if answer.status_code == 204:
                continue
            media_type = answer.headers["content-type"].partition(";")[0]
            assert media_type in spec["content"], place


def test_refusals_are_documented_in_the_shape_they_have(
    api: httpx.Client, document: dict[str, Any]
) -> None:
    for operation in operations(document):
        for status, answer in operation.spec["responses"].items():
            if int(status) < 400 or (operation.path, status) == ("/api/health", "503"):
                continue
            if status == "416":
                continue
            assert list(answer["content"]) == ["application/problem+json"], operation
            (body,) = answer["content"].values()
            assert body["schema"] == {"$ref": "#/components/schemas/ProblemDetails"}
    problem = api.get(f"/api/jobs/{NOBODYS}").json()
    schema = document["components"]["schemas"]["ProblemDetails"]
    assert set(schema["required"]) <= set(problem)


def test_the_examples_are_accepted(
    api: httpx.Client, document: dict[str, Any], world: World
) -> None:
    tried = 0
    for operation in operations(document):
        body = operation.spec.get("requestBody", {}).get("content", {}).get("application/json", {})
        for value in body.get("schema", {}).get("examples", []):
            if "layers" in value and operation.path == "/api/scan/attention":
                value["layers"] = [0, 1]
            if "layers" in value and operation.path == "/api/scan/activation":
                value["layers"] = [layer.replace(".3.", ".1.") for layer in value["layers"]]
            answer = api.request(operation.method.upper(), operation.path, json=value)
            assert answer.status_code in (200, 202), answer.text
            tried += 1
    assert tried >= 5


def test_what_a_request_may_hold_is_said_exactly(document: dict[str, Any]) -> None:
    schema = document["components"]["schemas"]["ActivationScan"]
    assert schema["required"] == ["prompt"]
    assert schema["additionalProperties"] is False
    assert schema["properties"]["top_neurons"]["maximum"] == 100


class Page(HTMLParser):
    """Addresses that a page loads or links to, and the ids it has."""

    def __init__(self) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.links: list[str] = []
        self.ids: list[str] = []
        self.tags: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        values = {name: value or "" for name, value in attrs}
        if "id" in values:
            self.ids.append(values["id"])
        assert "style" not in values
        assert not any(name.startswith("on") for name in values)
        if tag == "a":
            self.links.append(values["href"])
        elif address := values.get("href") or values.get("src"):
            self.loaded.append(address)


def test_the_page_reads_offline_and_under_the_content_policy(api: httpx.Client) -> None:
    answer = api.get("/schema")
    assert answer.headers["content-type"].startswith("text/html")
    page = Page()
    page.feed(answer.text)
    assert "script" not in page.tags
    assert "style" not in page.tags
    assert page.loaded == ["/schema/page.css"]
    stylesheet = api.get("/schema/page.css")
    assert stylesheet.headers["content-type"].startswith("text/css")
    assert "url(" not in stylesheet.text
    assert "@import" not in stylesheet.text
    assert len(set(page.ids)) == len(page.ids)
    for link in page.links:
        assert link == "/schema/openapi.json" or link.removeprefix("#") in page.ids, link


def test_the_page_shows_every_operation_and_schema(
    api: httpx.Client, document: dict[str, Any]
) -> None:
    text = api.get("/schema").text
    for operation in operations(document):
        assert f'id="{operation.spec["operationId"]}"' in text
    for name in document["components"]["schemas"]:
        assert f'id="schema-{name}"' in text


def test_nothing_else_stands_beside_the_document(api: httpx.Client) -> None:
    answer = api.get("/schema/swagger")
    assert answer.status_code == 404
