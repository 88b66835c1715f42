"""Scans: what becomes a job, what is answered at once, and what is refused before anything is queued."""

from typing import Any

import httpx
import msgspec
import pytest

from neural_mri.backing import jobs, keys
from neural_mri.contract.jobs import JobState
from neural_mri.contract.problems import PromptTooLong
from tests.api.specimens import PROMPT, TINY
from tests.api.world import World, serving

WAIT = {"prefer": "wait=10"}


def test_a_scan_is_accepted_recorded_ticketed_and_announced(
    api: httpx.Client, world: World
) -> None:
    answer = api.post("/api/scan/activation", json={"prompt": PROMPT})
    assert answer.status_code == 202
    view = answer.json()
    assert answer.headers["location"] == view["links"]["self"] == f"/api/jobs/{view['id']}"
    assert view["state"] == "queued"
    assert view["request"] == {
        "scan_mode": "fMRI",
        "model": "tiny",
        "prompt": PROMPT,
        "layers": "all",
        "aggregation": "l2_norm",
        "include_residual": True,
        "token_positions": "all",
        "top_neurons": 10,
        "top_predictions": 10,
        "canonical": False,
        "calibration": None,
    }
    job = world.claim(world.queue())
    assert str(job.id) == view["id"]
    assert job.tokens is not None
    assert job.tokens.texts == ("<|begin|>", "The", " Eiffel", " Tower", " is", " in", " Paris")
    first = world.redis.xrange(keys.event_stream(job.id), count=1)
    assert first[0][1][b"k"] == b"state"


def test_a_structural_scan_goes_where_no_model_is_needed(api: httpx.Client, world: World) -> None:
    world.register("unheld", weights="unheld", wanted=False)
    answer = api.post("/api/scan/structural", json={"model": "unheld"})
    assert answer.status_code == 202
    assert world.claim(keys.CPU_QUEUE).model == "unheld"


def test_who_prefers_to_wait_is_answered_with_the_result(api: httpx.Client, world: World) -> None:
    with world.working(world.queue()):
        answer = api.post("/api/scan/activation", json={"prompt": PROMPT}, headers=WAIT)
    assert answer.status_code == 200
    assert answer.headers["preference-applied"] == "wait=10"
    finished = answer.json()
    assert finished["state"] == "succeeded"
    assert finished["result"]["scan_mode"] == "fMRI"
    assert finished["result"]["prompt_tokens"][1] == "The"
    assert finished["result"] == api.get(finished["links"]["result"]).json()


def test_who_waits_in_vain_is_told_where_to_look(api: httpx.Client) -> None:
    answer = api.post("/api/scan/activation", json={"prompt": PROMPT}, headers={"prefer": "wait=1"})
    assert answer.status_code == 202
    assert answer.elapsed.total_seconds() >= 1
    assert answer.headers["preference-applied"] == "wait=1"
    assert answer.json()["state"] == "queued"


def test_a_scan_whose_result_is_known_is_born_succeeded(api: httpx.Client, world: World) -> None:
    request = {"prompt": PROMPT, "layers": ["blocks.0.mlp"]}
    first = api.post("/api/scan/activation", json=request).json()
    world.perform(world.claim(world.queue()))
    again = api.post("/api/scan/activation", json=request, headers=WAIT)
    assert again.status_code == 200
    assert again.json()["cached"] is True
    assert again.json()["id"] != first["id"]
    assert (
        again.json()["result"]["data"] == api.get(f"/api/jobs/{first['id']}/result").json()["data"]
    )
    other = api.post("/api/scan/activation", json={**request, "aggregation": "max"}).json()
    assert other["state"] == "queued"


def test_two_names_of_equal_weights_share_their_results(api: httpx.Client, world: World) -> None:
    world.register("twin", weights="tiny")
    api.post("/api/scan/activation", json={"prompt": PROMPT})
    world.perform(world.claim(world.queue()))
    twin = api.post("/api/scan/activation", json={"prompt": PROMPT, "model": "twin"}).json()
    assert twin["cached"] is True


