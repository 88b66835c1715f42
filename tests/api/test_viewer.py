"""The viewer's files: those that were built, and no others."""

import gzip
import os
import socket
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import msgspec
import pytest

from neural_mri.backing.settings import Settings
from tests.api.world import World, serving

INDEX = b"<!doctype html><title>Neural MRI</title>"
SCRIPT = b"console.log('scan')" * 100


@pytest.fixture
def viewer(api: httpx.Client, shared_settings: Settings, tmp_path: Path) -> Path:
    """A built viewer, with a link out of it."""
    folder = shared_settings.viewer_dir
    (folder / "assets").mkdir(parents=True, exist_ok=True)
    (folder / "index.html").write_bytes(INDEX)
    (folder / "assets" / "app-4f1c.js").write_bytes(SCRIPT)
    (folder / "assets" / "app-4f1c.js.gz").write_bytes(gzip.compress(SCRIPT))
    (folder / "assets" / "font.woff2").write_bytes(b"wOF2")
    (folder / ".env").write_text("SECRET=1")
    secret = tmp_path / "secret.txt"
    secret.write_text("SECRET=2")
    for link, target in (("leak.txt", secret), ("leaks", tmp_path)):
        if not (folder / link).is_symlink():
            (folder / link).symlink_to(target)
    stamp = (folder / "index.html").stat().st_mtime_ns + 1
    os.utime(folder / "index.html", ns=(stamp, stamp))
    return folder


def test_an_unbuilt_viewer_says_what_to_do(world: World, tmp_path: Path) -> None:
    with serving(msgspec.structs.replace(world.settings, viewer_dir=tmp_path / "none")) as api:
        answer = api.get("/")
    assert answer.status_code == 404
    assert "NEURAL_MRI_VIEWER_DIR" in answer.text
    assert answer.headers["content-type"].startswith("text/html")


def test_the_index_is_always_asked_for_again(api: httpx.Client, viewer: Path) -> None:
    first = api.get("/")
    assert (first.status_code, first.content) == (200, INDEX)
    assert first.headers["cache-control"] == "no-cache"
    assert first.headers["content-type"] == "text/html; charset=utf-8"
    known = api.get("/", headers={"if-none-match": first.headers["etag"]})
    assert known.status_code == 304
    (viewer / "index.html").write_bytes(INDEX + b"new")
    assert api.get("/", headers={"if-none-match": first.headers["etag"]}).content.endswith(b"new")


def test_files_named_by_their_content_are_kept_for_ever(api: httpx.Client, viewer: Path) -> None:
    answer = api.get("/assets/app-4f1c.js", headers={"accept-encoding": "identity"})
    assert answer.content == SCRIPT
    assert answer.headers["cache-control"] == "public, max-age=31536000, immutable"
    assert answer.headers["content-type"] == "text/javascript; charset=utf-8"
    assert api.get("/assets/font.woff2").headers["content-type"] == "font/woff2"


def test_what_was_packed_before_is_sent_packed(api: httpx.Client, viewer: Path) -> None:
    packed = api.get("/assets/app-4f1c.js", headers={"accept-encoding": "br, gzip"})
    assert packed.headers["content-encoding"] == "gzip"
    assert packed.headers["content-type"] == "text/javascript; charset=utf-8"
    assert packed.headers["vary"] == "accept-encoding"
    assert int(packed.headers["content-length"]) < len(SCRIPT)
    assert packed.content == SCRIPT
    plain = api.get("/assets/app-4f1c.js", headers={"accept-encoding": "gzip;q=0"})
    assert "content-encoding" not in plain.headers
    assert plain.headers["etag"] != packed.headers["etag"]


def test_an_address_inside_the_viewer_is_its_own_to_read(api: httpx.Client, viewer: Path) -> None:
    assert api.get("/scan/123", headers={"accept": "text/html"}).content == INDEX
    missing = api.get("/assets/gone.js")
    assert missing.status_code == 404
    assert missing.headers["content-type"] == "application/problem+json"
    data = api.get("/scan/123", headers={"accept": "application/json"})
    assert data.status_code == 404


def test_pages_are_only_read(api: httpx.Client, viewer: Path) -> None:
    assert api.head("/").status_code == 200
    refused = api.post("/", json={})
    assert refused.status_code == 405
    assert refused.headers["allow"] == "GET, HEAD"


@pytest.mark.parametrize(
    "target",
    [
        "/.env",
        "/leak.txt",
        "/leaks/secret.txt",
        "/../shared.db",
        "/..%2fdata%2fneural-mri.db",
        "/%2e%2e/data/neural-mri.db",
        "/assets/../../data/neural-mri.db",
        "//etc/passwd",
        "/assets/%00.js",
        "/assets\\..\\..\\x.js",
    ],
)
def test_there_is_no_way_out_of_the_folder(api: httpx.Client, viewer: Path, target: str) -> None:
    """Sent as it stands: a client would tidy the path up first."""
    address = urlsplit(str(api.base_url))
    with socket.create_connection((address.hostname or "", address.port or 0)) as raw:
        raw.sendall(
            f"GET {target} HTTP/1.1\r\nhost: localhost\r\naccept: */*\r\nconnection: close\r\n\r\n".encode()
        )
        answer = b"".join(iter(lambda: raw.recv(65536), b""))
    status, body = answer.split(b"\r\n", 1)[0], answer.partition(b"\r\n\r\n")[2]
    assert b" 404 " in status or b" 400 " in status, answer
    assert b"SECRET" not in body
    assert b"SQLite" not in body
