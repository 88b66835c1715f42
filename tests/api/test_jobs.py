"""Jobs: looking at them, and stopping them."""

from uuid import UUID

import httpx
import pytest
from sqlalchemy import update

from neural_mri.backing import jobs, keys, stored
from neural_mri.backing.rows import JOBS
from neural_mri.contract.jobs import JobKind, JobState
from tests.api.reading import read_all
from tests.api.specimens import PROMPT
from tests.api.world import World


def scan(api: httpx.Client, prompt: str = PROMPT) -> str:
    return str(api.post("/api/scan/activation", json={"prompt": prompt}).json()["id"])


def test_a_job_is_seen_as_it_stands(api: httpx.Client, world: World) -> None:
    job_id = scan(api)
    assert api.get(f"/api/jobs/{job_id}").json()["state"] == "queued"
    job = world.claim(world.queue())
    seen = api.get(f"/api/jobs/{job_id}").json()
    assert (seen["state"], seen["attempt"]) == ("claimed", 1)
    assert set(seen["links"]) == {"self", "events"}
    world.perform(job)
    seen = api.get(f"/api/jobs/{job_id}").json()
    assert (seen["state"], seen["links"]["result"]) == (
        "succeeded",
        f"/api/jobs/{job_id}/result",
    )


def test_jobs_are_listed_newest_first_by_state_if_wished(api: httpx.Client, world: World) -> None:
    ids = [scan(api, f"a {n}") for n in range(3)]
    world.claim(world.queue())
    assert [job["id"] for job in api.get("/api/jobs").json()] == ids[::-1]
    assert [job["id"] for job in api.get("/api/jobs?limit=1").json()] == ids[-1:]
    assert [job["id"] for job in api.get("/api/jobs?state=claimed").json()] == ids[:1]
    assert api.get("/api/jobs?state=failed").json() == []
    for query in ("state=asleep", "limit=0", "limit=201", "limit=x"):
        assert api.get(f"/api/jobs?{query}").status_code == 400


def test_every_job_is_found_page_by_page_and_a_page_by_another_users_job_is_not(
    api: httpx.Client, world: World
) -> None:
    ids = [scan(api, f"a {n}") for n in range(7)][::-1]
    with world.sessions.writing() as session:
        # Of one moment: what tells them apart is the id.
        session.execute(update(JOBS).where(JOBS.c.id != UUID(ids[0])).values(created_at=1.0))
    pages, after = [], ""
    while page := [job["id"] for job in api.get(f"/api/jobs?limit=3{after}").json()]:
        pages.append(page)
        after = f"&after={page[-1]}"
    assert pages == [ids[:3], ids[3:6], ids[6:]]
    with world.sessions.writing() as session:
        session.execute(update(JOBS).where(JOBS.c.id == UUID(ids[0])).values(owner="bob"))
    for unknown in (ids[0], "00000000-0000-0000-0000-000000000000"):
        assert api.get(f"/api/jobs?after={unknown}").status_code == 404
    assert api.get("/api/jobs?after=x").status_code == 400


def test_jobs_are_found_by_the_key_of_their_scan_or_its_first_digits(
    api: httpx.Client, world: World
) -> None:
    first, again, other = scan(api, "a 1"), scan(api, "a 1"), scan(api, "a 2")
    with world.sessions.reading() as session:
        keys_of = {str(job.id): job.scan_key or "" for job in jobs.recent(session, "local")}
    assert keys_of[first] == keys_of[again] != keys_of[other]
    for key in (keys_of[first], keys_of[first][:16]):
        found = api.get(f"/api/jobs?scan_key={key}").json()
        assert [job["id"] for job in found] == [again, first]
        older = api.get(f"/api/jobs?scan_key={key}&after={again}").json()
        assert [job["id"] for job in older] == [first]
    assert api.get(f"/api/jobs?scan_key={'0' * 64}").json() == []
    for wrong in (keys_of[first][:15], "G" * 16, "0" * 65, "%25" * 16):
        assert api.get(f"/api/jobs?scan_key={wrong}").status_code == 400


def test_a_queued_job_is_cancelled_at_once_and_its_stream_ends(
    api: httpx.Client, world: World
) -> None:
    job_id = scan(api)
    answer = api.delete(f"/api/jobs/{job_id}")
    assert answer.status_code == 200
    assert answer.json()["state"] == "cancelled"
    messages = read_all(api, f"/api/jobs/{job_id}/events")
    assert [message.name for message in messages] == ["state", "ended"]
    assert messages[-1].data["state"] == "cancelled"


def test_a_running_job_is_asked_to_stop(api: httpx.Client, world: World) -> None:
    job_id = scan(api)
    job = world.claim(world.queue())
    answer = api.delete(f"/api/jobs/{job_id}")
    assert answer.status_code == 202
    assert answer.json()["state"] == "claimed"
    assert world.job(job_id).cancel_requested
    assert world.redis.exists(keys.cancel_flag(job.id))
    world.move(job, JobState.CANCELLED)
    again = api.delete(f"/api/jobs/{job_id}")
    assert (again.status_code, again.json()["state"]) == (200, "cancelled")


