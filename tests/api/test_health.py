"""Health."""

from typing import Any

import httpx
import pytest

from neural_mri import __version__
from neural_mri.backing import jobs, models
from neural_mri.contract.problems import Unavailable
from tests.api.specimens import PROMPT
from tests.api.world import World, serving


def test_health_tells_what_the_service_stands_on_and_whether_it_is_ready(
    lone_world: World,
) -> None:
    assert lone_world.valkey is not None
    with serving(lone_world.settings) as api:
        waiting = api.get("/api/health")
        assert waiting.status_code == 200
        assert waiting.json() == {
            "status": "waiting",
            "version": __version__,
            "database": "up",
            "redis": "up",
            "workers": [],
            "models": [{"name": "tiny", "state": "available", "queued": 0}],
            "queued": 0,
            "streams": 0,
        }
        model = lone_world.sessions.read(models.get, "tiny")
        assert model is not None
        lone_world.hold(model)
        api.post("/api/scan/activation", json={"prompt": PROMPT})
        ready = api.get("/api/health").json()
        assert (ready["status"], ready["queued"]) == ("ready", 1)
        assert ready["models"] == [{"name": "tiny", "state": "resident", "queued": 1}]
        assert ready["workers"][0]["worker"] == "worker-1"

        lone_world.valkey.kill()
        degraded = api.get("/api/health")
        assert degraded.status_code == 200
        assert (degraded.json()["status"], degraded.json()["redis"]) == ("degraded", "away")
        # Work is still taken: the reaper sends the ticket when Redis is back.
        accepted = api.post("/api/scan/activation", json={"prompt": "The"})
        assert accepted.status_code == 202


def test_without_its_database_the_service_says_so_and_asks_to_come_again(
    api: httpx.Client, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def be_away(*_arguments: Any, **_more: Any) -> None:
        raise Unavailable("the database does not answer")

    monkeypatch.setattr(models, "all", be_away)
    monkeypatch.setattr(jobs, "submit", be_away)
    down = api.get("/api/health")
    assert (down.status_code, down.json()["status"]) == (503, "down")
    refused = api.post("/api/scan/activation", json={"prompt": PROMPT})
    assert refused.status_code == 503
    assert refused.headers["retry-after"] == "1"
    assert refused.headers["content-type"] == "application/problem+json"
