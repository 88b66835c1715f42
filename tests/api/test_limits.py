"""Limits as users meet them, and what they are told of their wait."""

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from sqlalchemy import update
from sqlalchemy.orm import Session

from api import outlook
from neural_mri.backing import jobs, limits, models, residences
from neural_mri.backing.events import HeldModel, WorkerBeat, beat
from neural_mri.backing.jobs import Submission, Submitted
from neural_mri.backing.rows import JOBS
from neural_mri.backing.settings import Settings
from neural_mri.contract.auth import Scope
from neural_mri.contract.jobs import JobState
from neural_mri.contract.models import ModelState
from tests.api.keyed import Door, keyed
from tests.api.reading import follow
from tests.api.world import World

ADMIN = (Scope.ADMIN,)


@pytest.fixture(scope="module")
def shared_door(shared_settings: Settings) -> Iterator[Door]:
    with keyed(shared_settings, user_max_jobs=3, user_daily_seconds=100.0) as door:
        yield door


@pytest.fixture
def door(shared_door: Door, world: World) -> Door:
    return shared_door


def ask(api: httpx.Client, prompt: str) -> httpx.Response:
    return api.post("/api/scan/activation", json={"prompt": prompt})


def test_beyond_the_limit_a_request_is_told_when_to_come_again(door: Door, world: World) -> None:
    with door.user(world, "ada") as ada, door.user(world, "bob") as bob:
        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(lambda n: ask(ada, f"a {n}"), range(8)))
        assert sorted(answer.status_code for answer in answers) == [202] * 3 + [429] * 5
        refused = next(answer for answer in answers if answer.status_code == 429)
        assert refused.headers["retry-after"] == "1"
        assert refused.json()["type"] == "urn:neural-mri:problem:too-many"
        assert (refused.json()["in_flight"], refused.json()["limit"]) == (3, 3)
        assert ask(bob, "a").status_code == 202
        world.perform(world.claim(world.queue()))
        assert ask(ada, "once more").status_code == 202


def test_a_key_that_met_a_lost_result_and_no_room_is_good_for_another_try(
    door: Door, world: World
) -> None:
    with door.user(world, "ada") as ada, door.user(world, "bob") as bob:
        ask(bob, "a")
        done = world.perform(world.claim(world.queue()))
        under_way = [ask(ada, f"a {n}").json()["id"] for n in range(3)]
        world.harm(done, "activations")
        word = {"idempotency-key": "nightly"}

        def again() -> httpx.Response:
            return ada.post("/api/scan/activation", json={"prompt": "a"}, headers=word)

        assert again().status_code == 429
        assert again().status_code == 429
        assert ada.delete(f"/api/jobs/{under_way[0]}").status_code == 200
        first = again()
        assert (first.status_code, first.json()["state"]) == (202, "queued")
        assert again().json()["id"] == first.json()["id"]


def test_a_day_of_computing_is_refused_until_some_of_it_is_a_day_ago(
    door: Door, world: World
) -> None:
    with door.user(world, "ada") as ada:
        ask(ada, "a")
        world.perform(world.claim(world.queue()))
        with world.sessions.writing() as session:
            ended = JOBS.c.finished_at - 86_000.0
            session.execute(update(JOBS).values(finished_at=ended, started_at=ended - 120.0))
        usage = ada.get("/api/usage").json()
        assert usage["seconds_today"] == pytest.approx(120.0, abs=0.1)
        assert (usage["daily_seconds"], usage["max_jobs"], usage["in_flight"]) == (100.0, 3, 0)
        refused = ask(ada, "b")
        assert refused.status_code == 429
        assert int(refused.headers["retry-after"]) == pytest.approx(400, abs=5)
        assert ask(ada, "a").json()["cached"], "what is known costs nothing"


