"""Equal scans under way, as those who asked for them see it."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from uuid import UUID

import httpx
import msgspec
import pytest

from api.hub import Frame, Hub, Position
from neural_mri.backing import jobs, keys
from neural_mri.backing.records import Job
from neural_mri.backing.settings import Settings
from neural_mri.contract.events import Artifact
from neural_mri.contract.jobs import JobState
from tests.api.conftest import settings_in
from tests.api.keyed import Door, keyed
from tests.api.reading import Message, Unanswered, follow, read_all
from tests.api.specimens import PROMPT
from tests.api.world import World, serving
from tests.servers import Template, Valkey
from tests.tiny import save_tiny_model
from worker import modelstore

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def shared_door(shared_settings: Settings) -> Iterator[Door]:
    with keyed(shared_settings) as door:
        yield door


class Pair(NamedTuple):
    """ada's scan, and bob's equal one, which follows it."""

    ada: httpx.Client
    bob: httpx.Client
    first: str
    second: str


@pytest.fixture
def pair(shared_door: Door, world: World) -> Iterator[Pair]:
    with shared_door.user(world, "ada") as ada, shared_door.user(world, "bob") as bob:
        yield Pair(ada, bob, scan(ada), scan(bob))


def scan(api: httpx.Client, prompt: str = PROMPT) -> str:
    answer = api.post("/api/scan/activation", json={"prompt": prompt})
    assert answer.status_code == 202, answer.text
    return str(answer.json()["id"])


def followers(world: World, job_id: str) -> list[Job]:
    """bob's scans that follow another's."""
    recent = world.sessions.read(jobs.recent, "bob")
    return [job for job in recent if job.leader == UUID(job_id)]


def seen(api: httpx.Client, job_id: str) -> dict[str, Any]:
    view: dict[str, Any] = api.get(f"/api/jobs/{job_id}").json()
    return view


def names(messages: list[Message]) -> list[str]:
    return [message.name for message in messages]


def told(messages: list[Message]) -> list[int]:
    return [m.data["token_idx"] for m in messages if m.name == "activation_frame"]


def begun(world: World) -> Job:
    return world.move(world.claim(world.queue()), JobState.RUNNING)


def finished(world: World, job: Job) -> None:
    """A worker stores and ends what it has begun."""
    world.move(job, JobState.STORING)
    manifest = f"packed/{job.id}.{job.attempt}.result"
    artifact = Artifact(table="activations", url=f"/api/jobs/{job.id}/result/activations", bytes=1)
    world.publisher.publish(job.id, artifact)
    world.move(job, JobState.SUCCEEDED, manifest=manifest)


def heard_to_the_end(api: httpx.Client, path: str, world: World, job: Job) -> list[Message]:
    """What a reader is told who comes after a job's first frame, and stays for its second and its end."""
    with follow(api, path) as stream:
        heard = [next(stream) for _ in range(4)]
        world.frame(job, 1)
        finished(world, job)
        return heard + list(stream)


