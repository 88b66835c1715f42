from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from neural_mri.backing import broker, database
from neural_mri.backing.broker import SyncRedis
from neural_mri.backing.database import Sessions
from neural_mri.backing.settings import Settings
from tests.servers import Bucket, Valkey, bucket, database_copy, migrated_database, valkey


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return migrated_database(tmp_path_factory.mktemp("template"))


@pytest.fixture
def settings(template: Path, tmp_path: Path) -> Settings:
    return database_copy(template, tmp_path / "data")


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


@pytest.fixture(scope="session")
def shared_bucket() -> Iterator[Bucket]:
    with bucket() as shared:
        yield shared
