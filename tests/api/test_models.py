"""Models: the registry and the heartbeats, put together."""

import httpx
import msgspec
import pytest

from neural_mri.backing import keys, models
from neural_mri.contract.jobs import JobState
from neural_mri.contract.models import ModelState
from tests.api.world import World, serving

WAIT = {"prefer": "wait=10"}


def test_a_model_is_its_row_and_what_workers_say_of_it(api: httpx.Client, world: World) -> None:
    shelved = api.get("/api/model/info").json()
    assert (shelved["name"], shelved["state"], shelved["default"]) == ("tiny", "available", True)
    assert shelved["architecture"]["n_heads"] == 4
    model = world.sessions.read(models.get, "tiny")
    assert model is not None
    world.hold(model, state=ModelState.LOADING)
    assert api.get("/api/model/info").json()["state"] == "loading"
    world.hold(model)
    held = api.get("/api/model/info?model=tiny").json()
    assert (held["state"], held["workers"], held["memory_bytes"]) == (
        "resident",
        ["worker-1"],
        5000,
    )


def test_models_are_listed_by_name(api: httpx.Client, world: World) -> None:
    world.register("another", weights="another")
    listed = api.get("/api/models").json()
    assert [(model["name"], model["default"]) for model in listed] == [
        ("another", False),
        ("tiny", True),
    ]


def test_an_unknown_model_is_refused_with_those_there_are(api: httpx.Client) -> None:
    for answer in (
        api.get("/api/model/info?model=gpt-5"),
        api.post("/api/model/load", json={"model": "gpt-5"}),
        api.delete("/api/model/unload?model=gpt-5"),
    ):
        assert answer.status_code == 422
        assert answer.json()["type"] == "urn:neural-mri:problem:unknown-model"
        assert "registered are tiny" in answer.json()["detail"]


def test_loading_is_a_job_that_any_worker_may_take(api: httpx.Client, world: World) -> None:
    accepted = api.post("/api/model/load", json={"model": "tiny"})
    assert accepted.status_code == 202
    assert accepted.json()["kind"] == "load"
    world.perform(world.claim(keys.CONTROL_QUEUE))
    with world.working(keys.CONTROL_QUEUE):
        loaded = api.post("/api/model/load", json={"model": "tiny"}, headers=WAIT)
    assert loaded.status_code == 200
    assert (loaded.json()["state"], loaded.json()["result"]) == ("succeeded", None)
    result = api.get(f"{loaded.headers['location']}/result")
    assert result.status_code == 409
    assert "a load job has no result" in result.json()["detail"]


@pytest.mark.parametrize("by", ["query", "body"])
def test_unloading_is_a_job_that_does_not_wait_for_who_held_the_model(
    api: httpx.Client, world: World, by: str
) -> None:
    model = world.sessions.read(models.get, "tiny")
    assert model is not None
    world.hold(model)
    if by == "query":
        answer = api.delete("/api/model/unload?model=tiny")
    else:
        answer = api.request("DELETE", "/api/model/unload", json={"model": "tiny"})
    assert answer.status_code == 202
    assert answer.json()["kind"] == "unload"
    assert world.claim(keys.CONTROL_QUEUE).kind == "unload"


def test_what_nobody_holds_is_not_unloaded_and_not_loaded_again(
    api: httpx.Client, world: World
) -> None:
    answer = api.delete("/api/model/unload?model=tiny")
    assert answer.status_code == 409
    model = world.sessions.read(models.get, "tiny")
    assert model is not None
    assert not model.wanted


def test_a_pinned_model_stays(world: World) -> None:
    with serving(msgspec.structs.replace(world.settings, pinned_models="tiny")) as api:
        answer = api.delete("/api/model/unload?model=tiny")
        assert api.get("/api/model/info").json()["pinned"] is True
    assert answer.status_code == 409
    assert answer.json()["type"] == "urn:neural-mri:problem:model-busy"


def test_a_model_that_cannot_be_loaded_is_refused_to_who_waits(
    api: httpx.Client, world: World
) -> None:
    def refuse() -> None:
        job = world.claim(keys.CONTROL_QUEUE)
        world.move(job, JobState.FAILED, problem={"status": 422, "title": "No", "type": "x"})

    with world.beside(refuse):
        answer = api.post("/api/model/load", json={"model": "tiny"}, headers=WAIT)
    assert answer.status_code == 422
    assert answer.json()["title"] == "No"
