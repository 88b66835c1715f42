from collections.abc import Iterator

import msgspec
import pytest

from neural_mri.backing.settings import Settings
from tests.security.guarded import ROOT, Guarded, guarded
from tests.servers import Valkey, database_copy, migrated_database, valkey


@pytest.fixture(scope="session")
def redis_server() -> Iterator[Valkey]:
    with valkey() as server:
        yield server


@pytest.fixture(scope="session")
def stood_on(redis_server: Valkey, tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """A database and a Redis for an API to stand on, and a registered model's name."""
    template = migrated_database(tmp_path_factory.mktemp("template"))
    return msgspec.structs.replace(
        database_copy(template, tmp_path_factory.mktemp("guarded") / "data"),
        redis_url=redis_server.url,
        viewer_dir=ROOT / "web" / "dist",
        default_model="tiny",
        pinned_models="",
        max_body_bytes=200_000,
    )


@pytest.fixture(scope="session")
def service(stood_on: Settings, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    """An API process that asks for keys; a worker's part is played by hand."""
    with guarded(stood_on, tmp_path_factory.mktemp("log")) as service:
        service.world.register()
        yield service
