"""What holds for every request: headers, hosts, origins, media types, problems."""

import re
from typing import Any

import httpx
import msgspec
import pytest

from api.edge import CONTENT_SECURITY_POLICY
from neural_mri.backing import jobs
from tests.api.world import World, serving

NOBODYS = "01a208e5-620a-7f6d-98da-3f510d18b436"

SECURITY_HEADERS = {
    "content-security-policy": CONTENT_SECURITY_POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
}

ANSWERS: dict[int, tuple[str, str, dict[str, Any]]] = {
    200: ("GET", "/api/jobs", {}),
    202: ("POST", "/api/scan/structural", {"json": {}}),
    400: ("POST", "/api/scan/activation", {"json": {}}),
    403: ("POST", "/api/scan/structural", {"json": {}, "headers": {"origin": "http://evil.test"}}),
    404: ("GET", "/api/nothing/here", {}),
    405: ("GET", "/api/scan/activation", {}),
    406: ("GET", f"/api/jobs/{NOBODYS}/result", {"headers": {"accept": "text/csv"}}),
    409: ("DELETE", "/api/model/unload?model=tiny", {}),
    413: ("POST", "/api/scan/activation", {"json": {"prompt": "x" * 30_000}}),
    415: ("POST", "/api/scan/activation", {"content": b"prompt=a"}),
    421: ("GET", "/api/jobs", {"headers": {"host": "evil.test"}}),
    422: ("POST", "/api/scan/activation", {"json": {"prompt": "a", "model": "none"}}),
}
"""A request for each status."""


@pytest.mark.parametrize("status", ANSWERS)
def test_every_answer_has_the_security_headers(api: httpx.Client, status: int) -> None:
    method, path, fields = ANSWERS[status]
    answer = api.request(method, path, **fields)
    assert answer.status_code == status
    for name, value in SECURITY_HEADERS.items():
        assert answer.headers.get_list(name) == [value]
    assert answer.headers["cache-control"] == "no-store"


@pytest.mark.parametrize("status", [status for status in ANSWERS if status >= 400])
def test_every_refusal_is_a_problem_of_the_one_shape(api: httpx.Client, status: int) -> None:
    method, path, fields = ANSWERS[status]
    answer = api.request(method, path, **fields)
    assert answer.headers["content-type"] == "application/problem+json"
    problem = answer.json()
    assert problem["status"] == status
    assert re.fullmatch(r"about:blank|urn:neural-mri:problem:[a-z-]+", problem["type"])
    assert problem["title"]
    assert problem["detail"]


def test_a_method_that_is_not_possible_is_answered_with_those_that_are(api: httpx.Client) -> None:
    answer = api.get("/api/scan/activation")
    assert answer.headers["allow"] == "OPTIONS, POST"
    assert api.post("/api/jobs", json={}).headers["allow"] == "GET, HEAD, OPTIONS"
    assert answer.json()["type"] == "urn:neural-mri:problem:method-not-allowed"


def test_a_fault_of_ours_shows_nothing_of_its_inside(
    api: httpx.Client, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def break_down(*_arguments: Any, **_named: Any) -> None:
        raise RuntimeError("the secret is open sesame")

    monkeypatch.setattr(jobs, "recent", break_down)
    answer = api.get("/api/jobs")
    assert answer.status_code == 500
    assert answer.headers["content-type"] == "application/problem+json"
    assert "sesame" not in answer.text
    incident = answer.json()["incident"]
    assert incident in answer.json()["detail"]
    logged = capsys.readouterr()
    assert incident in logged.out + logged.err
    assert "the secret is open sesame" in logged.out + logged.err
    for name, value in SECURITY_HEADERS.items():
        assert answer.headers[name] == value


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1:1234", 200),
        ("localhost", 200),
        ("LOCALHOST:80", 200),
        ("[::1]:8642", 200),
        ("evil.test", 421),
        ("localhost.evil.test", 421),
        ("127.0.0.1.evil.test:80", 421),
        ("", 421),
        ("[::1", 200),
    ],
)
def test_only_the_services_own_names_are_answered_to(
    api: httpx.Client, host: str, status: int
) -> None:
    assert api.get("/api/jobs", headers={"host": host}).status_code == status
    assert (api.get("/", headers={"host": host}).status_code == 421) == (status == 421)


def test_every_host_may_be_allowed(world: World) -> None:
    with serving(msgspec.structs.replace(world.settings, allowed_hosts="*")) as api:
        assert api.get("/api/jobs", headers={"host": "anything.test"}).status_code == 200


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 202),
        ({"sec-fetch-site": "same-origin", "origin": "http://localhost:5173"}, 202),
        ({"sec-fetch-site": "none"}, 202),
        ({"sec-fetch-site": "same-site"}, 403),
        ({"sec-fetch-site": "cross-site"}, 403),
        ({"origin": "http://127.0.0.1:9", "host": "127.0.0.1:9"}, 202),
        ({"origin": "http://127.0.0.1:10", "host": "127.0.0.1:9"}, 403),
        ({"origin": "null"}, 403),
    ],
)
def test_pages_of_other_sites_change_nothing(
    api: httpx.Client, world: World, headers: dict[str, str], status: int
) -> None:
    answer = api.post("/api/scan/structural", json={}, headers=headers)
    assert answer.status_code == status
    assert len(world.sessions.read(jobs.recent, "local")) == (status == 202)


def test_no_other_site_is_let_in_by_cors(api: httpx.Client) -> None:
    answer = api.options(
        "/api/scan/activation",
        headers={"origin": "http://evil.test", "access-control-request-method": "POST"},
    )
    assert not any(name.startswith("access-control") for name in answer.headers)


@pytest.mark.parametrize("path", ["/api/jobs", "/api/health", "/schema", "/schema/openapi.json"])
def test_whatever_can_be_read_can_be_asked_for_its_headers(api: httpx.Client, path: str) -> None:
    get, head = api.get(path), api.head(path)
    assert head.status_code == get.status_code
    assert head.content == b""
    assert head.headers["content-length"] == get.headers["content-length"]
    assert api.head("/api/scan/activation").status_code == 405


def test_the_headers_of_a_stream_come_without_the_stream(api: httpx.Client, world: World) -> None:
    job = api.post("/api/scan/structural", json={}).json()
    head = api.head(job["links"]["events"])
    assert head.status_code == 200
    assert head.headers["content-type"] == "text/event-stream"


def test_a_body_of_unknown_length_is_bounded_too(api: httpx.Client) -> None:
    def endless() -> Any:
        for _ in range(100):
            yield b" " * 1000

    answer = api.post(
        "/api/scan/activation", content=endless(), headers={"content-type": "application/json"}
    )
    assert answer.status_code == 413


def test_prompts_are_not_logged(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    secret = "a prompt nobody else may read"
    with serving(world.settings) as api:
        api.post("/api/scan/activation", json={"prompt": secret})
        api.post("/api/scan/activation", json={"prompt": secret, "layers": ["nowhere"]})
    logged = capsys.readouterr()
    assert secret not in logged.out + logged.err