def test_a_days_jobs_are_summed_up_in_a_thread(
    door: Door, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    where: list[str] = []
    submit_once = jobs.submit_once

    def noted(session: Session, submission: Submission, **options: Any) -> Submitted:
        where.append(threading.current_thread().name)
        return submit_once(session, submission, **options)

    monkeypatch.setattr(jobs, "submit_once", noted)
    with door.user(world, "ada") as ada:
        assert ask(ada, "a").status_code == 202
    assert len(where) == 1
    assert where[0].startswith("database-writer")


def test_so_are_those_of_a_user_who_alone_has_such_a_limit_and_nobody_elses(
    shared_settings: Settings, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[str] = []
    summed = limits._seconds

    def noted(session: Session, user: str) -> float:
        threads.append(threading.current_thread().name)
        return summed(session, user)

    monkeypatch.setattr(limits, "_seconds", noted)
    with (
        keyed(shared_settings, user_max_jobs=100) as door,
        door.user(world, "root", ADMIN) as root,
        door.user(world, "ada") as ada,
        door.user(world, "bob") as bob,
    ):
        path = "/api/users/ada/limits"
        assert root.put(path, json={"daily_seconds": 50.0}).json()["daily_seconds"] == 50.0
        threads.clear()
        for number in range(3):
            assert ask(ada, f"a {number}").status_code == 202
            assert ask(bob, f"b {number}").status_code == 202
        assert len(threads) == 3, "ada's, at each of hers"
        assert all(name.startswith("database-writer") for name in threads)
        world.perform(world.claim(world.queue()))
        with world.sessions.writing() as session:
            began = JOBS.c.finished_at - 60.0
            session.execute(update(JOBS).values(started_at=began))
        assert ask(ada, "a 3").status_code == 429
        assert root.put(path, json={"daily_seconds": None}).json()["daily_seconds"] is None
        assert ask(ada, "a 3").status_code == 202


def test_an_admin_gives_a_user_limits_of_their_own(door: Door, world: World) -> None:
    with door.user(world, "root", ADMIN) as root, door.user(world, "ada") as ada:
        path = "/api/users/ada/limits"
        assert ada.put(path, json={"max_jobs": 100}).status_code == 403
        assert ada.get("/api/users").status_code == 403
        assert root.put(path, json={"max_jobs": 1}).json()["max_jobs"] == 1
        assert [ask(ada, f"a {n}").status_code for n in range(2)] == [202, 429]
        users = {each["user"]: each for each in root.get("/api/users").json()}
        assert (users["ada"]["in_flight"], users["ada"]["max_jobs"]) == (1, 1)
        assert users["root"]["max_jobs"] == 3
        assert root.put(path, json={"max_jobs": 0}).json()["max_jobs"] is None
        assert ask(ada, "a 2").status_code == 202
        for wrong in ({"max_jobs": -1}, {"max_jobs": "many"}, {"jobs": 1}):
            assert root.put(path, json=wrong).status_code == 400


def test_at_ones_own_machine_only_the_queue_itself_has_a_bound(
    api: httpx.Client, world: World
) -> None:
    assert [ask(api, f"a {n}").status_code for n in range(6)] == [202] * 6
    assert api.get("/api/usage").json()["max_jobs"] is None


# Waiting


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """No look at a queue serves two questions."""
    monkeypatch.setattr(outlook, "KEPT_SECONDS", 0.0)


def hold(world: World) -> None:
    model = world.sessions.read(models.get, "tiny")
    assert model is not None
    world.hold(model)


def test_a_waiting_job_says_where_it_stands_and_when_it_starts(
    api: httpx.Client, world: World, fresh: None
) -> None:
    ids = [ask(api, f"a {n}").json()["id"] for n in range(3)]
    seen = api.get(f"/api/jobs/{ids[2]}").json()["queue"]
    assert seen == {"position": 3, "estimated_start_seconds": None}, "no worker holds the model"
    world.perform(world.claim(world.queue()))
    with world.sessions.writing() as session:
        ran = JOBS.c.started_at.is_not(None)
        session.execute(update(JOBS).where(ran).values(started_at=JOBS.c.finished_at - 2.0))
    hold(world)
    seen = api.get(f"/api/jobs/{ids[2]}").json()["queue"]
    assert (seen["position"], seen["estimated_start_seconds"]) == (2, pytest.approx(2.0, abs=0.1))
    world.claim(world.queue())
    assert api.get(f"/api/jobs/{ids[1]}").json()["queue"] is None


@pytest.mark.parametrize(
    ("free_bytes", "state"),
    [(1 << 40, None), (10, None), (10, ModelState.LOADING)],
    ids=["room for it", "no room", "being loaded"],
)
def test_who_waits_for_a_model_is_told_how_long_loading_takes(
    api: httpx.Client,
    world: World,
    fresh: None,
    free_bytes: int,
    state: ModelState | None,
) -> None:
    job_id = ask(api, "a").json()["id"]
    model = world.sessions.read(models.get, "tiny")
    assert model is not None
    loading = [HeldModel(name="tiny", revision=model.revision, state=state)] if state else []
    beat(
        world.redis,
        WorkerBeat(
            worker="w",
            device="cpu",
            models=tuple(loading),
            budget_bytes=1 << 40,
            free_bytes=free_bytes,
            at=time.time(),
        ),
    )
    seconds = api.get(f"/api/jobs/{job_id}").json()["queue"]["estimated_start_seconds"]
    cost = residences.estimate(model.n_parameters, model.weights_bytes, "float32")
    nobody_knows = state is None and free_bytes < cost.memory_bytes
    assert seconds == (None if nobody_knows else pytest.approx(cost.load_seconds, abs=0.01))


def test_a_reader_hears_of_its_place_at_most_once_a_second_and_only_of_changes(
    api: httpx.Client, world: World
) -> None:
    first, second = (ask(api, f"a {n}").json()["id"] for n in range(2))
    hold(world)

    def work() -> None:
        time.sleep(2.3)
        world.move(world.claim(world.queue()), JobState.FAILED)
        time.sleep(2.2)
        job = world.claim(world.queue())
        assert str(job.id) == second
        world.move(job, JobState.FAILED)

    began = time.monotonic()
    with follow(api, f"/api/jobs/{second}/events") as stream, world.beside(work):
        heard = [(message, time.monotonic() - began) for message in stream]
    told = [(message.data, at) for message, at in heard if message.name == "queue"]
    assert [data["position"] for data, _ in told] == [2, 1]
    assert told[0][1] >= 1.0
    assert {data["job"] for data, _ in told} == {second}
    # It moves no cursor: whoever resumes after it misses nothing.
    messages = [message for message, _ in heard]
    place = next(message for message in messages if message.name == "queue")
    with follow(api, f"/api/jobs/{second}/events", place.id) as stream:
        resumed = [message.name for message in stream]
    assert resumed == ["state", "ended"]
    assert [message.name for message in messages] == ["state", "queue", "queue", "state", "ended"]
    assert first != second


def test_many_who_ask_are_told_by_one_look(api: httpx.Client, world: World) -> None:
    time.sleep(outlook.KEPT_SECONDS)
    ids = [ask(api, f"a {n}").json()["id"] for n in range(20)]
    with ThreadPoolExecutor(8) as pool:
        places = list(pool.map(lambda i: api.get(f"/api/jobs/{i}").json()["queue"], ids))
    assert [place["position"] for place in places] == list(range(1, 21))
    assert len(world.sessions.read(jobs.recent, "local")) == 20
