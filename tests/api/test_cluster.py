"""What the operator and Prometheus are told."""

import re
import time
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from neural_mri import Client, __version__
from neural_mri.backing import models
from neural_mri.backing.settings import Settings
from neural_mri.contract.auth import Scope
from neural_mri.contract.cluster import Cluster
from neural_mri.contract.jobs import Lane
from neural_mri.contract.problems import Unavailable
from tests.api.keyed import keyed
from tests.api.specimens import PROMPT
from tests.api.world import World, serving


def cluster(api: httpx.Client) -> Cluster:
    with Client(str(api.base_url)) as client:
        return client.cluster()


def samples(api: httpx.Client) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """Every value, by its name and labels."""
    answer = api.get("/metrics")
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
    }


def value(api: httpx.Client, name: str, **labels: str) -> float | None:
    return samples(api).get((f"neural_mri_{name}", frozenset(labels.items())))


def test_what_waits_and_runs_is_told_by_model_and_lane(api: httpx.Client, world: World) -> None:
    for prompt in ("The", "The Eiffel", PROMPT):
        api.post("/api/scan/activation", json={"prompt": prompt})
    api.post("/api/scan/structural", json={}, headers={"prefer": "lane=batch"})
    lanes = {load.lane for load in cluster(api).queues}
    assert Lane.INTERACTIVE in lanes
    world.claim(world.queue())
    loads = cluster(api).queues
    scans = next(load for load in loads if load.queue == world.queue())
    assert (scans.model, scans.waiting, scans.running) == ("tiny", 2, 1)
    assert 0 < scans.oldest_seconds < 20
    assert value(api, "jobs_running", model="tiny", lane="interactive") == 1
    waiting = value(api, "jobs_waiting", model="tiny", lane="interactive")
    assert waiting == sum(load.waiting for load in loads)
    age = value(api, "jobs_oldest_wait_seconds", model="tiny", lane="interactive")
    assert age is not None
    assert 0 < age < 20


def test_a_queue_without_work_is_not_told_of(api: httpx.Client, world: World) -> None:
    api.post("/api/scan/activation", json={"prompt": PROMPT})
    world.perform(world.claim(world.queue()))
    assert cluster(api).queues == ()
    assert value(api, "jobs_waiting", model="tiny", lane="interactive") is None


def test_workers_tell_what_they_hold(api: httpx.Client, world: World) -> None:
    model = world.sessions.read(models.get, "tiny")
    assert model is not None
    world.hold(model)
    told = cluster(api)
    assert told.workers is not None
    (worker,) = told.workers
    assert (worker.worker, worker.device) == ("worker-1", "cpu")
    assert [(held.name, held.memory_bytes) for held in worker.models] == [("tiny", 5000)]
    assert told.versions.service == __version__
    assert re.fullmatch(r"(sqlite|postgresql) \d+(\.\d+)+", told.versions.database)
    assert re.fullmatch(r"\d+\.\d+\.\d+", told.versions.redis or "")
    assert value(api, "workers") == 1
    assert value(api, "model_copies", model="tiny", state="resident") == 1
    assert (worker.budget_bytes, worker.free_bytes) == (9000, 4000)
    assert [(held.pinned, held.held_seconds) for held in worker.models] == [(True, 12.5)]


def test_while_redis_is_away_workers_are_unknown_rather_than_none(lone_world: World) -> None:
    assert lone_world.valkey is not None
    with serving(lone_world.settings) as api:
        lone_world.valkey.kill()
        told = api.get("/api/cluster").json()
        assert (told["workers"], told["versions"]["redis"]) == (None, None)
        assert value(api, "up", part="redis") == 0
        assert value(api, "up", part="database") == 1
        assert value(api, "workers") is None


