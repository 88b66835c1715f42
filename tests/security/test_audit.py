"""What `make audit` says, asked of a database of the test's own."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from deploy import audit


@contextmanager
def database(status: int = 200, **faults: list[str]) -> Iterator[str]:
    """An OSV database that knows faults, by package; its address."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            results = [
                {"vulns": [{"id": each} for each in faults[query["package"]["name"]]]}
                if query["package"]["name"] in faults
                else {}
                for query in body["queries"]
            ]
            said = json.dumps({"results": results}).encode()
            self.send_response(status)
            self.send_header("content-length", str(len(said)))
            self.end_headers()
            self.wfile.write(said)

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_everything_that_is_pinned_is_asked_about() -> None:
    packages = audit.installed()
    by_kind = {kind: [p for p in packages if p.ecosystem == kind] for kind in ("PyPI", "npm")}
    assert {"litestar", "torch", "uvicorn"} <= {package.name for package in by_kind["PyPI"]}
    assert {"svelte", "vite", "@sveltejs/vite-plugin-svelte"} <= {p.name for p in by_kind["npm"]}
    assert all(package.version[0].isdigit() for package in packages)
    assert len(by_kind["PyPI"]) > 100
    assert len(by_kind["npm"]) > 100


def test_what_is_known_is_said_of_the_package_it_is_known_of(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with database(litestar=["GHSA-1", "GHSA-2"]) as address:
        assert audit.main(["--database", address]) == 1
        (first, second) = audit.known(audit.installed(), address)
    assert first.package == second.package
    assert (first.package.ecosystem, first.package.name) == ("PyPI", "litestar")
    said = capsys.readouterr().out
    assert "GHSA-2" in said
    assert "1 with known faults" in said


def test_where_nothing_is_known_it_says_of_how_many(capsys: pytest.CaptureFixture[str]) -> None:
    with database() as address:
        assert audit.main(["--database", address]) == 0
    assert f"{len(audit.installed())} packages asked about, 0" in capsys.readouterr().out


def test_a_database_that_cannot_be_asked_is_no_clean_bill(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert audit.main(["--database", "http://127.0.0.1:9"]) == 2
    with database(status=405) as address:
        assert audit.main(["--database", address]) == 2
    assert "nothing was audited" in capsys.readouterr().err
