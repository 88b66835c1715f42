"""What people send who mean no good: each is refused, in words, and nobody else notices.

Every one goes to a process of its own kind over a socket of its own. After each test the process has logged no
fault of its own.
"""

import gzip
import json
import re
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any
from urllib.parse import quote

import httpx
import pytest

from api.openapi import Operation, operations
from neural_mri.backing.settings import Settings
from neural_mri.contract.auth import Scope
from tests.api.specimens import PROMPT
from tests.security.guarded import Guarded, guarded
from tests.security.naming import filled
from tests.security.raw import connected, replies, sent


@pytest.fixture(scope="module")
def document(service: Guarded) -> dict[str, Any]:
    return service.document()


@pytest.fixture(scope="module")
def key(service: Guarded) -> str:
    return service.key("mallory", SCANNING).key


@pytest.fixture
def mallory(service: Guarded, key: str) -> Iterator[httpx.Client]:
    with httpx.Client(
        base_url=service.url, headers={"authorization": f"Bearer {key}"}, timeout=20
    ) as client:
        yield client


@pytest.fixture(autouse=True)
def no_fault_of_its_own(service: Guarded) -> Iterator[None]:
    before = len(service.faults())
    yield
    assert service.faults()[before:] == []
    assert service.process.poll() is None


def head(method: str, target: str, key: str, *more: str) -> bytes:
    lines = [
        f"{method} {target} HTTP/1.1",
        "host: localhost",
        f"authorization: Bearer {key}",
        "connection: close",
        *more,
    ]
    return "\r\n".join(lines).encode("utf-8") + b"\r\n\r\n"


# Addresses

WAYS_OUT = (
    "..",
    "../../../../etc/passwd",
    "..%2f..%2f..%2fetc%2fpasswd",
    "%2e%2e%2f%2e%2e%2fetc%2fpasswd",
    "..%252f..%252fetc%252fpasswd",
    "....//....//etc/passwd",
    "..%5c..%5cetc%5cpasswd",
    "%c0%ae%c0%ae%c0%afetc%c0%afpasswd",
    "%2fetc%2fpasswd",
    "file:%2f%2f%2fetc%2fpasswd",
    "activations%00.arrow",
    "%0d%0aset-cookie:%20a=b",
    "%ff%fe",
    "%e2%80%ae",
    "'%20OR%201=1--",
    "${jndi:ldap:%2f%2fx}",
    "a" * 20_000,
    "-1",
    "9" * 400,
    "1e9",
    "NaN",
)


def test_no_part_of_a_path_leads_out_of_its_place(
    service: Guarded, mallory: httpx.Client, key: str, document: dict[str, Any]
) -> None:
    made = mallory.post("/api/scan/activation", json={"prompt": "a way out"}).json()["id"]
    tried = 0
    for operation in operations(document):
        for parameter in re.findall(r"{(\w+)}", operation.path):
            for way in WAYS_OUT:
                fill = {"job_id": made, "table": "activations", "layer": "0", parameter: way}
                target = filled(operation.path, fill)
                (reply,) = sent(service, head(operation.method.upper(), target, key))
                assert 400 <= reply.status < 500, (operation, way, reply)
                assert reply.headers["content-type"] == "application/problem+json"
                assert b"root:" not in reply.body
                assert "set-cookie" not in reply.headers
                tried += 1
    assert tried > 100


# Bodies