def test_a_result_that_was_lost_is_computed_again(api: httpx.Client, world: World) -> None:
    api.post("/api/scan/activation", json={"prompt": PROMPT})
    done = world.perform(world.claim(world.queue()))
    world.harm(done, "activations")
    again = api.post("/api/scan/activation", json={"prompt": PROMPT}).json()
    assert again["state"] == "queued"
    with world.working(world.queue()):
        healed = api.post(
            "/api/scan/activation", json={"prompt": PROMPT, "top_neurons": 10}, headers=WAIT
        )
    assert healed.status_code == 200


def test_a_scan_that_its_own_request_makes_fail_is_answered_as_the_refusal_it_is(
    api: httpx.Client, world: World
) -> None:
    problem = PromptTooLong("the model's window is shorter than it says").document()

    def refuse() -> None:
        job = world.claim(world.queue())
        world.move(job, JobState.FAILED, problem=problem)

    with world.beside(refuse):
        answer = api.post("/api/scan/activation", json={"prompt": PROMPT}, headers=WAIT)
    assert answer.status_code == 422
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.json()["type"] == problem["type"]
    assert api.get(answer.headers["location"]).json()["id"] == answer.json()["job"]


def test_a_scan_that_fails_by_no_fault_of_its_request_is_shown_as_it_ended(
    api: httpx.Client, world: World
) -> None:
    def fail() -> None:
        world.move(world.claim(world.queue()), JobState.FAILED, problem={"status": 500})

    with world.beside(fail):
        answer = api.post("/api/scan/activation", json={"prompt": PROMPT}, headers=WAIT)
    assert answer.status_code == 200
    assert answer.json()["state"] == "failed"
    assert answer.json()["result"] is None


def test_lanes_are_the_callers_choice(api: httpx.Client, world: World) -> None:
    answer = api.post("/api/scan/activation?lane=batch", json={"prompt": PROMPT})
    assert answer.json()["lane"] == "batch"
    assert api.post("/api/scan/activation?lane=fast", json={"prompt": PROMPT}).status_code == 400


@pytest.mark.parametrize(
    ("body", "status", "kind", "words"),
    [
        ({}, 400, "invalid-request", "prompt"),
        ({"prompt": ""}, 400, "invalid-request", "prompt: Expected `str` of length >= 1"),
        ({"prompt": 3}, 400, "invalid-request", "prompt: Expected `str`, got `int`"),
        ({"prompt": "a\0"}, 400, "invalid-request", "NUL"),
        ({"prompt": "a", "promt": "b"}, 400, "invalid-request", "unknown field `promt`"),
        ({"prompt": "a", "scan_mode": "T1"}, 400, "invalid-request", "T1"),
        ({"prompt": "a", "aggregation": "l3"}, 400, "invalid-request", "l3"),
        ({"prompt": "a", "top_neurons": 101}, 400, "invalid-request", "top_neurons"),
        ({"prompt": "a", "layers": []}, 400, "invalid-request", "layers"),
        ({"prompt": "a", "model": "gpt-5"}, 422, "unknown-model", "registered are tiny"),
        ({"prompt": "a", "layers": ["blocks.40.mlp"]}, 422, "unknown-component", "2 layers"),
        ({"prompt": "a", "layers": ["blocks.0.attn.h9"]}, 422, "unknown-component", "4 heads"),
        ({"prompt": "a", "layers": ["transformer.h.0"]}, 422, "invalid-address", "blocks.L.attn"),
        ({"prompt": "a", "layers": ["blocks.0.mlp.n3"]}, 422, "unprocessable", "top_neurons"),
        ({"prompt": "a", "token_positions": [99]}, 422, "invalid-positions", "-2 to 1"),
        ({"prompt": "x y " * 40}, 422, "prompt-too-long", "tiny reads 64"),
    ],
)
def test_what_cannot_be_done_is_refused_before_anything_is_queued(
    api: httpx.Client, world: World, body: dict[str, Any], status: int, kind: str, words: str
) -> None:
    answer = api.post("/api/scan/activation", json=body)
    assert answer.status_code == status
    assert answer.headers["content-type"] == "application/problem+json"
    problem = answer.json()
    assert problem["type"] == f"urn:neural-mri:problem:{kind}"
    assert problem["status"] == status
    assert problem["title"]
    assert words in problem["detail"]
    assert world.sessions.read(jobs.recent, "local") == []


def test_a_layer_the_model_does_not_have_is_refused(api: httpx.Client) -> None:
    answer = api.post("/api/scan/attention", json={"prompt": "a", "layers": [0, 2]})
    assert answer.status_code == 422
    assert answer.json()["component"] == "blocks.2.attn"


