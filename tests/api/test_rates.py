"""How often one caller may ask, whichever process answers."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator

import httpx
import msgspec
import pytest

from api.rates import LOTS, Rates
from neural_mri.backing import keys
from neural_mri.backing.broker import connect_async
from neural_mri.backing.settings import Settings
from neural_mri.contract.problems import TooMany
from tests.api.keyed import Door, keyed
from tests.api.world import World
from tests.servers import free_port

MOST = 40
LOGINS = 5


@pytest.fixture
def door(shared_settings: Settings, world: World) -> Iterator[Door]:
    bounds = {"user_requests_a_minute": MOST, "login_requests_a_minute": LOGINS}
    with keyed(shared_settings, **bounds) as door:
        yield door


def statuses(client: httpx.Client, count: int, path: str = "/api/jobs") -> list[int]:
    return [client.get(path).status_code for _ in range(count)]


def test_who_asks_too_often_is_told_when_to_come_again_and_others_are_served(
    door: Door, world: World
) -> None:
    with door.user(world, "ada") as ada, door.user(world, "bob") as bob:
        assert statuses(ada, MOST) == [200] * MOST
        refused = ada.post("/api/tokenize", json={"prompt": "a"})
        assert refused.status_code == 429
        assert 1 <= int(refused.headers["retry-after"]) <= 60
        assert refused.json()["type"] == "urn:neural-mri:problem:too-many"
        assert refused.json()["limit"] == MOST
        assert statuses(bob, 2) == [200, 200]
        assert statuses(ada, 2, "/api/health") == [200, 200]
        # Another key of the same user is the same user's.
        with door.user(world, "ada") as again:
            assert statuses(again, 1) == [429]


def test_keys_are_tried_so_often_from_one_address_and_good_ones_go_on(
    door: Door, world: World
) -> None:
    with door.user(world, "ada") as ada, door.client("nmri_wrong") as wrong:
        assert statuses(wrong, 3) == [401] * 3
        tries = [ada.post("/api/login", json={"key": "nmri_wrong"}) for _ in range(3)]
        assert [answer.status_code for answer in tries] == [401, 401, 429]
        assert "retry-after" in tries[-1].headers
        assert statuses(wrong, 1) == [429]
        assert statuses(ada, 1) == [200]


def test_whoever_opens_links_is_counted_by_their_address(door: Door) -> None:
    with door.client() as guest:
        answers = [
            guest.get("/api/shared", headers={"share-token": "A" * 22}).status_code
            for _ in range(MOST + 1)
        ]
        assert set(answers[:MOST]) <= {400, 404}
        assert answers[MOST] == 429
        assert statuses(guest, 1, "/api/health") == [200]


def with_rates(settings: Settings, work: Callable[[Rates, Rates], Awaitable[None]]) -> None:
    """Two processes' worth of them, on one Redis."""

    async def run() -> None:
        one, other = connect_async(settings), connect_async(settings)
        try:
            await work(Rates(one), Rates(other))
        finally:
            await one.aclose()
            await other.aclose()

    asyncio.run(run())


async def allowed(rates: Rates, count: int, limit: int, who: str = "ada") -> int:
    """Of so many requests at once, how many."""
    answers = await asyncio.gather(
        *(rates.count(who, limit) for _ in range(count)), return_exceptions=True
    )
    refused = [answer for answer in answers if answer is not None]
    assert all(isinstance(answer, TooMany) for answer in refused), refused
    return count - len(refused)


@pytest.mark.parametrize("limit", [1, 7, 64])
def test_processes_together_allow_as_many_as_one(world: World, limit: int) -> None:
    async def work(one: Rates, other: Rates) -> None:
        counted = await asyncio.gather(allowed(one, 100, limit), allowed(other, 100, limit))
        assert sum(counted) == limit
        assert await allowed(one, 3, limit, "bob") == min(3, limit)
        assert await allowed(other, 3, 0) == 3, "0 is no bound"

    with_rates(world.settings, work)


def test_of_hundreds_of_requests_one_asks_redis(world: World) -> None:
    limit = 100 * LOTS

    async def work(one: Rates, _: Rates) -> None:
        assert await allowed(one, 1000, limit) == 1000

    world.redis.config_resetstat()
    with_rates(world.settings, work)
    assert world.redis.info("commandstats")["cmdstat_incrby"]["calls"] == 10


def test_a_minute_is_over_when_redis_says_so(world: World) -> None:
    async def work(one: Rates, _: Rates) -> None:
        assert await allowed(one, 5, 64) == 0
        await asyncio.sleep(world.redis.pttl(keys.rate("ada")) / 1000 + 0.1)
        assert await allowed(one, 1, 64) == 1
        assert 0 < world.redis.ttl(keys.rate("ada")) <= 60

    world.redis.set(keys.rate("ada"), 64, px=1000)
    with_rates(world.settings, work)


def test_where_redis_is_away_nobody_is_refused(world: World) -> None:
    async def work(one: Rates, _: Rates) -> None:
        assert await allowed(one, 500, 3) == 500

    nobody = msgspec.structs.replace(world.settings, redis_url=f"redis://127.0.0.1:{free_port()}/0")
    with_rates(nobody, work)


def test_callers_beyond_what_is_kept_in_mind_are_counted_anew(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("api.rates.MOST_CALLERS", 4)

    async def work(one: Rates, _: Rates) -> None:
        for number in range(20):
            assert await allowed(one, 2, 1, f"user-{number}") == 1
            assert len(one._callers) <= 4
        # The count itself is Redis': who was forgotten here is not let off.
        assert await allowed(one, 1, 1, "user-0") == 0

    with_rates(world.settings, work)
