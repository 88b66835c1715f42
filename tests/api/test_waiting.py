"""The Prefer header, and what it says of who watches."""

from uuid import UUID

import httpx
import pytest

from api.waiting import wait_seconds
from neural_mri.backing import keys
from tests.api.reading import follow
from tests.api.world import World
from tests.system.service import until


@pytest.mark.parametrize(
    ("prefer", "seconds"),
    [
        (None, None),
        ("", None),
        ("wait=10", 10),
        ("wait=0", 0),
        ("Wait = 7", 7),
        ('wait="7"', 7),
        ("respond-async, wait=7", 7),
        ("respond-async; wait=7; foo", 7),
        ("wait=600", 60),
        ("wait=-1", None),
        ("wait=soon", None),
        ("await=5", None),
        ("respond-async", None),
    ],
)
def test_the_seconds_to_wait(prefer: str | None, seconds: int | None) -> None:
    assert wait_seconds(prefer) == seconds


def test_who_asks_without_waiting_may_watch_and_who_waits_for_the_answer_does_not(
    api: httpx.Client, world: World
) -> None:
    waits = api.post(
        "/api/scan/activation", json={"prompt": "one"}, headers={"prefer": "wait=0"}
    ).json()
    watches = api.post("/api/scan/activation", json={"prompt": "two"}).json()
    world.claim(world.queue())
    world.claim(world.queue())
    assert is_watched(world, watches["id"])
    assert not is_watched(world, waits["id"])


def test_of_two_who_ask_for_the_same_one_who_watches_is_enough(
    api: httpx.Client, world: World
) -> None:
    asked = {"prompt": "one"}
    leader = api.post("/api/scan/activation", json=asked, headers={"prefer": "wait=0"}).json()
    follower = api.post("/api/scan/activation", json=asked).json()
    assert world.job(follower["id"]).leader == UUID(leader["id"])
    assert until(lambda: is_watched(world, leader["id"]), 20)


def test_who_may_watch_a_job_that_follows_may_watch_it_when_it_is_run_itself(
    api: httpx.Client, world: World
) -> None:
    asked = {"prompt": "one"}
    leader = api.post("/api/scan/activation", json=asked, headers={"prefer": "wait=0"}).json()
    follower = api.post("/api/scan/activation", json=asked).json()
    assert until(lambda: is_watched(world, leader["id"]), 20)
    assert api.delete(f"/api/jobs/{leader['id']}").json()["state"] == "cancelled"
    claimed = world.claim(world.queue())
    assert str(claimed.id) == follower["id"]
    assert is_watched(world, follower["id"])


def test_who_follows_a_job_has_its_frames_told(api: httpx.Client, world: World) -> None:
    job = api.post(
        "/api/scan/activation", json={"prompt": "one"}, headers={"prefer": "wait=0"}
    ).json()
    assert not is_watched(world, job["id"])
    with follow(api, f"/api/jobs/{job['id']}/events") as stream:
        next(stream)
        assert is_watched(world, job["id"])
        world.redis.flushall()
        assert until(lambda: is_watched(world, job["id"]), 20)


def test_who_followed_and_left_takes_nothing_from_what_who_asked_has_said(
    api: httpx.Client, world: World
) -> None:
    job = api.post("/api/scan/activation", json={"prompt": "one"}).json()
    key = keys.watched(UUID(job["id"]))
    assert until(lambda: is_watched(world, job["id"]), 20)
    before: int = world.redis.ttl(key)
    with follow(api, f"/api/jobs/{job['id']}/events") as stream:
        next(stream)
    assert world.redis.ttl(key) >= before - 30


def is_watched(world: World, job_id: str) -> bool:
    """Whether a worker would tell of the job's frames."""
    return bool(world.redis.exists(keys.watched(UUID(job_id))))