SCANNING = (Scope.SCAN_READ, Scope.SCAN_WRITE)
"""No admin, and nobody who loads models."""
DEEP = 100_000
MALFORMED: dict[str, bytes] = {
    "nothing": b"",
    "no JSON": b"{prompt: 1",
    "cut off": b'{"prompt": "a',
    "a list": b"[]",
    "a number": b"1",
    "null": b"null",
    "deep lists": b"[" * DEEP + b"]" * DEEP,
    "deep objects": b'{"a":' * DEEP + b"1" + b"}" * DEEP,
    "a deep field": b'{"prompt": ' + b"[" * DEEP + b"]" * DEEP + b"}",
    "NaN": b'{"prompt": NaN}',
    "infinity": b'{"prompt": Infinity}',
    "a huge integer": b'{"top_neurons": ' + b"9" * 5000 + b"}",
    "a huge exponent": b'{"factor": 1e999999}',
    "no UTF-8": b'{"prompt": "\xff\xfe"}',
    "a lone surrogate in UTF-8": b'{"prompt": "\xed\xa0\x80"}',
    "UTF-16": '{"prompt": "a"}'.encode("utf-16"),
    "a mark of byte order": b'\xef\xbb\xbf{"prompt": "a"}',
    "an escape that is none": b'{"prompt": "\\x41"}',
    "zeros": b"\x00" * 1000,
    "two documents": b'{"prompt": "a"}{"prompt": "b"}',
}


def with_bodies(document: dict[str, Any]) -> list[Operation]:
    return [
        operation
        for operation in operations(document)
        if "application/json" in operation.spec.get("requestBody", {}).get("content", {})
        and operation.spec["operationId"] != "logIn"
    ]


@pytest.mark.parametrize("kind", MALFORMED)
def test_a_body_that_is_none_is_refused(
    service: Guarded, mallory: httpx.Client, document: dict[str, Any], kind: str
) -> None:
    json_type = {"content-type": "application/json"}
    for operation in with_bodies(document):
        path = re.sub(r"{\w+}", "0" * 12, operation.path)
        answer = mallory.request(operation.method, path, content=MALFORMED[kind], headers=json_type)
        optional = not operation.spec["requestBody"].get("required", False)
        if kind in ("nothing", "null") and optional and answer.status_code < 300:
            continue
        assert 400 <= answer.status_code < 500, f"{operation.path}: {answer.text}"
        assert answer.headers["content-type"] == "application/problem+json"


def test_a_body_too_large_is_not_read(service: Guarded, key: str) -> None:
    """It is refused by its length, before any of it has come."""
    (reply,) = sent(
        service,
        head(
            "POST",
            "/api/scan/activation",
            key,
            "content-type: application/json",
            "content-length: 99999999999",
        ),
    )
    assert reply.status == 413


def test_a_body_without_end_is_cut(service: Guarded, key: str) -> None:
    request = head(
        "POST",
        "/api/scan/activation",
        key,
        "content-type: application/json",
        "transfer-encoding: chunked",
    )
    with connected(service) as connection:
        connection.sendall(request)
        try:
            for _ in range(100):
                connection.sendall(b"10000\r\n" + b" " * 65536 + b"\r\n")
        except (BrokenPipeError, ConnectionResetError):
            return
        assert replies(connection)[0].status == 413


def test_what_is_packed_is_not_unpacked(service: Guarded, mallory: httpx.Client) -> None:
    bomb = gzip.compress(b'{"prompt": "' + b"a" * 50_000_000 + b'"}')
    assert len(bomb) < service.settings.max_body_bytes
    answer = mallory.post(
        "/api/scan/activation",
        content=bomb,
        headers={"content-type": "application/json", "content-encoding": "gzip"},
    )
    assert answer.status_code == 415
    assert "gzip" in answer.json()["detail"]


def test_who_goes_away_in_the_middle_of_a_body_is_no_fault_of_ours(
    service: Guarded, key: str
) -> None:
    request = head(
        "POST",
        "/api/scan/activation",
        key,
        "content-type: application/json",
        "content-length: 1000",
    )
    with connected(service) as connection:
        connection.sendall(request + b'{"prompt": "a')
    time.sleep(0.3)


# Words