def test_who_follows_hears_the_end_from_a_database_that_was_away_when_it_came(
    pair: Pair, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = begun(world)
    world.frame(job, 0)
    with follow(pair.bob, f"/api/jobs/{pair.second}/events") as stream:
        heard = [next(stream) for _ in range(4)]
        away = Unanswered(monkeypatch, jobs, "get", times=3)
        finished(world, job)
        heard += list(stream)
    assert (heard[-1].name, heard[-1].data["state"], away.left) == ("ended", "succeeded", 0)
    assert names(heard).count("ended") == 1
    assert names(heard).count("artifact") == 1


def test_who_follows_sees_the_work_where_it_stands(pair: Pair, world: World) -> None:
    for api, job_id, coalesced in ((pair.ada, pair.first, False), (pair.bob, pair.second, True)):
        assert (seen(api, job_id)["state"], seen(api, job_id)["coalesced"]) == ("queued", coalesced)
    begun(world)
    for api, job_id in ((pair.ada, pair.first), (pair.bob, pair.second)):
        view = seen(api, job_id)
        assert view["state"] == "running"
        assert view["started_at"] is not None
        assert [job["state"] for job in api.get("/api/jobs?state=running").json()] == ["running"]
    # Each sees their own job alone: nothing says whose work it waits for.
    assert pair.first not in pair.bob.get(f"/api/jobs/{pair.second}").text


def test_who_follows_hears_it_all_as_their_own_with_an_end_of_their_own(
    pair: Pair, world: World
) -> None:
    job = begun(world)
    world.frame(job, 0)
    path = f"/api/jobs/{pair.second}/events"
    heard = heard_to_the_end(pair.bob, path, world, job)
    assert names(heard) == [
        *["state"] * 3,
        *["activation_frame"] * 2,
        "state",
        "artifact",
        "ended",
    ]
    assert {message.data["job"] for message in heard} == {pair.second}
    assert heard[-1].data["result"] == f"/api/jobs/{pair.second}/result"
    assert heard[-2].data["url"] == f"/api/jobs/{pair.second}/result/activations"
    # Whoever comes again goes on where they stopped, and not beyond the end.
    assert read_all(pair.bob, path, heard[4].id) == heard[5:]
    assert read_all(pair.bob, path) == heard
    assert pair.bob.get(path, headers={"last-event-id": heard[-1].id}).status_code == 204
    assert names(read_all(pair.ada, f"/api/jobs/{pair.first}/events")) == names(heard)


def test_what_happens_while_who_follows_catches_up_comes_before_the_end(
    pair: Pair, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = begun(world)
    page, is_over = Hub.page, False

    async def while_it_ends(hub: Hub, job_id: UUID, after: Position) -> list[Frame]:
        nonlocal is_over
        frames = await page(hub, job_id, after)
        if not is_over:  # after the page was read, before it is asked where the job stands
            is_over = True
            finished(world, job)
        return frames

    monkeypatch.setattr(Hub, "page", while_it_ends)
    with follow(pair.bob, f"/api/jobs/{pair.second}/events") as stream:
        assert names(list(stream)) == [*["state"] * 4, "artifact", "ended"]


def test_cancelling_what_others_wait_for_ends_it_for_oneself_alone(
    pair: Pair, world: World
) -> None:
    job = begun(world)
    world.frame(job, 0)
    with (
        follow(pair.ada, f"/api/jobs/{pair.first}/events") as mine,
        follow(pair.bob, f"/api/jobs/{pair.second}/events") as theirs,
    ):
        heard = [next(theirs) for _ in range(4)]
        for _ in range(4):
            next(mine)
        answer = pair.ada.delete(f"/api/jobs/{pair.first}")
        assert (answer.status_code, answer.json()["state"]) == (200, "cancelled")
        assert names(list(mine)) == ["ended"]
        assert seen(pair.bob, pair.second)["state"] == "running"
        world.frame(job, 1)
        finished(world, job)
        heard += list(theirs)
    assert told(heard) == [0, 1]
    assert heard[-1].data["state"] == "succeeded"
    assert seen(pair.ada, pair.first)["state"] == "cancelled"
    assert pair.ada.get(f"/api/jobs/{pair.first}/events").text.count("event: ended") == 1
    # The whole story can be read again, the end included.
    assert told(read_all(pair.bob, f"/api/jobs/{pair.second}/events")) == [0, 1]


def test_who_deletes_what_others_followed_takes_no_events_from_them(
    pair: Pair, world: World
) -> None:
    job = begun(world)
    world.frame(job, 0)
    assert pair.ada.delete(f"/api/jobs/{pair.first}").json()["state"] == "cancelled"
    assert pair.ada.delete(f"/api/jobs/{pair.first}/record").status_code == 200
    assert world.redis.exists(keys.watched(job.id)), "bob may be looking"
    path = f"/api/jobs/{pair.second}/events"
    heard = heard_to_the_end(pair.bob, path, world, job)
    assert (told(heard), names(heard)[-1]) == ([0, 1], "ended")
    assert "reset" not in names(heard)
    assert read_all(pair.bob, path) == heard


def test_when_all_have_gone_the_work_is_asked_to_stop(pair: Pair, world: World) -> None:
    job = begun(world)
    pair.ada.delete(f"/api/jobs/{pair.first}")
    answer = pair.bob.delete(f"/api/jobs/{pair.second}")
    assert (answer.status_code, answer.json()["state"]) == (202, "running")
    assert world.redis.exists(f"cancel:{job.id}")
    with follow(pair.bob, f"/api/jobs/{pair.second}/events") as stream:
        world.move(job, JobState.CANCELLED)
        assert list(stream)[-1].data["state"] == "cancelled"


def test_when_the_first_fails_who_follows_is_told_and_tries_themselves(
    pair: Pair, world: World
) -> None:
    job = begun(world)
    with follow(pair.bob, f"/api/jobs/{pair.second}/events") as stream:
        assert names([next(stream) for _ in range(3)]) == ["state"] * 3
        world.move(job, JobState.FAILED, problem={"type": "about:blank", "detail": "no luck"})
        reset = next(stream)
        assert (reset.name, reset.data["state"]) == ("reset", "queued")
        own = world.sessions.write(
            jobs.claim, queue=world.queue(), owner=world.owner, limit=1, lease_seconds=30
        )[0]
        assert str(own.id) == pair.second
        world.frame(own, 7)
        world.move(own, JobState.RUNNING)
        world.move(own, JobState.FAILED, problem={"type": "about:blank", "detail": "again"})
        heard = list(stream)
    assert names(heard) == ["activation_frame", "state", "ended"]
    assert heard[-1].data["problem"]["detail"] == "again"
    assert read_all(pair.bob, f"/api/jobs/{pair.second}/events", reset.id)[-1] == heard[-1]


def test_who_is_cancelled_while_following_hears_of_it_at_once(pair: Pair, world: World) -> None:
    begun(world)
    with follow(pair.bob, f"/api/jobs/{pair.second}/events") as stream:
        for _ in range(3):
            next(stream)
        began = time.monotonic()
        assert pair.bob.delete(f"/api/jobs/{pair.second}").json()["state"] == "cancelled"
        assert [message.data["state"] for message in stream] == ["cancelled"]
        assert time.monotonic() - began < 1.5
    assert seen(pair.ada, pair.first)["state"] == "running"


def test_one_stream_carries_a_job_and_one_that_follows_it(api: httpx.Client, world: World) -> None:
    first, second = scan(api), scan(api)
    job = begun(world)
    path = f"/api/events?jobs={first},{second}"
    with follow(api, path) as stream:
        heard = [next(stream) for _ in range(6)]
        world.frame(job, 0)
        finished(world, job)
        heard += list(stream)
    for job_id in (first, second):
        own = [message for message in heard if message.data["job"] == job_id]
        assert names(own) == [*["state"] * 3, "activation_frame", "state", "artifact", "ended"]
    assert api.get(path, headers={"last-event-id": heard[-1].id}).status_code == 204


def test_who_waits_for_an_answer_gets_it_when_the_others_scan_is_done(
    pair: Pair, world: World
) -> None:
    def work() -> None:
        # Not before he has asked: what is done by then is no wait.
        while len(followers(world, pair.first)) < 2:
            time.sleep(0.01)
        world.perform(world.claim(world.queue()))

    with world.beside(work):
        answer = pair.bob.post(
            "/api/scan/activation", json={"prompt": PROMPT}, headers={"prefer": "wait=10"}
        )
    assert answer.status_code == 200
    assert answer.json()["state"] == "succeeded"
    assert answer.json()["coalesced"]
    assert f"/api/jobs/{answer.json()['id']}/" in str(answer.json()["result"])
    assert answer.elapsed.total_seconds() < 4


def test_the_end_is_heard_without_redis(lone_world: World) -> None:
    assert lone_world.valkey is not None
    with serving(lone_world.settings) as api:
        scan(api)
        second = scan(api)
        job = begun(lone_world)
        with follow(api, f"/api/jobs/{second}/events") as stream:
            for _ in range(3):
                next(stream)
            lone_world.valkey.kill()
            lone_world.sessions.write(jobs.advance, job.id, JobState.STORING, attempt=1)
            lone_world.sessions.write(
                jobs.advance, job.id, JobState.SUCCEEDED, attempt=1, manifest="m"
            )
            (end,) = stream
        assert (end.name, end.data["state"], end.data["job"]) == ("ended", "succeeded", second)


# A real worker


@contextmanager
def worker(settings: Settings) -> Iterator[None]:
    """A worker's process, as it is started anywhere."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("NEURAL_MRI_")}
    with (settings.folder.parent / "worker.log").open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "worker"],
            cwd=ROOT,
            env={**inherited, **settings.environment()},
            stdout=output,
            stderr=subprocess.STDOUT,
            text=True,
        )
    try:
        yield
    finally:
        process.terminate()
        process.wait(timeout=20)


def test_a_real_worker_runs_ten_equal_scans_once(
    template: Template, shared_valkey: Valkey, tmp_path: Path
) -> None:
    settings = msgspec.structs.replace(
        settings_in(template, tmp_path, shared_valkey.url), pinned_models="tiny", device="cpu"
    )
    modelstore.add(settings, "tiny", f"folder:{save_tiny_model(tmp_path / 'tiny')}")
    with serving(settings) as api, worker(settings):
        with ThreadPoolExecutor(10) as pool:
            # While the worker is still loading, so that all of them wait at once.
            ids = list(pool.map(lambda _: scan(api, "w1 w2 w3 w4 w5"), range(10)))
        streams = [read_all(api, f"/api/jobs/{job_id}/events") for job_id in ids]
        views = [seen(api, job_id) for job_id in ids]
        tables = {api.get(f"/api/jobs/{job_id}/result/activations").content for job_id in ids}
    assert {view["state"] for view in views} == {"succeeded"}, views
    assert sum(view["attempt"] for view in views) == 1
    assert sorted(view["coalesced"] for view in views) == [False] + [True] * 9
    assert not any(view["cached"] for view in views)
    assert len(tables) == 1
    for job_id, heard in zip(ids, streams, strict=True):
        assert told(heard) == list(range(5))
        assert {message.data["job"] for message in heard} == {job_id}
        assert heard[-1].data["result"] == f"/api/jobs/{job_id}/result"
