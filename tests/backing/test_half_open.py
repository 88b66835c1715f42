"""Connections that something in between has forgotten: whoever asks over one is told nothing, not even that it is gone."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import pytest
from sqlalchemy import func, make_url, select
from sqlalchemy.orm import Session

from neural_mri.backing import broker, database, jobs
from neural_mri.backing.broker import AWAY
from neural_mri.backing.database import Sessions
from neural_mri.backing.settings import Settings
from neural_mri.contract.problems import Unavailable
from tests.backing.making import on_postgresql, submission
from tests.chaos.relay import Relay
from tests.servers import Valkey, free_port

_WHOSE = select(func.pg_backend_pid())


@pytest.fixture
def wire(settings: Settings) -> Iterator[Relay]:
    """What lies between a process and the PostgreSQL server."""
    url = make_url(settings.database_url)
    folder, port = url.query.get("host", ""), url.port or 5432
    target = Path(str(folder)) / f".s.PGSQL.{port}" if folder else port
    with Relay(url.host or "127.0.0.1", free_port(), target) as relay:
        yield relay


@pytest.fixture
def distant(settings: Settings, wire: Relay) -> Iterator[Sessions]:
    """Transactions over the wire."""
    url = make_url(settings.database_url).difference_update_query(["host"])
    url = url.set(host=wire.address, port=wire.port)
    shown = url.render_as_string(hide_password=False)
    sessions = database.sessions(msgspec.structs.replace(settings, database_url=shown))
    yield sessions
    sessions.close()


@on_postgresql
def test_a_statement_whose_connection_is_forgotten_is_given_up_and_the_next_one_served(
    distant: Sessions, wire: Relay, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cut_off(session: Session) -> None:
        wire.misbehave("lose", 0.0)
        jobs.submit(session, submission())

    with monkeypatch.context() as hurry:
        hurry.setattr(database, "ANSWER_SECONDS", 0.3)
        with pytest.raises(Unavailable):
            distant.write(cut_off)
    distant.write(jobs.submit, submission())
    assert sum(distant.read(jobs.queued_by_queue).values()) == 1


@on_postgresql
def test_of_idle_connections_that_are_forgotten_one_is_found_out_and_all_are_replaced(
    distant: Sessions, wire: Relay, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database, "PING_SECONDS", 0.3)
    before = _backends(distant)
    wire.misbehave("lose", 0.0)
    after = _backends(distant)
    assert len(before) == len(after) == 2
    assert not before & after


@on_postgresql
def test_a_migration_waits_for_its_turn_for_longer_than_others_wait_for_a_word(
    sessions: Sessions, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database, "ANSWER_SECONDS", 0.05)
    held, tried = threading.Event(), threading.Event()

    def hold() -> None:
        with sessions.writing() as session:
            session.execute(select(func.pg_advisory_xact_lock(database._MIGRATION_LOCK)))
            held.set()
            tried.wait(0.5)

    with ThreadPoolExecutor(1) as another:
        holding = another.submit(hold)
        held.wait()
        database.migrate(settings)
        tried.set()
        holding.result()


def _backends(sessions: Sessions) -> set[int]:
    """The server's processes for two connections at once."""
    with sessions.reading() as one, sessions.reading() as another:
        return {session.scalars(_WHOSE).one() for session in (one, another)}


def test_a_forgotten_connection_to_redis_costs_a_moment(
    settings: Settings, shared_valkey: Valkey, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(broker, "_OPTIONS", {**broker._OPTIONS, "socket_timeout": 0.3})
    target = Path(shared_valkey.url.removeprefix("unix://"))
    with Relay("127.0.0.1", free_port(), target) as wire:
        url = f"redis://127.0.0.1:{wire.port}"
        with broker.connect(msgspec.structs.replace(settings, redis_url=url)) as client:
            assert client.ping()
            wire.misbehave("lose", 0.0)
            with pytest.raises(AWAY):
                client.ping()
            assert client.ping()