def test_layers_of_attention_are_a_set(api: httpx.Client) -> None:
    keys_ = {
        api.post("/api/scan/attention", json={"prompt": "a", "layers": layers}).json()["scan_key"]
        for layers in ([0, 1], [1, 0], [1, 0, 1])
    }
    assert len(keys_) == 1


def test_a_body_that_is_no_json_is_refused(api: httpx.Client) -> None:
    headers = {"content-type": "application/json"}
    for body, words in (
        (b"{nope", "malformed"),
        (b"", "got no body"),
        (b"[1]", "object"),
        (b'{"prompt": "\xff"}', "not UTF-8"),
        (b"[" * 15_000, "nested too deeply"),
        (b'{"prompt": "a", "more": ' + b"[" * 15_000, "nested too deeply"),
    ):
        answer = api.post("/api/scan/activation", content=body, headers=headers)
        assert answer.status_code == 400
        assert words in answer.json()["detail"]


def test_every_field_at_fault_is_named(api: httpx.Client) -> None:
    (error,) = api.post("/api/scan/activation", json={"prompt": 3}).json()["errors"]
    assert error == {
        "field": "prompt",
        "location": "body",
        "message": "Expected `str`, got `int`",
    }


def test_a_field_is_called_what_the_caller_calls_it(api: httpx.Client) -> None:
    (error,) = api.get("/api/jobs?state=asleep").json()["errors"]
    assert (error["field"], error["location"]) == ("state", "query")


def test_a_scan_may_ask_for_any_registered_model(api: httpx.Client, world: World) -> None:
    world.register("shelved", weights="shelved", wanted=False)
    answer = api.post("/api/scan/activation", json={"prompt": "a", "model": "shelved"})
    assert answer.status_code == 202


def test_without_loading_on_demand_only_models_that_are_to_be_held_are_scanned(
    world: World,
) -> None:
    world.register("shelved", weights="shelved", wanted=False)
    with serving(msgspec.structs.replace(world.settings, load_on_demand=False)) as api:
        answer = api.post("/api/scan/activation", json={"prompt": "a", "model": "shelved"})
    assert answer.status_code == 409
    assert answer.json()["type"] == "urn:neural-mri:problem:model-not-loaded"
    assert "/api/model/load" in answer.json()["detail"]


def test_a_pinned_model_is_scanned_though_no_worker_has_come_up_yet(world: World) -> None:
    world.register("anchor", weights="anchor", wanted=False)
    with serving(msgspec.structs.replace(world.settings, pinned_models="anchor")) as api:
        answer = api.post("/api/scan/activation", json={"prompt": "a", "model": "anchor"})
    assert answer.status_code == 202


def test_a_result_that_would_be_too_large_is_refused_with_what_would_do(world: World) -> None:
    wide = msgspec.structs.replace(TINY, d_model=2**20)
    world.register("wide", weights="wide", architecture=wide)
    with serving(world.settings) as api:
        request = {"model": "wide", "prompt": PROMPT}
        assert api.post("/api/scan/activation", json=request).status_code == 202
        answer = api.post("/api/scan/activation", json={**request, "aggregation": "raw"})
        assert answer.status_code == 422
        assert "512 MiB are allowed" in answer.json()["detail"]
        narrow = {**request, "aggregation": "raw", "layers": ["embed"], "token_positions": [-1]}
        assert api.post("/api/scan/activation", json=narrow).status_code == 202


def test_a_full_queue_says_so_and_when_to_come_again(world: World) -> None:
    with serving(msgspec.structs.replace(world.settings, max_queued_jobs=2)) as api:
        answers = [api.post("/api/scan/activation", json={"prompt": f"a {n}"}) for n in range(3)]
    assert [answer.status_code for answer in answers] == [202, 202, 429]
    assert answers[2].headers["retry-after"] == "1"
    assert answers[2].json()["limit"] == 2


def test_the_services_own_limit_of_tokens_holds(world: World) -> None:
    with serving(msgspec.structs.replace(world.settings, max_tokens=3)) as api:
        answer = api.post("/api/scan/activation", json={"prompt": PROMPT})
    assert answer.status_code == 422
    assert answer.json()["n_tokens"] == 7
    assert "this service takes 3" in answer.json()["detail"]
