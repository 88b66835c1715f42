"""The OpenAPI document: true, whole, and readable offline."""

import re
from collections.abc import Iterator
from html.parser import HTMLParser
from typing import Any, NamedTuple

import httpx
import msgspec
import pytest

from api.openapi import METHODS, operations, references
from api.routes import ROUTES
from neural_mri import __version__
from neural_mri.backing import keys
from neural_mri.contract.archives import SESSION_FILE
from neural_mri.contract.batches import NDJSON
from neural_mri.contract.results import ARROW_STREAM
from neural_mri.contract.scans import ScanKind
from tests.api.specimens import PROMPT, TINY, tiny_tokenizer
from tests.api.world import World

STIMULI = ("zero", "amplify", "invert", "noise", "ablate")
EVENTS = "text/event-stream"
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


def test_whatever_can_be_known_or_come_in_parts_says_by_which_headers(
    document: dict[str, Any],
) -> None:
    asked_by = {"304": {"If-None-Match"}, "206": {"If-None-Match", "If-Range", "Range"}}
    in_parts = set()
    for operation in operations(document):
        spec = operation.spec
        headers = {each["name"] for each in spec.get("parameters", []) if each["in"] == "header"}
        for status, names in asked_by.items():
            if status in spec["responses"]:
                assert names <= headers, spec["operationId"]
        in_parts |= {spec["operationId"]} if "206" in spec["responses"] else set()
    tables = {"getResult", "getTable", "getAttention", "getSessionTable", "getSharedTable"}
    assert in_parts == tables


def test_every_documented_route_answers_as_documented(
    api: httpx.Client, world: World, document: dict[str, Any]
) -> None:
    api.post("/api/scan/activation", json={"prompt": PROMPT})
    done = world.perform(world.claim(world.queue()))
    key = api.post("/api/keys", json={}).json()
    batch = api.post("/api/batches", json={"scans": [{"scan_mode": "fMRI", "prompt": PROMPT}]})
    session = api.post("/api/sessions", json={"name": "a", "scans": [{"job": str(done.id)}]}).json()
    home = session["links"]["self"]
    file = api.get(f"{home}/export").content
    links = [
        api.post(f"{home}/shares", json={"access": access}).json()
        for access in ("read", "contribute")
    ]
    fill = {
        "job_id": str(done.id),
        "batch_id": batch.json()["id"],
        "session_id": session["id"],
        "share_id": links[0]["id"],
        "result": session["document"]["scans"][0]["result"],
        "table": "activations",
        "layer": "0",
        "key_id": key["id"],
        "user": "ada",
    }
    stimulus = {"prompt": "a", "component": "blocks.0.mlp"}
    bodies: dict[str, dict[str, Any]] = {
        "/api/keys": {},
        "/api/batches": {"scans": [{"scan_mode": "T1"}]},
        "/api/sessions": {"name": "b"},
        home: {},
        f"{home}/fork": {},
        f"{home}/shares": {},
        f"{home}/scans": {"job": str(done.id)},
        "/api/shared/fork": {},
        "/api/shared/scans": {"job": str(done.id)},
        "/api/login": {"key": key["key"]},
        "/api/users/ada/limits": {"max_jobs": 7},
        "/api/model/load": {"model": "tiny"},
        "/api/model/calibrate": {},
        "/api/scan/attention": {"prompt": "a", "layers": [0]},
        "/api/scan/structural": {},
        "/api/scan/weights": {},
        **{f"/api/perturb/{name}": stimulus for name in STIMULI},
        "/api/perturb/reset": {"prompt": "a"},
        "/api/perturb/inject": {**stimulus, "values": [0.5] * TINY.d_model},
        "/api/perturb/patch": {**stimulus, "source_prompt": "b"},
        "/api/perturb/patching": {"prompt": "a", "corrupt_prompt": "b"},
        "/api/perturb/trace": {"prompt": "a", "subject": "a"},
    }
    summed_up = set()
    with world.working(world.queue(), keys.CPU_QUEUE):
        # What takes away comes last.
        for operation in sorted(
            operations(document),
            key=lambda op: (op.method == "delete", op.path.endswith("/record"), -len(op.path)),
        ):
            path = operation.path.format(**fill)
            has_body = operation.method in ("post", "put", "patch")
            body = bodies.get(path, {"prompt": "a"}) if has_body else None
            is_scan = operation.spec["operationId"].startswith(("scan", "perturb", "calibrate"))
            headers = {"prefer": "wait=10"} if is_scan else {}
            said = {"if-match": "*", "share-token": links[1]["token"], **headers}
            if path == "/api/events":
                path += f"?jobs={done.id}"
            if path.endswith("/difference"):
                path += f"?other={session['id']}"
            method = operation.method.upper()
            if "/sessions/import" in path:
                said["content-type"] = SESSION_FILE
                request = api.build_request(method, path, content=file, headers=said)
            else:
                request = api.build_request(method, path, json=body, headers=said)
            answer = api.send(request, stream=True)
            if answer.headers["content-type" if answer.status_code != 204 else "date"] != EVENTS:
                answer.read()
            answer.close()  # some streams of events have no end
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
            if headers:
                assert answer.json()["state"] == "succeeded", f"{place} {answer.text}"
                summed_up.add(answer.json()["result"]["scan_mode"])
    assert summed_up == set(ScanKind)


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


