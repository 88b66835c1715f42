"""What SQLite keeps and PostgreSQL does not: NUL characters. Refused, on both, wherever they can be sent."""

from collections.abc import Iterator
from typing import Any

import httpx
import msgspec
import pytest

from neural_mri.backing import database
from neural_mri.contract.auth import ALL_SCOPES
from tests.security.guarded import ROOT, Guarded, guarded
from tests.servers import Valkey, postgresql_database

NUL = "a\x00b"


@pytest.fixture(scope="module")
def on_postgresql(
    shared_postgresql: str, redis_server: Valkey, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Guarded]:
    folder = tmp_path_factory.mktemp("postgresql")
    settings = msgspec.structs.replace(
        postgresql_database(folder / "data", shared_postgresql),
        redis_url=redis_server.url,
        viewer_dir=ROOT / "web" / "dist",
        default_model="tiny",
        pinned_models="",
    )
    database.migrate(settings)
    with guarded(settings, folder) as service:
        service.world.register()
        yield service


@pytest.fixture(scope="module")
def admin(on_postgresql: Guarded) -> Iterator[httpx.Client]:
    with on_postgresql.client(on_postgresql.key("root", ALL_SCOPES)) as client:
        yield client


REQUESTS: list[tuple[str, str, dict[str, Any]]] = [
    ("GET", "/api/keys", {"params": {"user": NUL}}),
    ("GET", "/api/audit", {"params": {"user": NUL}}),
    ("GET", "/api/model/info", {"params": {"model": NUL}}),
    ("GET", "/api/sessions", {"params": {"q": NUL}}),
    ("GET", "/api/sessions", {"params": {"after": NUL}}),
    ("DELETE", "/api/model/unload", {"params": {"model": NUL}}),
    ("DELETE", "/api/keys/a%00b", {}),
    ("PUT", "/api/users/a%00b/limits", {"json": {"max_jobs": 1}}),
    ("POST", "/api/keys", {"json": {"label": NUL}}),
    ("POST", "/api/keys", {"json": {"user": NUL}}),
    ("POST", "/api/sessions", {"json": {"name": NUL}}),
    ("POST", "/api/sessions", {"json": {"name": "a", "message": NUL}}),
    ("POST", "/api/batches", {"params": {"name": NUL}, "json": {"scans": [{"scan_mode": "T1"}]}}),
    ("POST", "/api/scan/structural", {"json": {"model": NUL}}),
    ("POST", "/api/scan/weights", {"json": {"baseline": NUL}}),
    ("POST", "/api/login", {"json": {"key": NUL}}),
]


@pytest.mark.parametrize(("method", "path", "fields"), REQUESTS)
def test_a_nul_is_refused_where_it_would_be_looked_up_or_kept(
    on_postgresql: Guarded, admin: httpx.Client, method: str, path: str, fields: dict[str, Any]
) -> None:
    answer = admin.request(method, path, **fields)
    assert 400 <= answer.status_code < 500, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    assert on_postgresql.faults() == []


def test_a_nul_in_a_text_is_kept_or_refused(on_postgresql: Guarded, admin: httpx.Client) -> None:
    assert admin.post("/api/scan/activation", json={"prompt": NUL}).status_code == 400
    noted = admin.post("/api/sessions", json={"name": "a", "notes": [{"text": NUL}]})
    assert noted.status_code in (201, 400), noted.text
    assert on_postgresql.faults() == []