def test_without_its_database_the_metrics_say_so(
    api: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    def be_away(*_: Any) -> None:
        raise Unavailable("the database does not answer")

    monkeypatch.setattr("neural_mri.backing.loads.loads", be_away)
    assert value(api, "up", part="database") == 0
    assert api.get("/api/cluster").status_code == 503


def test_who_asked_a_moment_ago_is_told_that_the_database_is_away_that_knows_the_keys(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (
        keyed(world.settings) as door,
        door.user(world) as known,
        door.user(world, "eve") as new,
        door.client("nmri_nobodys") as nobody,
    ):
        assert value(known, "up", part="database") == 1

        def be_away(*_: Any) -> None:
            raise Unavailable("the database does not answer")

        with monkeypatch.context() as patched:
            patched.setattr("neural_mri.backing.access.authenticate", be_away)
            patched.setattr("neural_mri.backing.loads.loads", be_away)
            assert value(known, "up", part="database") == 0
            assert new.get("/metrics").status_code == 503
            assert nobody.get("/metrics").status_code == 503
            assert known.get("/api/jobs").status_code == 503, "that is for who watches alone"
        monkeypatch.setattr("api.access.KNOWN_SECONDS", -1.0)
        assert value(known, "up", part="database") == 1
        monkeypatch.setattr("neural_mri.backing.access.authenticate", be_away)
        assert known.get("/metrics").status_code == 503, "it was too long ago"


def test_requests_are_counted_by_route_and_never_by_id(api: httpx.Client, world: World) -> None:
    job = api.post("/api/scan/activation", json={"prompt": PROMPT}).json()["id"]
    route = "/api/jobs/{job_id}"
    before = value(api, "requests_total", route=route, method="GET", status="200") or 0
    for _ in range(3):
        api.get(f"/api/jobs/{job}")
    assert value(api, "requests_total", route=route, method="GET", status="200") == before + 3
    assert (value(api, "request_seconds_count", route=route, method="GET") or 0) >= before + 3
    api.get("/no/such/page")
    assert value(api, "requests_total", route="none", method="GET", status="404")
    text = api.get("/metrics").text
    assert job not in text
    assert "Eiffel" not in text


def test_results_that_were_known_are_told_from_those_to_be_computed(
    api: httpx.Client, world: World
) -> None:
    def count(answer: str) -> float:
        return value(api, "jobs_accepted_total", kind="scan", answer=answer) or 0

    before = {answer: count(answer) for answer in ("queued", "followed", "stored")}
    for _ in range(2):
        api.post("/api/scan/activation", json={"prompt": PROMPT})
    world.perform(world.claim(world.queue()))
    api.post("/api/scan/activation", json={"prompt": PROMPT})
    assert {answer: count(answer) - before[answer] for answer in before} == {
        "queued": 1,
        "followed": 1,
        "stored": 1,
    }


def test_who_reads_events_is_counted_while_they_read(api: httpx.Client, world: World) -> None:
    job = api.post("/api/scan/activation", json={"prompt": PROMPT}).json()["id"]
    assert value(api, "event_readers") == 0
    with api.stream("GET", f"/api/jobs/{job}/events") as stream:
        chunks = stream.iter_bytes()
        next(chunks)
        deadline = time.monotonic() + 5
        while value(api, "event_readers") != 1:
            assert time.monotonic() < deadline, "the reader is not counted"
    routes = {dict(labels).get("route") for name, labels in samples(api) if "seconds" in name}
    assert "/api/jobs/{job_id}/events" not in routes


def test_where_keys_are_needed_metrics_need_one_that_may_read(
    world: World, shared_settings: Settings
) -> None:
    with keyed(shared_settings) as door:
        with door.client() as stranger:
            assert stranger.get("/metrics").status_code == 401
            assert stranger.get("/api/cluster").status_code == 401
        with door.user(world, scopes=(Scope.SCAN_READ,)) as prometheus:
            assert prometheus.get("/metrics").status_code == 200
        with door.user(world, scopes=(Scope.MODEL_LOAD,)) as other:
            assert other.get("/metrics").status_code == 403