class Body(NamedTuple):
    """What can be sent where: the schema of a request."""

    method: str
    path: str
    schema: dict[str, Any]


def bodies(document: dict[str, Any]) -> Iterator[Body]:
    """Of every request."""
    for operation in operations(document):
        content = operation.spec.get("requestBody", {}).get("content", {})
        if "application/json" in content:
            schema = content["application/json"]["schema"]
            yield Body(operation.method.upper(), operation.path, schema)


def test_the_examples_are_accepted_as_they_stand(
    api: httpx.Client, document: dict[str, Any], world: World
) -> None:
    """By a model of SmolLM2's shape, whose tokenizer knows the words in them."""
    examples = [
        (body, value) for body in bodies(document) for value in body.schema.get("examples", [])
    ]
    words = [value for _, example in examples for value in example.values()]
    large = msgspec.structs.replace(
        TINY, n_layers=30, n_heads=9, n_kv_heads=3, d_model=576, d_mlp=1536, n_ctx=2048
    )
    tokenizer = tiny_tokenizer([word for word in words if isinstance(word, str)], n_tokens=500)
    world.register(weights="large", architecture=large, tokenizer=tokenizer)
    session = api.post("/api/sessions", json={"name": "a"}).json()["id"]
    for body, value in examples:
        path = body.path.format(session_id=session)
        answer = api.request(body.method, path, json=value, headers={"if-match": "*"})
        assert answer.status_code in (200, 201, 202), f"{path} {value}: {answer.text}"
    kinds = {body.path for body, _ in examples}
    scans = ("/api/scan/", "/api/perturb", "/api/batches")
    assert kinds >= {body.path for body in bodies(document) if body.path.startswith(scans)}


def test_answers_of_several_kinds_are_all_documented(document: dict[str, Any]) -> None:
    paths = document["paths"]
    for path in ("/api/jobs/{job_id}", "/api/batches/{batch_id}"):
        answers = paths[path]["delete"]["responses"]
        assert answers["200"]["content"] == answers["202"]["content"], path
    results = paths["/api/batches/{batch_id}/results"]["get"]["responses"]["200"]
    assert set(results["content"]) == {NDJSON, ARROW_STREAM, "application/zip"}
    # What is on its way changes without a new revision: it is always told.
    assert "304" not in paths["/api/shared"]["get"]["responses"]


