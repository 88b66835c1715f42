"""Connections to Redis (or Valkey), which only ever tells: whatever it loses, SQL still knows.

So nobody waits for it: short time-outs, and a second try only for a connection that a restart had closed.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any
from urllib.parse import quote, unquote, urlsplit

import redis
import redis.asyncio
from redis.asyncio.retry import Retry as AsyncRetry
from redis.backoff import NoBackoff
from redis.retry import Retry

from neural_mri.backing.settings import Settings

__all__ = ("AWAY", "AsyncRedis", "SyncRedis", "celery_url", "connect", "connect_async")

SyncRedis = redis.Redis
AsyncRedis = redis.asyncio.Redis

AWAY = (redis.RedisError, OSError)
"""What redis-py raises when the server is away, frozen, or still reading its file."""

_CLOSED = (redis.ConnectionError,)

CONNECT_SECONDS = 1.0
ANSWER_SECONDS = 1.0

_OPTIONS: Mapping[str, Any] = MappingProxyType(
    {
        "socket_connect_timeout": CONNECT_SECONDS,
        "socket_timeout": ANSWER_SECONDS,
        # Whose name and version nobody reads there: to look them up takes a millisecond a connection.
        "driver_info": None,
    }
)


def connect(settings: Settings) -> SyncRedis:
    """A client that connects when first used; answers are bytes."""
    retry = Retry(NoBackoff(), 1, supported_errors=_CLOSED)
    return redis.Redis.from_url(settings.effective_redis_url, retry=retry, **_OPTIONS)


def connect_async(settings: Settings) -> AsyncRedis:
    """The same for an event loop."""
    retry = AsyncRetry(NoBackoff(), 1, supported_errors=_CLOSED)
    return redis.asyncio.Redis.from_url(settings.effective_redis_url, retry=retry, **_OPTIONS)


def celery_url(settings: Settings) -> str:
    """The same server in Celery's spelling: `unix:///path` is `redis+socket:///path` there."""
    url = settings.effective_redis_url
    parts = urlsplit(url)
    if parts.scheme != "unix":
        return url
    database = next(
        (
            value
            for name, _, value in (p.partition("=") for p in parts.query.split("&"))
            if name == "db"
        ),
        "0",
    )
    return f"redis+socket://{quote(unquote(parts.path))}?virtual_host={database}"