HOSTILE = {
    "NUL": "a\x00b",
    "control characters": "".join(map(chr, range(1, 32))) + "\x7f\x9b",
    "right to left": "\u202egnp.exe\u2066\u2069",
    "combining marks": "a" + "\u0301" * 5000,
    "no characters": "\ufffe\uffff\U0010ffff",
    "terminal escapes": "\x1b]0;owned\x07\x1b[2J",
    "markup": "<script>alert(1)</script>",
    "a format": "%s%n{0}{prompt!r}${7*7}",
    "a statement": "'; DROP TABLE jobs; --",
    "lines": "a\r\nset-cookie: b=c\r\n\r\n",
    "much": "a " * 500_000,
    "one word": "a" * 1_000_000,
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_prompt_is_a_prompt_or_is_refused(
    service: Guarded, mallory: httpx.Client, kind: str
) -> None:
    for field in ("prompt", "answer", "model", "layers"):
        value: Any = [HOSTILE[kind]] if field == "layers" else HOSTILE[kind]
        body = {"prompt": PROMPT, field: value}
        path = "/api/scan/anomaly" if field == "answer" else "/api/scan/activation"
        answer = mallory.post(path, json=body)
        assert answer.status_code in (202, 400, 413, 422), answer.text
        if answer.status_code == 202:
            assert field in ("prompt", "answer")
            again = mallory.get(answer.json()["links"]["self"]).json()
            assert again["request"][field] == value, "it is kept as it was sent"
        else:
            assert answer.headers["content-type"] == "application/problem+json"
            assert len(answer.content) < 20_000
        assert "set-cookie" not in answer.headers


@pytest.mark.parametrize("field", ["prompt", "answer", "model"])
def test_half_a_character_is_refused(mallory: httpx.Client, field: str) -> None:
    body = json.dumps({"prompt": PROMPT, field: "\ud800"})
    path = "/api/scan/anomaly" if field == "answer" else "/api/scan/activation"
    answer = mallory.post(path, content=body, headers={"content-type": "application/json"})
    assert answer.status_code in (400, 422), answer.text


@pytest.mark.parametrize(
    "name",
    ["", " ", ".", "blocks", "blocks.", "blocks.-1.mlp", "blocks.99999999999999999999.mlp",
     "blocks.0.mlp\x00", "blocks.0.attn.head_" + "9" * 5000, "../../etc/passwd", "\u202eplm",
     "blocks.0.mlp.neuron_-1", "blocks.٣.mlp", "blocks.0.mlp" * 1000, "__class__"],
)  # fmt: skip
def test_a_component_that_is_none_is_named_back(mallory: httpx.Client, name: str) -> None:
    body = {"prompt": PROMPT, "component": name}
    answer = mallory.post("/api/perturb/zero", json=body)
    assert answer.status_code in (400, 422), answer.text
    assert len(answer.content) < 5000


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("prefer", "wait=" + "9" * 5000),
        ("prefer", "wait=-1"),
        ("prefer", "wait=NaN"),
        ("accept", "," * 10_000),
        ("accept", "application/json;q=nan"),
        ("accept", ";".join(["a/b"] * 5000)),
        ("range", "bytes=" + "0-0," * 10_000),
        ("idempotency-key", "\x7f"),
        ("last-event-id", "9" * 10_000),
        ("last-event-id", "-".join(["1"] * 5000)),
        ("if-none-match", '"' * 10_000),
        ("traceparent", "00-" + "f" * 10_000),
        ("traceparent", "\xff"),
        ("cookie", "nmri_session=" + "a" * 10_000),
        ("cookie", ";" * 10_000),
        ("origin", "null"),
        ("content-type", "application/json; charset=utf-99"),
        ("x-forwarded-for", "127.0.0.1"),
        ("x-http-method-override", "DELETE"),
        ("authorization", "Bearer " + "nmri_" * 2000),
        ("authorization", "Basic bm1yaTo="),
    ],
)
def test_a_hostile_header_harms_nobody(
    service: Guarded, mallory: httpx.Client, key: str, name: str, value: str
) -> None:
    made = mallory.post("/api/scan/activation", json={"prompt": "headers"}).json()["id"]
    more = f"{name}: ".encode() + value.encode("latin-1")
    for method, path in (
        ("GET", f"/api/jobs/{made}"),
        ("GET", f"/api/jobs/{made}/result"),
        ("HEAD", f"/api/jobs/{made}/events"),
        ("GET", "/"),
    ):
        own = b"" if name == "authorization" else f"authorization: Bearer {key}\r\n".encode()
        request = f"{method} {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n".encode()
        with connected(service) as connection:
            connection.sendall(request + own + more + b"\r\n\r\n")
            status = connection.recv(65536).split(b"\r\n", 1)[0]
        assert re.match(rb"HTTP/1\.1 [234]\d\d ", status), (method, path, status)


