"""What a script or a frame could do that found its way into a page: tried in a real browser.

The policy is `default-src 'none'`, and for each sort of thing a page is made of, this origin.
"""

import json
import re
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import pytest

from api.edge import CONTENT_SECURITY_POLICY
from tests.security.guarded import ROOT, Guarded

PAGES = ("/", "/schema", "/api/jobs")


@pytest.fixture(scope="module")
def elsewhere() -> Iterator[str]:
    """Another site, which has a script and an image for whoever asks; its address."""
    asked = {
        "/": ("text/html", b"<!doctype html><title>elsewhere</title><body></body>"),
        "/script.js": ("text/javascript", b"globalThis.ran.push('foreign')"),
        "/image.png": ("image/png", (ROOT / "docs" / "images" / "trace.png").read_bytes()),
    }

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            kind, body = asked.get(self.path, ("text/plain", b""))
            self.send_response(200)
            self.send_header("content-type", kind)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(scope="module")
def visited(service: Guarded, elsewhere: str) -> dict[str, Any]:
    said = subprocess.run(
        ["node", "tests/security/content-policy.mjs", service.url, elsewhere],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert said.returncode == 0, said.stderr
    seen: dict[str, Any] = json.loads(said.stdout)
    return {address.removeprefix(service.url): found for address, found in seen.items()}


@pytest.mark.browser
@pytest.mark.parametrize("page", PAGES)
def test_a_page_keeps_to_its_own_policy_and_asks_nobody_else(
    visited: dict[str, Any], service: Guarded, page: str
) -> None:
    assert visited[page]["complaints"] == []
    assert visited[page]["origins"] == [service.url]


@pytest.mark.browser
@pytest.mark.parametrize("page", PAGES)
def test_what_gets_into_a_page_gets_no_further(visited: dict[str, Any], page: str) -> None:
    tried = visited[page]["tried"]
    assert len(tried) == 10
    assert {name for name, state in tried.items() if state != "shut"} == set()


@pytest.mark.browser
def test_without_a_policy_the_same_ways_are_open(visited: dict[str, Any], elsewhere: str) -> None:
    """All but the camera, which this machine has not."""
    seen = visited[f"{elsewhere}/"]
    shut = {name for name, state in seen["tried"].items() if state == "shut"}
    assert shut <= {"camera"}
    assert seen["framed"] == 1


@pytest.mark.browser
@pytest.mark.parametrize("page", PAGES)
def test_nobody_frames_a_page(visited: dict[str, Any], page: str) -> None:
    assert visited[page]["framed"] == 0


def test_the_policy_names_this_origin_and_nothing_beyond() -> None:
    policy = dict(part.split(" ", 1) for part in CONTENT_SECURITY_POLICY.split("; "))
    assert policy["default-src"] == "'none'"
    for name, sources in policy.items():
        allowed = {"'self'", "'none'", "'script'"} | (
            {"blob:", "data:"} if name in ("img-src", "media-src", "worker-src") else set()
        )
        assert set(sources.split()) <= allowed, name
    assert {
        "base-uri",
        "form-action",
        "frame-ancestors",
        "script-src",
        "style-src",
    } <= policy.keys()


def test_powers_of_the_browser_that_no_picture_needs_are_given_up(service: Guarded) -> None:
    with service.client() as nobody:
        headers = httpx.Headers(nobody.get("/").headers)
    given_up = set(re.findall(r"([\w-]+)=\(\)", headers["permissions-policy"]))
    assert {"camera", "microphone", "geolocation", "usb", "payment", "serial"} <= given_up
    assert headers["x-frame-options"] == "DENY"
