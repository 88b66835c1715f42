"""What a PostgreSQL server does to who asks and SQLite does not: has them wait for a lock, refuses to be written to."""

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from sqlalchemy import func, select, text

from neural_mri.backing import database
from tests.api.conftest import settings_in
from tests.api.specimens import PROMPT
from tests.api.world import World, inhabited, serving
from tests.servers import Servers, Valkey, administering, migrated_database


@pytest.fixture
def far_world(
    shared_postgresql: str,
    shared_valkey: Valkey,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[World]:
    monkeypatch.setattr(database, "LOCK_SECONDS", 0.2)
    template = migrated_database(tmp_path / "template", Servers(shared_postgresql))
    with inhabited(settings_in(template, tmp_path, shared_valkey.url)) as world:
        yield world


@pytest.fixture
def beside(far_world: World) -> Iterator[database.Sessions]:
    """Transactions that know no patience but the server's own."""
    sessions = database.sessions(far_world.settings)
    yield sessions
    sessions.close()


def scan(api: httpx.Client) -> httpx.Response:
    return api.post("/api/scan/activation", json={"prompt": PROMPT})


def test_who_waits_in_vain_for_a_lock_is_told_to_come_again(
    far_world: World, beside: database.Sessions
) -> None:
    with serving(far_world.settings) as api:
        job = scan(api).json()["links"]["self"]
        with beside.writing() as session:
            session.execute(text("LOCK TABLE jobs IN ACCESS EXCLUSIVE MODE"))
            for answer in (scan(api), api.get(job), api.delete(job)):
                assert answer.status_code == 503, answer.text
                assert int(answer.headers["retry-after"]) > 0
                assert answer.json()["type"] == "urn:neural-mri:problem:unavailable"
        assert scan(api).status_code == 202
        assert api.get(job).json()["state"] == "queued"


def test_who_asks_a_standby_to_write_is_told_to_come_again(
    far_world: World, beside: database.Sessions
) -> None:
    name = beside.look(lambda session: session.scalar(select(func.current_database())))
    with administering(far_world.settings.database_url) as operator:
        operator.execute(text(f"ALTER DATABASE {name} SET default_transaction_read_only = on"))
        with serving(far_world.settings) as api:
            assert api.get("/api/jobs").json() == []
            refused = scan(api)
            assert refused.status_code == 503, refused.text
            assert int(refused.headers["retry-after"]) > 0
            operator.execute(text(f"ALTER DATABASE {name} RESET default_transaction_read_only"))
            assert scan(api).status_code == 202
