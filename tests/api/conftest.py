import logging
from collections.abc import Iterator
from pathlib import Path

import httpx
import msgspec
import pytest
import structlog

from api import hub
from neural_mri.backing.settings import Settings
from tests.api.shell import Shell
from tests.api.world import World, inhabited, serving
from tests.servers import (
    GIVEN,
    Servers,
    Template,
    Valkey,
    database_copy,
    folder_only,
    migrated_database,
    valkey,
)

FOLDERS, SERVERS = "sqlite and a folder", "postgresql and s3"

ON_BOTH = frozenset(
    f"test_{name}"
    for name in (
        "batches",
        "coalescing",
        "idempotency",
        "jobs",
        "limits",
        "results",
        "sessions",
        "shares",
        "streams",
    )
)
"""Modules of which every test run has all on SQLite and a folder, and on PostgreSQL and S3. Others say little of either;
`tests/cluster.py` runs all."""

ONCE = frozenset(
    {
        "test_a_real_worker_runs_ten_equal_scans_once",
        "test_thousands_of_scans_are_taken_at_the_price_of_reading_them",
    }
)
"""Tests of theirs that take too long to be run a second time."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    test = metafunc.definition
    if (
        "servers" in metafunc.fixturenames
        and test.path.stem in ON_BOTH
        and test.originalname not in ONCE
        and folder_only.mark not in test.iter_markers()
        and Servers() == GIVEN
    ):
        metafunc.parametrize("servers", [FOLDERS, SERVERS], indirect=True, scope="session")


@pytest.fixture(scope="module", autouse=True)
def quick_and_quiet() -> Iterator[None]:
    """What the hub does every second or two it does several times a second here; logs say faults only."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hub, "TICK_SECONDS", 0.2)
        patch.setattr(hub, "QUIET_SECONDS", 0.4)
        yield
    structlog.reset_defaults()


@pytest.fixture(scope="session")
def servers(request: pytest.FixtureRequest) -> Servers:
    """What the API stands on."""
    if getattr(request, "param", FOLDERS) == FOLDERS:
        return GIVEN
    postgresql = request.getfixturevalue("shared_postgresql")
    return Servers(postgresql, request.getfixturevalue("shared_bucket").endpoint)


@pytest.fixture(scope="session")
def templates() -> dict[Servers, Template]:
    """Those made so far: a module's tests go from one to the other, and the next module's again."""
    return {}


@pytest.fixture(scope="session")
def template(
    tmp_path_factory: pytest.TempPathFactory,
    servers: Servers,
    templates: dict[Servers, Template],
) -> Template:
    if servers not in templates:
        templates[servers] = migrated_database(tmp_path_factory.mktemp("template"), servers)
    return templates[servers]


@pytest.fixture(scope="session")
def shared_valkey() -> Iterator[Valkey]:
    with valkey() as server:
        yield server


def settings_in(template: Template, folder: Path, redis_url: str) -> Settings:
    return msgspec.structs.replace(
        database_copy(template, folder / "data"),
        redis_url=redis_url,
        viewer_dir=folder / "viewer",
        default_model="tiny",
        pinned_models="",
        heartbeat_seconds=0.3,
        max_body_bytes=20_000,
    )


@pytest.fixture(scope="session")
def shared_settings(
    template: Template, tmp_path_factory: pytest.TempPathFactory, shared_valkey: Valkey
) -> Settings:
    return settings_in(template, tmp_path_factory.mktemp("shared"), shared_valkey.url)


@pytest.fixture(scope="session")
def shared_api(shared_settings: Settings) -> Iterator[httpx.Client]:
    with serving(shared_settings) as client:
        yield client


@pytest.fixture
def world(shared_settings: Settings) -> Iterator[World]:
    """An empty database with one registered model, and an empty Redis."""
    with inhabited(shared_settings, is_used=True) as world:
        yield world


@pytest.fixture
def api(world: World, shared_api: httpx.Client) -> httpx.Client:
    """The API on that world."""
    return shared_api


@pytest.fixture
def lone_world(template: Template, tmp_path: Path) -> Iterator[World]:
    """A world with a Valkey and a database of its own, for tests that take them away."""
    with (
        valkey() as server,
        inhabited(settings_in(template, tmp_path, server.url), valkey=server) as world,
    ):
        yield world


@pytest.fixture
def shell(
    api: httpx.Client, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Shell:
    """Commands, sent to that API."""
    monkeypatch.setenv("NMRI_URL", str(api.base_url))
    return Shell(capsys)