def test_a_finished_job_stays_as_it_is(api: httpx.Client, world: World) -> None:
    job_id = scan(api)
    world.perform(world.claim(world.queue()))
    answer = api.delete(f"/api/jobs/{job_id}")
    assert (answer.status_code, answer.json()["state"]) == (200, "succeeded")


@pytest.mark.parametrize(
    "rest", ["", "/events", "/result", "/manifest", "/result/activations", "/attention/0"]
)
def test_somebody_elses_job_does_not_exist(api: httpx.Client, world: World, rest: str) -> None:
    theirs = world.sessions.write(
        jobs.submit,
        jobs.Submission(
            owner="somebody else",
            kind=JobKind.LOAD,
            model="tiny",
            revision="0" * 64,
            queue=keys.CONTROL_QUEUE,
            request=b"{}",
        ),
    )
    nobodys = "01a208e5-620a-7f6d-98da-3f510d18b436"
    answers = [api.get(f"/api/jobs/{job_id}{rest}") for job_id in (theirs.id, nobodys)]
    for answer in answers:
        assert answer.status_code == 404
        assert answer.json()["type"] == "urn:neural-mri:problem:unknown-job"
    assert api.delete(f"/api/jobs/{theirs.id}").status_code == 404
    assert not world.job(str(theirs.id)).cancel_requested
    assert api.get("/api/jobs").json() == []


def finished(api: httpx.Client, world: World, prompt: str = PROMPT) -> str:
    job_id = scan(api, prompt)
    world.perform(world.claim(world.queue()))
    return job_id


def test_a_job_that_has_ended_is_deleted_with_its_events_and_that_is_recorded(
    api: httpx.Client, world: World
) -> None:
    job_id = finished(api, world)
    told = keys.event_stream(UUID(job_id))
    assert world.redis.exists(told)
    deleted = api.delete(f"/api/jobs/{job_id}/record")
    assert (deleted.status_code, deleted.json()) == (200, {"id": job_id, "sessions": []})
    for path in ("", "/result", "/manifest", "/record"):
        method = "DELETE" if path == "/record" else "GET"
        assert api.request(method, f"/api/jobs/{job_id}{path}").status_code == 404
    assert api.get("/api/jobs").json() == []
    assert not world.redis.exists(told)
    [entry] = api.get("/api/audit", params={"action": "job_deleted"}).json()
    assert (entry["subject"], entry["details"]["model"]) == (job_id, "tiny")
    assert 'neural_mri_deleted_total{what="job",why="asked"}' in api.get("/metrics").text
    assert api.post("/api/scan/activation", json={"prompt": PROMPT}).json()["cached"] is False


def test_one_that_is_under_way_has_to_be_cancelled_first(api: httpx.Client, world: World) -> None:
    job_id = scan(api)
    for state in ("queued", "claimed"):
        refused = api.delete(f"/api/jobs/{job_id}/record")
        assert (refused.status_code, refused.json()["state"]) == (409, state)
        assert state in refused.json()["detail"]
        if state == "queued":
            job = world.claim(world.queue())
    world.perform(job)
    assert api.delete(f"/api/jobs/{job_id}").json()["state"] == "succeeded"
    assert api.get(f"/api/jobs/{job_id}/result").status_code == 200, "to stop is not to delete"


@pytest.mark.parametrize("packs", [True, False], ids=["one file", "table by table"])
def test_what_a_session_keeps_stays_and_the_answer_says_which(
    api: httpx.Client, world: World, monkeypatch: pytest.MonkeyPatch, *, packs: bool
) -> None:
    monkeypatch.setattr(world, "packs", packs)
    job_id = finished(api, world)
    made = api.post("/api/sessions", json={"name": "s", "scans": [{"job": job_id}]}).json()
    result = made["document"]["scans"][0]["result"]
    table = f"/api/sessions/{made['id']}/results/{result}/activations"
    before = api.get(table).content
    manifest = world.job(job_id).manifest
    assert api.delete(f"/api/jobs/{job_id}/record").json()["sessions"] == [made["id"]]
    assert manifest is not None
    stored.discard(world.store, manifest)
    assert not world.store.exists(manifest)
    assert api.get(table).content == before
    assert api.get(f"/api/sessions/{made['id']}/export").status_code == 200


def test_one_that_is_on_its_way_into_a_session_is_there_before_it_is_deleted(
    api: httpx.Client, world: World
) -> None:
    session = api.post("/api/sessions", json={"name": "s"}).json()["id"]
    job_id = scan(api)
    assert api.post(f"/api/sessions/{session}/scans", json={"job": job_id}).status_code == 202
    world.perform(world.claim(world.queue()))
    assert api.delete(f"/api/jobs/{job_id}/record").json()["sessions"] == [session]
    assert len(api.get(f"/api/sessions/{session}").json()["document"]["scans"]) == 1