# Two requests where one was seen

GET_JOBS = "GET /api/jobs HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer {key}\r\n\r\n"


@pytest.mark.parametrize(
    "lines",
    [
        ("content-length: 5", "transfer-encoding: chunked"),
        ("transfer-encoding: chunked", "content-length: 5"),
        ("content-length: 5", "content-length: 6"),
        ("content-length: 5, 6",),
        ("content-length: -1",),
        ("content-length: +5",),
        ("content-length: 0x5",),
        ("content-length: 5 5",),
        ("transfer-encoding: xchunked",),
        ("transfer-encoding: chunked, identity",),
        ("transfer-encoding : chunked",),
        ("transfer-encoding:\x0bchunked",),
        (" transfer-encoding: chunked",),
        ("content-length: 99999999999999999999999",),
    ],
)
def test_where_a_body_ends_is_never_a_matter_of_opinion(
    service: Guarded, key: str, lines: tuple[str, ...]
) -> None:
    """A request that two readers would end in two places is answered once, and the connection is closed."""
    smuggled = GET_JOBS.format(key=key)
    first = "\r\n".join(
        ["POST /api/scan/structural HTTP/1.1", "host: localhost", f"authorization: Bearer {key}",
         "content-type: application/json", *lines]
    )  # fmt: skip
    answers = sent(service, f"{first}\r\n\r\n0\r\n\r\n{smuggled}".encode("latin-1"))
    assert [reply.status for reply in answers] in ([400], []), answers


@pytest.mark.parametrize(
    "request_",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET /\r\n\r\n",
        b"G\x00T / HTTP/1.1\r\n\r\n",
        b"GET /\xff HTTP/1.1\r\nhost: localhost\r\n\r\n",
        b"GET / HTTP/1.1\r\nhost: localhost\r\nx: a\x00b\r\n\r\n",
        b"GET / HTTP/1.1\r\nhost: localhost\r\nhost: evil.test\r\n\r\n",
        b"GET http://evil.test/ HTTP/1.1\r\nhost: evil.test\r\n\r\n",
        b"CONNECT localhost:22 HTTP/1.1\r\nhost: localhost\r\n\r\n",
        b"TRACE / HTTP/1.1\r\nhost: localhost\r\n\r\n",
        b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\nhost: localhost\r\n\r\n",
        b"GET / HTTP/1.1\r\nhost: localhost\r\n"
        + b"".join(b"x%d: y\r\n" % i for i in range(20_000))
        + b"\r\n",
        b"GET / HTTP/1.1\r\nx: " + b"y" * 10_000_000,
    ],
)
def test_what_is_no_request_is_refused_and_the_connection_closed(
    service: Guarded, request_: bytes
) -> None:
    with connected(service) as connection:
        try:
            connection.sendall(request_.replace(b"\r\nhost", b"\r\nconnection: close\r\nhost"))
            answers = replies(connection)
        except (BrokenPipeError, ConnectionResetError):
            answers = []
    assert len(answers) <= 1
    for reply in answers:
        assert 400 <= reply.status < 500, reply
        assert reply.headers["content-type"] == "application/problem+json"


# Patience

NEVER = 30.0
QUICK = """
import sys
from api import wire
wire.HEAD_SECONDS, wire.BODY_SECONDS, wire.LOOK_AGAIN_SECONDS = 1.5, 1.5, 0.2
from api.__main__ import main
sys.exit(main())
"""


@pytest.fixture(scope="module")
def impatient(
    service: Guarded, stood_on: Settings, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Guarded]:
    """The same, with less patience than people have."""
    with guarded(stood_on, tmp_path_factory.mktemp("quick"), program=("-c", QUICK)) as quick:
        yield quick


