"""How Celery takes tickets from Redis: what a worker has in hand stands in its memory alone.

Kombu notes each message in Redis when it is taken and strikes it out when it is acknowledged, so that another
may find it half a day after its worker was killed. That is two round trips a ticket, the first before the work
begins. A ticket is not worth them: the reaper sends another within seconds.
"""

from typing import Any

import structlog
from celery.app.amqp import AMQP
from kombu.connection import Connection
from kombu.transport import redis, virtual

__all__ = ("TicketAMQP",)

log = structlog.get_logger(__name__)


class _InHand(virtual.QoS):
    """Tickets taken and not acknowledged. Who stops puts them back, where Redis is there to take them."""

    def restore_unacked(self) -> list[Any]:
        """Put them back; what cannot be put back is no error, and nothing to keep a file of."""
        lost = super().restore_unacked()  # type: ignore[no-untyped-call]  # half of kombu has types
        if lost:
            log.info("tickets_not_put_back", count=len(lost))
        return []


class _Channel(redis.Channel):
    ack_emulation = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)  # type: ignore[no-untyped-call]  # likewise
        self.QoS = _InHand  # type: ignore[assignment]  # as kombu itself does without emulation


class _Transport(redis.Transport):
    Channel = _Channel


class _Connection(Connection):
    def get_transport_cls(self) -> type[_Transport]:
        """Ours, whatever kind of Redis the URL names."""
        return _Transport


class TicketAMQP(AMQP):  # type: ignore[misc]  # nor has Celery
    """What a Celery app sends and takes messages by."""

    Connection = _Connection
