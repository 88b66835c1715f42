import asyncio
import importlib
import json
import tempfile
import time
from base64 import b64decode
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

from neural_mri.backing import broker, queue
from neural_mri.backing.broker import SyncRedis
from neural_mri.backing.queue import TaskName, TicketSender
from neural_mri.backing.settings import Settings
from tests.backing.making import QUEUE
from tests.servers import Valkey, valkey

kombu: Any = importlib.import_module("kombu")  # half of it has types

MADE_UP = ("id", "root_id", "correlation_id", "reply_to", "delivery_tag", "origin")
"""Fields that differ from message to message."""


def readable(message: bytes | str) -> dict[str, Any]:
    """A message with its body decoded and what is made up for each replaced by its type."""
    decoded: dict[str, Any] = json.loads(message)
    decoded["body"] = json.loads(b64decode(decoded["body"]))
    for part in (decoded["headers"], decoded["properties"]):
        for name in MADE_UP:
            if name in part:
                part[name] = type(part[name]).__name__
    return decoded


def test_a_ticket_is_the_message_that_celery_itself_would_send(
    redis: SyncRedis, redis_settings: Settings
) -> None:
    app = queue.celery_app(redis_settings)
    app.send_task(TaskName.TICKET.value, args=[QUEUE], queue=QUEUE)
    assert queue.send_tickets(redis, QUEUE)
    ours, celerys = redis.lrange(QUEUE, 0, -1)
    assert readable(ours) == readable(celerys)
    app.close()


def test_each_ticket_has_an_id_of_its_own(redis: SyncRedis) -> None:
    queue.send_tickets(redis, QUEUE, 2)
    one, other = (json.loads(message) for message in redis.lrange(QUEUE, 0, -1))
    for part, name in (("headers", "id"), ("properties", "delivery_tag")):
        assert len({one[part][name], other[part][name], str(UUID(int=0))}) == 3


def test_celery_reads_our_ticket(redis: SyncRedis, redis_settings: Settings) -> None:
    queue.send_tickets(redis, QUEUE)
    app = queue.celery_app(redis_settings)
    with app.connection_for_read() as connection:
        message = connection.default_channel.basic_get(QUEUE)
        assert message.headers["task"] == "neural_mri.ticket"
        assert message.decode()[:2] == [[QUEUE], {}]
        message.ack()
    app.close()
    assert queue.waiting_tickets(redis, QUEUE) == 0


def test_a_loop_sends_tickets_too(redis: SyncRedis, redis_settings: Settings) -> None:
    async def send() -> bool:
        async with broker.connect_async(redis_settings) as client:
            return await TicketSender(client).send(QUEUE)

    assert asyncio.run(send())
    assert queue.waiting_tickets(redis, QUEUE) == 1


def test_waiting_tickets_are_those_no_worker_took(redis: SyncRedis) -> None:
    assert queue.waiting_tickets(redis, QUEUE) == 0
    queue.send_tickets(redis, QUEUE, 3)
    redis.rpop(QUEUE)
    assert queue.waiting_tickets(redis, QUEUE) == 2


def test_a_ticket_that_cannot_be_sent_is_no_error(tmp_path: Path) -> None:
    settings = Settings(redis_url=f"unix://{tmp_path}/nobody.sock")
    assert queue.send_tickets(broker.connect(settings), QUEUE) is False

    async def send() -> bool:
        async with broker.connect_async(settings) as client:
            return await TicketSender(client).send(QUEUE)

    assert asyncio.run(send()) is False


@pytest.mark.parametrize(
    ("url", "celerys"),
    [
        ("unix:///run/valkey.sock", "redis+socket:///run/valkey.sock?virtual_host=0"),
        ("unix:///run/a%20b.sock?db=3", "redis+socket:///run/a%20b.sock?virtual_host=3"),
        ("redis://:secret@queue:6379/1", "redis://:secret@queue:6379/1"),
        ("rediss://queue:6380", "rediss://queue:6380"),
    ],
)
def test_celery_gets_the_same_server_in_its_own_spelling(url: str, celerys: str) -> None:
    assert broker.celery_url(Settings(redis_url=url)) == celerys


def test_messages_are_json_late_acknowledged_and_leave_no_result(redis_settings: Settings) -> None:
    conf = queue.celery_app(redis_settings).conf
    assert (conf.accept_content, conf.task_serializer) == (["json"], "json")
    assert conf.task_acks_late
    assert conf.task_reject_on_worker_lost
    assert conf.task_ignore_result
    assert conf.worker_prefetch_multiplier == 1
    assert conf.result_backend is None


def test_a_ticket_in_hand_is_noted_nowhere_and_put_back_by_who_stops(
    redis_settings: Settings, redis: SyncRedis
) -> None:
    taken: list[Any] = []
    with queue.celery_app(redis_settings).connection_for_read() as connection:
        channel = connection.channel()
        channel.basic_qos(0, 1, False)
        consumer = connection.Consumer(
            [kombu.Queue(QUEUE, routing_key=QUEUE)],
            channel=channel,
            on_message=taken.append,
            accept=["json"],
        )
        queue.send_tickets(redis, QUEUE, 3)
        with consumer:
            connection.drain_events(timeout=5)
            with pytest.raises(TimeoutError):
                connection.drain_events(timeout=0.2)  # one in hand is as many as are wanted
            assert (len(taken), queue.waiting_tickets(redis, QUEUE)) == (1, 2)
            assert not redis.exists("unacked", "unacked_index")
            taken[0].ack()
            connection.drain_events(timeout=5)
            assert (len(taken), queue.waiting_tickets(redis, QUEUE)) == (2, 1)
        channel.close()
    assert queue.waiting_tickets(redis, QUEUE) == 2
    assert taken[1].payload[:2] == [[QUEUE], {}]


def test_a_ticket_that_cannot_be_put_back_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    taken: list[Any] = []
    with valkey() as server:
        settings = Settings(redis_url=server.url)
        queue.send_tickets(broker.connect(settings), QUEUE)
        connection = queue.celery_app(settings).connection_for_read()
        channel = connection.channel()
        wanted = kombu.Queue(QUEUE, routing_key=QUEUE)
        connection.Consumer([wanted], channel=channel, on_message=taken.append).consume()
        connection.drain_events(timeout=5)
        server.kill()
        before = set(tmp_path.iterdir())
        channel.close()
        connection.collect()
    assert len(taken) == 1
    assert set(tmp_path.iterdir()) <= before


def test_a_frozen_server_is_not_waited_for_long(shared_valkey: Valkey) -> None:
    settings = Settings(redis_url=shared_valkey.url)
    client = broker.connect(settings)
    client.ping()

    async def send() -> bool:
        async with broker.connect_async(settings) as loops:
            return await TicketSender(loops).send(QUEUE)

    def send_from_a_loop() -> bool:
        return asyncio.run(send())

    def send_at_once() -> bool:
        return queue.send_tickets(client, QUEUE)

    with shared_valkey.frozen():
        for attempt in (send_at_once, send_from_a_loop):
            began = time.monotonic()
            assert attempt() is False
            # The first is one unanswered command; a new connection has its greetings to wait for as well.
            assert time.monotonic() - began < 4 * broker.ANSWER_SECONDS
    client.close()
    transport = queue.CONFIGURATION["broker_transport_options"]
    assert transport["socket_timeout"] <= 5, "Celery waits no longer either"