def closed_after(connection: socket.socket, trickle: bytes, pause: float = 0.1) -> float:
    """Seconds until the other side ends a connection that is fed now and then; `NEVER` where it does not."""
    began = time.monotonic()
    connection.settimeout(pause)
    while time.monotonic() - began < NEVER:
        try:
            if connection.recv(65536) == b"":
                break
        except TimeoutError:
            pass
        except ConnectionResetError:
            break
        try:
            connection.sendall(trickle)
        except (BrokenPipeError, ConnectionResetError):
            break
    return time.monotonic() - began


def test_a_head_that_never_ends_is_not_waited_for(impatient: Guarded) -> None:
    with connected(impatient) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nhost: localhost\r\n")
        assert closed_after(connection, b"x: y\r\n") < NEVER
    with connected(impatient) as silent:
        assert closed_after(silent, b"") < NEVER
    with connected(impatient) as blank:
        assert closed_after(blank, b"\r\n") < NEVER


def test_a_body_that_trickles_is_not_waited_for(impatient: Guarded) -> None:
    key = impatient.key("mallory").key
    request = head(
        "POST",
        "/api/scan/activation",
        key,
        "content-type: application/json",
        "content-length: 1000",
    ).replace(b"connection: close", b"connection: keep-alive")
    with connected(impatient) as connection:
        connection.sendall(request)
        assert closed_after(connection, b" ") < NEVER
    with connected(impatient) as refused:
        # Answered before its body has come: what is left of that is not waited for either.
        refused.sendall(request.replace(b"1000", b"9999999"))
        assert closed_after(refused, b" ") < NEVER


def test_a_body_that_comes_slowly_but_does_come_is_read(impatient: Guarded) -> None:
    key = impatient.key("ada").key
    body = json.dumps({"prompt": PROMPT}).encode() + b" " * 6000
    request = head(
        "POST",
        "/api/scan/activation",
        key,
        "content-type: application/json",
        f"content-length: {len(body)}",
    )
    with connected(impatient) as connection:
        connection.sendall(request)
        for at in range(0, len(body), 1000):
            connection.sendall(body[at : at + 1000])
            time.sleep(0.3)
        assert replies(connection)[0].status == 202


def test_an_answer_that_is_waited_for_outlasts_the_patience_with_requests(
    impatient: Guarded,
) -> None:
    key = impatient.key("ada").key
    body = json.dumps({"prompt": f"{PROMPT} slowly"}).encode()
    request = head(
        "POST",
        "/api/scan/activation",
        key,
        "content-type: application/json",
        "prefer: wait=3",
        f"content-length: {len(body)}",
    )
    with connected(impatient) as connection:
        connection.sendall(request + body + b"\r\n")  # as old clients end a body
        (reply,) = replies(connection)
    assert reply.status == 202
    assert reply.headers["preference-applied"] == "wait=3"


def test_nobody_waits_for_the_slow(service: Guarded, mallory: httpx.Client, key: str) -> None:
    """Two hundred who never end their heads and fifty who never read their events, and one who asks."""
    job = mallory.post("/api/scan/activation", json={"prompt": "slow"}).json()["id"]
    alone = min(_seconds(mallory) for _ in range(5))
    with ExitStack() as slow:
        for _ in range(200):
            connection = slow.enter_context(connected(service))
            connection.sendall(b"GET /api/jobs HTTP/1.1\r\nhost: loc")
        for _ in range(50):
            connection = slow.enter_context(connected(service))
            connection.sendall(head("GET", f"/api/jobs/{job}/events", key))
        crowded = min(_seconds(mallory) for _ in range(5))
    assert crowded < 20 * alone


def _seconds(client: httpx.Client) -> float:
    began = time.perf_counter()
    assert client.get("/api/jobs").status_code == 200
    return time.perf_counter() - began


def test_nothing_hostile_is_in_the_log_as_it_was_sent(service: Guarded, key: str) -> None:
    """A terminal that shows the log obeys nobody who is logged."""
    (reply,) = sent(service, head("GET", "/api/jobs/" + quote("\x1b[2J\u202e\n\r"), key))
    assert reply.status == 404
    said = service.said()
    assert "\x1b" not in said
    assert "\u202e" not in said
    assert key not in said