def test_what_a_request_may_hold_is_said_exactly(document: dict[str, Any]) -> None:
    schema = document["components"]["schemas"]["ActivationScan"]
    assert schema["required"] == ["prompt"]
    assert schema["properties"]["top_neurons"]["maximum"] == 100
    assert schema["properties"]["aggregation"]["default"] == "l2_norm"
    positions, layers = schema["properties"]["token_positions"], schema["properties"]["layers"]
    assert positions["anyOf"][1] == {"type": "array", "items": {"type": "integer"}, "minItems": 1}
    assert layers["anyOf"][1]["items"]["maxLength"] == 80


def test_what_a_field_means_is_read_where_it_is_defined(document: dict[str, Any]) -> None:
    schemas = document["components"]["schemas"]
    circuit = schemas["CircuitScan"]["properties"]
    assert circuit["exact"]["description"].startswith("Strongest components `fast` measures")
    assert circuit["foil"]["description"].startswith("A token to compare with")  # inherited
    assert schemas["Ablation"]["enum"] == ["resample", "mean", "zero"]
    assert schemas["Ablation"]["x-enum-descriptions"][0].startswith("Its value in the run of the")


def test_a_perturbation_says_by_its_operation_what_it_is(document: dict[str, Any]) -> None:
    schemas = document["components"]["schemas"]
    items = schemas["PerturbationScan"]["properties"]["perturbations"]["items"]
    mapping = items["discriminator"]["mapping"]
    assert items["discriminator"]["propertyName"] == "operation"
    assert set(mapping) == {"zero", "amplify", "invert", "noise", "ablate", "inject", "patch"}
    assert {each["$ref"] for each in items["anyOf"]} == set(mapping.values())
    for operation, reference in mapping.items():
        schema = schemas[reference.rpartition("/")[2]]
        assert schema["properties"]["operation"] == {"enum": [operation]}
        assert "operation" in schema["required"]


def test_a_summary_says_by_its_scan_mode_what_it_is(document: dict[str, Any]) -> None:
    answer = document["paths"]["/api/jobs/{job_id}/result"]["get"]["responses"]["200"]
    schema = answer["content"]["application/json"]["schema"]
    assert set(schema["discriminator"]["mapping"]) == set(ScanKind)


def test_unknown_fields_are_refused_at_every_depth_as_the_document_says(
    api: httpx.Client, document: dict[str, Any], world: World
) -> None:
    schemas = document["components"]["schemas"]
    waiting = [name for body in bodies(document) for name in references(body.schema)]
    seen = set()
    while waiting:
        name = waiting.pop()
        if name not in seen:
            seen.add(name)
            waiting.extend(references(schemas[name]))
            if "properties" in schemas[name]:
                assert schemas[name]["additionalProperties"] is False, name
    assert {"PerturbationScan", "Noise", "Patch", "ZeroRequest"} <= seen
    inner = {"operation": "zero", "component": "embed", "facter": 2}
    answer = api.post("/api/perturb", json={"prompt": "a", "perturbations": [inner]})
    assert answer.status_code == 400
    assert "unknown field `facter`" in answer.json()["detail"]


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


def test_the_page_says_what_may_be_sent(api: httpx.Client) -> None:
    text = api.get("/schema").text
    perturbations = text[text.index('id="schema-PerturbationScan"') :]
    perturbations = perturbations[: perturbations.index("</table>")]
    assert "array, 0 to 256 items, of what <code>operation</code> says: " in perturbations
    assert '<code>&quot;zero&quot;</code> <a href="#schema-ZeroAblation">' in perturbations
    assert "string, 1 to 200 characters or integer from 0 or null" in perturbations
    ablation = text[text.index('id="schema-Ablation"') :]
    assert "<td>Its value in the run of the corrupt prompt.</td>" in ablation


def test_nothing_else_stands_beside_the_document(api: httpx.Client) -> None:
    answer = api.get("/schema/swagger")
    assert answer.status_code == 404
