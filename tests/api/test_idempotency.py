"""Idempotency-Key: a request that is sent again makes no second job."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from sqlalchemy import update

from neural_mri.backing import jobs
from neural_mri.backing.idempotency import REMEMBERED_SECONDS
from neural_mri.backing.rows import IDEMPOTENCY_KEYS
from neural_mri.backing.settings import Settings
from tests.api.keyed import Door, keyed
from tests.api.specimens import PROMPT
from tests.api.world import World

KEY = "8e03978e-40d5-43dd-bc93-6894a57f9324"


@pytest.fixture(scope="module")
def shared_door(shared_settings: Settings) -> Iterator[Door]:
    with keyed(shared_settings) as door:
        yield door


def ask(api: httpx.Client, key: str | None = KEY, **body: object) -> httpx.Response:
    headers = {} if key is None else {"idempotency-key": key}
    return api.post("/api/scan/activation", json={"prompt": PROMPT, **body}, headers=headers)


def test_the_same_request_again_is_the_same_job(api: httpx.Client, world: World) -> None:
    first, again = ask(api), ask(api)
    assert (first.status_code, again.status_code) == (202, 202)
    assert first.json() == again.json()
    # Written out in full it asks for no more than before.
    assert ask(api, aggregation="l2_norm").json()["id"] == first.json()["id"]
    world.perform(world.claim(world.queue()))
    late = ask(api).json()
    assert (late["id"], late["state"], late["cached"]) == (first.json()["id"], "succeeded", False)
    assert len(world.sessions.read(jobs.recent, "local")) == 1


def test_another_request_under_the_same_key_is_refused(api: httpx.Client, world: World) -> None:
    first = ask(api).json()["id"]
    for other in ({"prompt": "a"}, {"top_neurons": 3}):
        refused = ask(api, **other)
        assert refused.status_code == 422
        problem = refused.json()
        assert problem["type"] == "urn:neural-mri:problem:idempotency-key-reused"
        assert (problem["key"], problem["job"]) == (KEY, first)
    lane = api.post(
        "/api/scan/activation?lane=batch",
        json={"prompt": PROMPT},
        headers={"idempotency-key": KEY},
    )
    load = api.post("/api/model/load", json={"model": "tiny"}, headers={"idempotency-key": KEY})
    assert (lane.status_code, load.status_code) == (422, 422)
    assert len(world.sessions.read(jobs.recent, "local")) == 1


def test_without_a_key_or_under_another_each_request_is_its_own(
    api: httpx.Client, world: World
) -> None:
    ids = {ask(api, key).json()["id"] for key in (None, None, "one", "two")}
    assert len(ids) == 4


def test_what_was_refused_leaves_its_key_unused(api: httpx.Client, world: World) -> None:
    assert ask(api, model="none").status_code == 422
    assert ask(api).status_code == 202


def test_equal_requests_at_once_make_one_job(api: httpx.Client, world: World) -> None:
    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(lambda _: ask(api), range(24)))
    assert {answer.status_code for answer in answers} == {202}
    assert len({answer.json()["id"] for answer in answers}) == 1
    assert len(world.sessions.read(jobs.recent, "local")) == 1
    # And one event told of it, however many asked.
    (job_id,) = {answer.json()["id"] for answer in answers}
    world.claim(world.queue())
    assert world.redis.xlen(f"events:{job_id}") == 2


def test_loading_a_model_is_asked_for_once_as_well(api: httpx.Client, world: World) -> None:
    headers = {"idempotency-key": KEY}
    ids = {
        api.post("/api/model/load", json={"model": "tiny"}, headers=headers).json()["id"]
        for _ in range(2)
    }
    assert len(ids) == 1


def test_two_callers_keys_have_nothing_to_do_with_each_other(
    shared_door: Door, world: World
) -> None:
    with shared_door.user(world, "ada") as ada, shared_door.user(world, "bob") as bob:
        mine, theirs = ask(ada).json()["id"], ask(bob, prompt="a").json()["id"]
        assert mine != theirs
        assert ask(bob, prompt="a").json()["id"] == theirs


def test_a_day_later_the_key_is_forgotten(
    api: httpx.Client, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("neural_mri.backing.idempotency.FORGETS_ONE_IN", 1)
    first = ask(api).json()["id"]
    ask(api, "old")
    with world.sessions.writing() as session:
        past = IDEMPOTENCY_KEYS.c.created_at - REMEMBERED_SECONDS - 1
        session.execute(update(IDEMPOTENCY_KEYS).values(created_at=past))
    assert ask(api, prompt="a").json()["id"] != first
    with world.sessions.reading() as session:
        kept = [row.key for row in session.execute(IDEMPOTENCY_KEYS.select())]
    assert kept == [KEY]


def test_a_lost_result_is_measured_again_under_the_same_key(
    api: httpx.Client, world: World
) -> None:
    ask(api, None)
    done = world.perform(world.claim(world.queue()))
    world.harm(done, "activations")
    job = ask(api).json()
    assert (job["state"], job["cached"]) == ("queued", False)
    assert ask(api).json()["id"] == job["id"]


@pytest.mark.parametrize("key", ["", "x" * 201, "a\tb"])
def test_what_is_no_key_is_refused(api: httpx.Client, world: World, key: str) -> None:
    refused = ask(api, key)
    assert refused.status_code == 400
    assert "Idempotency-Key" in refused.json()["detail"]
