from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from neural_mri.backing import broker, database, storage
from neural_mri.backing.broker import SyncRedis
from neural_mri.backing.database import Sessions
from neural_mri.backing.models import RegisteredModel
from neural_mri.backing.settings import Settings
from tests.backing.stores import paths
from tests.servers import Template, Valkey, database_copy, migrated_database, valkey
from tests.tiny import save_tiny_model
from tests.worker.bench import Bench
from tests.worker.several import NAMES, Registered
from worker import modelstore
from worker.reaper import Reaper


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Template:
    return migrated_database(tmp_path_factory.mktemp("template"))


@pytest.fixture(scope="session")
def shared_valkey() -> Iterator[Valkey]:
    with valkey() as server:
        yield server


@pytest.fixture
def settings(template: Template, tmp_path: Path, shared_valkey: Valkey) -> Settings:
    return msgspec.structs.replace(
        database_copy(template, tmp_path / "data"),
        redis_url=shared_valkey.url,
        reaper_interval_seconds=0.05,
        pinned_models="",
        device="cpu",
    )


@pytest.fixture
def sessions(settings: Settings) -> Iterator[Sessions]:
    opened = database.sessions(settings)
    yield opened
    opened.close()


@pytest.fixture
def redis(settings: Settings) -> Iterator[SyncRedis]:
    client = broker.connect(settings)
    client.flushall()
    yield client
    client.close()


@pytest.fixture
def reaper(settings: Settings, sessions: Sessions, redis: SyncRedis) -> Reaper:
    return Reaper(settings, sessions, redis, storage.open_store(settings))


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def tiny(settings: Settings, tiny_folder: Path) -> RegisteredModel:
    """The tiny model, registered."""
    return modelstore.add(settings, "tiny", f"folder:{tiny_folder}")


@pytest.fixture
def bench(
    settings: Settings, sessions: Sessions, redis: SyncRedis, tiny: RegisteredModel
) -> Iterator[Bench]:
    bench = Bench(settings, sessions, redis, tiny)
    with bench.outbox, bench.keeper:
        yield bench


@pytest.fixture(scope="session")
def calibrated() -> dict[str, bytes]:
    """Files of the tiny model's calibration, once a test has measured it."""
    return {}


@pytest.fixture
def holding_tiny(bench: Bench, calibrated: dict[str, bytes]) -> Bench:
    """A worker that holds the tiny model; what it is read against is measured once a session."""
    for path, body in calibrated.items():
        bench.store.put(path, body)
    bench.residency.load("tiny")
    if not calibrated:
        calibrated.update({path: bench.store.get(path) for path in paths(bench.store)})
    return bench


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Models of one shape and different weights."""
    home = tmp_path_factory.mktemp("several")
    return {name: save_tiny_model(home / name, seed=9 + i) for i, name in enumerate(NAMES)}


@pytest.fixture
def registered(settings: Settings, folders: dict[str, Path]) -> Registered:
    return Registered(settings, folders)
