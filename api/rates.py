"""How many requests one caller may make within a minute, by all API processes together.

The count is Redis', and so is the minute. A process takes from it in lots and gives single requests out of
them without asking anybody, so that of a busy caller's requests one in hundreds waits for Redis, and of a
seldom one's the first. Where Redis is away nobody is refused: what must never be exceeded is bounded in SQL
(`backing.limits`).
"""

import asyncio
import math
import time

from neural_mri.backing import keys
from neural_mri.backing.broker import AWAY, AsyncRedis
from neural_mri.contract.problems import TooMany

__all__ = ("Rates",)

WINDOW_SECONDS = 60
LOTS = 32
"""In so many parts a window's requests are taken: as many processes may hold one at once."""
AWAY_SECONDS = 5.0
"""How long nobody is counted after Redis did not answer, as each question would wait again."""
MOST_CALLERS = 10_000
"""Callers a process keeps in mind; those beyond are counted anew."""


class _Caller:
    """What is left of a lot, and until when."""

    __slots__ = ("asking", "is_spent", "left", "until")

    def __init__(self) -> None:
        self.left = 0
        self.until = 0.0
        self.is_spent = False
        """Whether nothing more is to be had before `until`."""
        self.asking = asyncio.Lock()


class Rates:
    """The bounds of one process's callers."""

    def __init__(self, redis: AsyncRedis) -> None:
        self._redis = redis
        self._callers: dict[str, _Caller] = {}
        self._away_until = 0.0

    async def count(self, who: str, limit: int) -> None:
        """Count a request of somebody who may make `limit` a minute, 0 for any number. Raises `TooMany`."""
        if not limit:
            return
        caller = self._callers.get(who)
        if caller is None:
            caller = self._callers[who] = self._met()
        if caller.left > 0 and time.monotonic() < caller.until:
            caller.left -= 1
            return
        await self._ask(caller, who, limit)

    async def _ask(self, caller: _Caller, who: str, limit: int) -> None:
        # One lot for all who wait: each one's own would spend the minute on what nobody asks for.
        async with caller.asking:
            now = time.monotonic()
            if now < self._away_until:
                return
            if now >= caller.until or (caller.left == 0 and not caller.is_spent):
                try:
                    await self._take(caller, who, limit)
                except AWAY:
                    self._away_until = time.monotonic() + AWAY_SECONDS
                    return
            if caller.left > 0:
                caller.left -= 1
                return
        seconds = max(1, math.ceil(caller.until - time.monotonic()))
        raise TooMany(
            f"{limit} requests a minute are allowed: try again in {seconds} s",
            limit=limit,
            retry_after_seconds=seconds,
        )

    async def _take(self, caller: _Caller, who: str, limit: int) -> None:
        lot, key = max(1, limit // LOTS), keys.rate(who)
        async with self._redis.pipeline(transaction=True) as several:
            several.set(key, 0, ex=WINDOW_SECONDS, nx=True)
            several.incrby(key, lot)
            several.pttl(key)
            _, taken, milliseconds = await several.execute()
        caller.left = min(lot, max(0, limit - (taken - lot)))
        caller.is_spent = taken >= limit
        caller.until = time.monotonic() + milliseconds / 1000

    def _met(self) -> _Caller:
        """Somebody new, with room made for them."""
        if len(self._callers) >= MOST_CALLERS:
            now = time.monotonic()
            known = {who: each for who, each in self._callers.items() if now < each.until}
            self._callers = known if len(known) < MOST_CALLERS else {}
        return _Caller()
