import logging
from collections.abc import Iterator
from pathlib import Path

import httpx
import msgspec
import pytest
import structlog
from sqlalchemy import delete

from api import hub
from neural_mri.backing.rows import Base
from neural_mri.backing.settings import Settings
from tests.api.shell import Shell
from tests.api.world import World, serving
from tests.servers import Valkey, database_copy, migrated_database, valkey


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
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return migrated_database(tmp_path_factory.mktemp("template"))


@pytest.fixture(scope="session")
def shared_valkey() -> Iterator[Valkey]:
    with valkey() as server:
        yield server


def settings_in(template: Path, folder: Path, redis_url: str) -> Settings:
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
    template: Path, tmp_path_factory: pytest.TempPathFactory, shared_valkey: Valkey
) -> Settings:
    return settings_in(template, tmp_path_factory.mktemp("shared"), shared_valkey.url)


@pytest.fixture(scope="session")
def shared_api(shared_settings: Settings) -> Iterator[httpx.Client]:
    with serving(shared_settings) as client:
        yield client


@pytest.fixture
def world(shared_settings: Settings) -> Iterator[World]:
    """An empty database with one registered model, and an empty Redis."""
    world = World(settings=shared_settings)
    with world.sessions.writing() as session:
        for table in reversed(Base.metadata.sorted_tables):
            session.execute(delete(table))
    world.redis.flushall()
    world.register()
    yield world
    world.close()


@pytest.fixture
def api(world: World, shared_api: httpx.Client) -> httpx.Client:
    """The API on that world."""
    return shared_api


@pytest.fixture
def lone_world(template: Path, tmp_path: Path) -> Iterator[World]:
    """A world with a Valkey and a database of its own, for tests that take them away."""
    with valkey() as server:
        world = World(settings=settings_in(template, tmp_path, server.url), valkey=server)
        world.register()
        yield world
        world.close()


@pytest.fixture
def shell(
    api: httpx.Client, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Shell:
    """Commands, sent to that API."""
    monkeypatch.setenv("NMRI_URL", str(api.base_url))
    return Shell(capsys)
