"""Whether a worker notices that it hears nothing any more, on a real Valkey."""

import threading
from collections.abc import Iterator

import msgspec
import pytest

from neural_mri.backing import broker
from neural_mri.backing.broker import SyncRedis
from neural_mri.backing.queue import send_tickets
from neural_mri.backing.settings import Settings
from worker import hearing as module
from worker.hearing import Hearing

QUEUE = "scan.0123456789abcdef"
PATIENCE_SECONDS = 20.0


@pytest.fixture
def gave_up(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    monkeypatch.setattr(module, "LOOK_SECONDS", 0.01)
    monkeypatch.setattr(module, "DEAF_LOOKS", 5)
    return threading.Event()


@pytest.fixture
def hearing(redis: SyncRedis, gave_up: threading.Event) -> Iterator[Hearing]:
    with Hearing(redis, lambda: {QUEUE, "cpu"}, gave_up.set) as hearing:
        yield hearing


def test_who_does_nothing_while_a_ticket_waits_is_deaf(
    hearing: Hearing, redis: SyncRedis, gave_up: threading.Event
) -> None:
    assert not gave_up.wait(0.3)
    send_tickets(redis, QUEUE)
    assert gave_up.wait(PATIENCE_SECONDS)


def test_who_is_busy_lets_tickets_wait(
    hearing: Hearing, redis: SyncRedis, gave_up: threading.Event
) -> None:
    with hearing.busy():
        send_tickets(redis, QUEUE)
        assert not gave_up.wait(0.3)
    assert gave_up.wait(PATIENCE_SECONDS)


def test_who_takes_tickets_is_not_deaf_however_many_come(
    hearing: Hearing, redis: SyncRedis, gave_up: threading.Event
) -> None:
    send_tickets(redis, QUEUE, 30)
    while redis.llen(QUEUE) > 1:
        redis.rpop(QUEUE)
        with hearing.busy():
            assert not gave_up.wait(0.01)


def test_tickets_for_others_are_no_matter(
    hearing: Hearing, redis: SyncRedis, gave_up: threading.Event
) -> None:
    send_tickets(redis, "scan.of-a-model-that-is-not-held")
    assert not gave_up.wait(0.3)


def test_while_the_broker_is_away_nobody_is_deaf(
    settings: Settings, gave_up: threading.Event
) -> None:
    nowhere = msgspec.structs.replace(settings, redis_url="unix:///nowhere/valkey.sock")
    with Hearing(broker.connect(nowhere), lambda: {QUEUE}, gave_up.set):
        assert not gave_up.wait(0.3)
