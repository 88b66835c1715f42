"""Tickets: Celery messages that say "this queue has work", and nothing else.

What the work is stands in SQL. A ticket may be lost, doubled or late without harm: the reaper sends
what is missing, and one too many finds nothing to claim.

Only workers load Celery. Who sends a ticket writes the message that Celery would, by one LPUSH.
"""

import base64
import os
import socket
from collections.abc import Mapping
from enum import StrEnum
from functools import lru_cache
from types import MappingProxyType
from typing import Any
from uuid import uuid4

import msgspec
import structlog

from neural_mri.backing.broker import AWAY, AsyncRedis, SyncRedis, celery_url
from neural_mri.backing.settings import Settings

__all__ = (
    "TaskName",
    "TicketSender",
    "celery_app",
    "send_tickets",
    "take_back_tickets",
    "ticket_message",
    "waiting_tickets",
)

NUMBER = b"00000000-0000-0000-0000-000000000000"
"""Where a ticket's id goes."""

KEPT_TICKETS = 8
"""So many are left on a queue whatever is taken back: one too many costs a millisecond."""

log = structlog.get_logger(__name__)


class TaskName(StrEnum):
    """What workers are asked to do, by names that outlive any module's."""

    TICKET = "neural_mri.ticket"
    """Claim from the queue that is the only argument, and run what was claimed."""


CONFIGURATION: Mapping[str, Any] = MappingProxyType(
    {
        "accept_content": ["json"],
        "task_serializer": "json",
        "task_ignore_result": True,
        # Acknowledged late, so that a busy worker takes no further ticket than the next.
        "task_acks_late": True,
        "task_reject_on_worker_lost": True,
        "worker_prefetch_multiplier": 1,
        "task_send_sent_event": False,
        "worker_send_task_events": False,
        "worker_hijack_root_logger": False,
        "broker_connection_retry_on_startup": True,
        "broker_connection_max_retries": None,
        "broker_transport_options": {
            # SQL decides who is first: one priority, and so one list a queue.
            "priority_steps": [0],
            # Without them a worker waits for ever on a server that froze.
            "socket_timeout": 5,
            "socket_connect_timeout": 2,
            "health_check_interval": 5,
        },
    }
)


def celery_app(settings: Settings) -> Any:
    """A `celery.Celery` as we use it: JSON, no results, late acknowledgement, one list a queue."""
    from celery import Celery

    from neural_mri.backing.tickets import TicketAMQP

    app = Celery("neural_mri", broker=celery_url(settings), set_as_current=False, amqp=TicketAMQP)
    app.conf.update(CONFIGURATION)
    return app


class TicketSender:
    """Sends tickets from an event loop."""

    def __init__(self, redis: AsyncRedis) -> None:
        self._redis = redis

    async def send(self, queue: str, count: int = 1) -> bool:
        """Send tickets; whether they were sent. Never raises for Redis."""
        try:
            await self._redis.lpush(queue, *(ticket_message(queue) for _ in range(count)))
        except AWAY as error:
            log.warning("tickets_not_sent", queue=queue, count=count, error=str(error))
            return False
        return True


def send_tickets(redis: SyncRedis, queue: str, count: int = 1) -> bool:
    """Send tickets; whether they were sent. Never raises for Redis."""
    try:
        redis.lpush(queue, *(ticket_message(queue) for _ in range(count)))
    except AWAY as error:
        log.warning("tickets_not_sent", queue=queue, count=count, error=str(error))
        return False
    return True


def take_back_tickets(redis: SyncRedis, queue: str, count: int) -> None:
    """Take tickets off the queue, of work that another ticket's claim has brought along; a few stay.

    Never raises for Redis. A long queue has fewer tickets than jobs, so that those few find work, and none of
    its workers waits for the reaper to send more.
    """
    try:
        spare = waiting_tickets(redis, queue) - KEPT_TICKETS
        if spare > 0:
            redis.rpop(queue, min(count, spare))
    except AWAY as error:
        log.debug("tickets_not_taken_back", queue=queue, count=count, error=str(error))


def waiting_tickets(redis: SyncRedis, queue: str) -> int:
    """Tickets that no worker has taken yet. Raises what `broker.AWAY` names."""
    return int(redis.llen(queue))


def ticket_message(queue: str) -> bytes:
    """A ticket as kombu's Redis transport stores it: Celery's message protocol 2."""
    return _unnumbered(queue).replace(NUMBER, str(uuid4()).encode())


@lru_cache(maxsize=256)
def _unnumbered(queue: str) -> bytes:
    """A queue's tickets, each of which has another id: to write one anew takes longer than to send it."""
    number = NUMBER.decode()
    options = {"callbacks": None, "errbacks": None, "chain": None, "chord": None}
    return msgspec.json.encode(
        {
            "body": base64.b64encode(msgspec.json.encode(([queue], {}, options))).decode(),
            "content-encoding": "utf-8",
            "content-type": "application/json",
            "headers": {
                "lang": "py",
                "task": TaskName.TICKET,
                "id": number,
                "shadow": None,
                "eta": None,
                "expires": None,
                "group": None,
                "group_index": None,
                "retries": 0,
                "timelimit": [None, None],
                "root_id": number,
                "parent_id": None,
                "argsrepr": repr([queue]),
                "kwargsrepr": "{}",
                "origin": f"{os.getpid()}@{socket.gethostname()}",
                "ignore_result": None,
                "replaced_task_nesting": 0,
                "stamped_headers": None,
                "stamps": {},
            },
            "properties": {
                "correlation_id": number,
                "reply_to": str(uuid4()),
                "delivery_mode": 2,
                "delivery_info": {"exchange": "", "routing_key": queue},
                "priority": 0,
                "body_encoding": "base64",
                "delivery_tag": number,
            },
        }
    )
