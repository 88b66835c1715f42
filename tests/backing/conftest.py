from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import msgspec
import pytest

from neural_mri.backing import broker, database, storage
from neural_mri.backing.broker import SyncRedis
from neural_mri.backing.database import Sessions
from neural_mri.backing.settings import Settings
from neural_mri.backing.storage import FolderStore, Store
from tests.backing.making import unused
from tests.servers import Bucket, Valkey, postgresql_database, valkey


@pytest.fixture(scope="session", params=["sqlite", "postgresql"])
def server(request: pytest.FixtureRequest) -> str:
    """Where the test's database is made: SQLite where empty, or a PostgreSQL server's URL."""
    return (
        str(request.getfixturevalue("shared_postgresql")) if request.param == "postgresql" else ""
    )


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory, server: str) -> Settings:
    """A migrated database to copy, or to empty."""
    folder = tmp_path_factory.mktemp("template")
    settings = postgresql_database(folder, server) if server else Settings(data_dir=folder)
    database.migrate(settings)
    return settings


@pytest.fixture
def settings(template: Settings, tmp_path: Path) -> Settings:
    """A migrated database without a row."""
    return unused(template, tmp_path / "data")


@pytest.fixture
def fresh(server: str, tmp_path: Path) -> Settings:
    """A database without a table."""
    folder = tmp_path / "fresh"
    return postgresql_database(folder, server) if server else Settings(data_dir=folder)


@pytest.fixture
def sessions(settings: Settings) -> Iterator[Sessions]:
    opened = database.sessions(settings)
    yield opened
    opened.close()


@pytest.fixture(scope="session")
def shared_valkey() -> Iterator[Valkey]:
    with valkey() as server:
        yield server


@pytest.fixture
def redis_settings(settings: Settings, shared_valkey: Valkey) -> Settings:
    return msgspec.structs.replace(settings, redis_url=shared_valkey.url)


@pytest.fixture
def redis(redis_settings: Settings) -> Iterator[SyncRedis]:
    client = broker.connect(redis_settings)
    client.flushall()
    yield client
    client.close()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """The folder of a store."""
    return tmp_path / "results"


@pytest.fixture
def folder(root: Path) -> FolderStore:
    """A store in a folder."""
    return FolderStore(root)


@pytest.fixture(params=["folder", "s3"])
def store(request: pytest.FixtureRequest, root: Path) -> Store:
    """A store of either kind, empty."""
    if request.param == "folder":
        return FolderStore(root)
    shared: Bucket = request.getfixturevalue("shared_bucket")
    url = shared.url(f"{uuid4()}/deeper")
    return storage.open_store(Settings(store_url=url, store_endpoint=shared.endpoint))
