"""What each kind of scan is refused for, before anything is queued: the value, and what was expected."""

from collections.abc import Mapping
from typing import Any

import httpx
import msgspec
import pytest

from neural_mri.backing import jobs
from tests.api.specimens import PROMPT, TINY
from tests.api.world import World, serving

TOWER = {"prompt": PROMPT}
"""Seven tokens, of which the tokenizer knows every word."""
SHORT = "The Eiffel Tower"
MLP = "blocks.0.mlp"


def refused(
    api: httpx.Client, path: str, body: Mapping[str, Any], kind: str = "unprocessable"
) -> dict[str, Any]:
    answer = api.post(path, json=body)
    assert answer.status_code == 422, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    problem: dict[str, Any] = answer.json()
    assert problem["type"] == f"urn:neural-mri:problem:{kind}"
    return problem


def several(**first: Any) -> dict[str, Any]:
    """A request with one perturbation."""
    return {**TOWER, "perturbations": [first]}


FMRI, PERTURB = "/api/scan/activation", "/api/perturb"
UNREADABLE: list[tuple[str, dict[str, Any], str]] = [
    (
        FMRI,
        {"aggregation": "sum"},
        "aggregation: Invalid enum value 'sum': expected one of 'l2_norm', 'max', 'mean', 'raw'",
    ),
    (FMRI, {"top_neurons": 1000}, "top_neurons: Expected `int` <= 100, got 1000"),
    (FMRI, {"top_neurons": "x"}, "top_neurons: Expected `int`, got `str` 'x'"),
    (FMRI, {"nope": 1}, "unknown field `nope`: expected one of `scan_mode`, `model`, `prompt`, "),
    (FMRI, {"scan_mode": "nope"}, "scan_mode: Invalid value 'nope': expected one of 'fMRI'"),
    (FMRI, {"layers": ["embed", 3]}, "layers[1]: Expected `str`, got `int` 3"),
    (FMRI, {"token_positions": "some"}, "value 'some': expected one of 'all', an array"),
    (FMRI, {"token_positions": []}, "token_positions: Expected `array` of length >= 1, got 0"),
    (FMRI, {"calibration": "abc"}, "matching regex '^[0-9a-f]{64}$', got 'abc'"),
    (PERTURB, several(operation="zap"), "value 'zap': expected one of 'zero', 'amplify', "),
    (
        PERTURB,
        several(operation="zero", component=MLP, factor=2),
        "unknown field `factor`: expected one of `operation`, `component`, `token_positions`",
    ),
]


@pytest.mark.parametrize(("path", "body", "words"), UNREADABLE)
def test_what_cannot_be_read_is_named_with_what_was_expected(
    api: httpx.Client, world: World, path: str, body: dict[str, Any], words: str
) -> None:
    answer = api.post(path, json={**TOWER, **body})
    assert answer.status_code == 400
    assert words in answer.json()["detail"]
    assert world.sessions.read(jobs.recent, "local") == []


def test_lines_of_a_batch_are_told_the_same(api: httpx.Client) -> None:
    modes = {FMRI: "fMRI", PERTURB: "perturbation"}
    scans = [{"scan_mode": modes[path], **TOWER, **body} for path, body, _ in UNREADABLE]
    refused = api.post("/api/batches", json={"scans": scans}).json()["invalid"]
    for line, (_, body, words) in zip(refused, UNREADABLE, strict=True):
        expected = words if "scan_mode" not in body else "scan_mode: Invalid value 'nope': "
        assert expected in line["detail"]


def test_a_parameter_of_the_address_is_named_with_what_was_expected(api: httpx.Client) -> None:
    answer = api.post(f"{FMRI}?lane=fast", json=TOWER)
    assert "lane: Invalid enum value 'fast': expected one of 'interactive', " in answer.text
    answer = api.get("/api/jobs?limit=0")
    assert "limit: Expected `int` >= 1, got '0'" in answer.json()["detail"]


def test_peoples_texts_are_not_said_again_and_long_values_not_whole(api: httpx.Client) -> None:
    long = "my secret " * 30
    bodies: list[tuple[dict[str, Any], str]] = [
        ({"answer": long}, "answer: Expected `str` of length <= 200, got 300"),
        ({"prompt": [long]}, "prompt: Expected `str`, got `array`"),
        ({"answer": {"prompt": long}}, "answer: Expected `int | str | null`, got `object`"),
        ({"method": long}, f"method: Invalid enum value '{long[:59]}…': expected one of 'fast'"),
        ({long: 1}, f"unknown field `{long[:59]}…`: expected one of "),
    ]
    for body, words in bodies:
        asked = {"scan_mode": "DTI", **TOWER, **body}
        (line,) = api.post("/api/batches", json={"scans": [asked]}).json()["invalid"]
        for said in (api.post("/api/scan/circuits", json=asked).json()["detail"], line["detail"]):
            assert words in said
            assert long[:61] not in said


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/api/scan/weights", {"layers": ["blocks.2.mlp"]}),
        ("/api/scan/activation", {**TOWER, "layers": ["blocks.2.mlp"]}),
        ("/api/perturb/zero", {**TOWER, "component": "blocks.2.mlp"}),
        ("/api/perturb", several(operation="invert", component="blocks.2.mlp")),
    ],
)
def test_a_component_that_the_model_does_not_have(
    api: httpx.Client, world: World, path: str, body: dict[str, Any]
) -> None:
    problem = refused(api, path, body, "unknown-component")
    assert problem["component"] == "blocks.2.mlp"
    assert "the model has 2 layers, 0 to 1" in problem["detail"]
    assert world.sessions.read(jobs.recent, "local") == []


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/api/scan/circuits", {"target_token_idx": 7}),
        ("/api/scan/anomaly", {"token_positions": [0, 7]}),
        ("/api/scan/anomaly", {"target_token_idx": -8}),
        ("/api/perturb/zero", {"component": MLP, "token_positions": [7]}),
        ("/api/perturb/reset", {"target_token_idx": 7}),
        ("/api/perturb/patching", {"corrupt_prompt": "a", "target_token_idx": 7}),
        ("/api/perturb/trace", {"subject": "Eiffel", "target_token_idx": 7}),
    ],
)
def test_a_position_that_the_prompt_does_not_have(
    api: httpx.Client, world: World, path: str, body: dict[str, Any]
) -> None:
    problem = refused(api, path, {**TOWER, **body}, "invalid-positions")
    assert problem["n_tokens"] == 7
    assert problem["position"] in {7, -8}
    assert "expected -7 to 6" in problem["detail"]
    assert world.sessions.read(jobs.recent, "local") == []


ABOUT_A_TOKEN = {
    "/api/scan/circuits": {},
    "/api/scan/anomaly": {},
    "/api/perturb/zero": {"component": MLP},
    "/api/perturb/patching": {"corrupt_prompt": "The Eiffel Tower is in in"},
    "/api/perturb/trace": {"subject": "Eiffel"},
}


@pytest.mark.parametrize("path", ABOUT_A_TOKEN)
@pytest.mark.parametrize("name", ["answer", "foil"])
def test_an_answer_that_is_no_single_token(api: httpx.Client, path: str, name: str) -> None:
    asked = {**TOWER, **ABOUT_A_TOKEN[path]}
    problem = refused(api, path, {**asked, name: " Paris Tower"})
    assert "' Paris Tower' is 2 tokens, [' Paris', ' Tower']" in problem["detail"]
    assert len(problem["tokens"]) == 2
    problem = refused(api, path, {**asked, name: 300})
    assert f"{name} is token 300, but tiny has 300: expected 0 to 299" in problem["detail"]
    assert api.post(path, json={**asked, name: " Paris"}).status_code == 202


def test_an_answer_without_its_space_is_told_of_it(api: httpx.Client) -> None:
    problem = refused(api, "/api/scan/circuits", {**TOWER, "answer": "Paris"})
    assert "a word's token begins with a space" in problem["detail"]


def test_an_answer_that_is_its_own_foil(api: httpx.Client) -> None:
    body = {**TOWER, "answer": " Paris", "foil": " Paris"}
    assert "both ' Paris'" in refused(api, "/api/scan/circuits", body)["detail"]


@pytest.mark.parametrize(
    ("path", "body", "name"),
    [
        ("/api/scan/circuits", {"corrupt_prompt": SHORT}, "corrupt_prompt"),
        ("/api/perturb/patching", {"corrupt_prompt": SHORT}, "corrupt_prompt"),
        ("/api/perturb/patch", {"component": MLP, "source_prompt": SHORT}, "source_prompt"),
    ],
)
def test_another_prompt_of_another_length(
    api: httpx.Client, world: World, path: str, body: dict[str, Any], name: str
) -> None:
    problem = refused(api, path, {**TOWER, **body})
    assert f"{name} has 4 tokens and the prompt 7" in problem["detail"]
    assert (problem["n_tokens"], problem["n_other_tokens"]) == (7, 4)
    assert world.sessions.read(jobs.recent, "local") == []


@pytest.mark.parametrize(
    ("path", "body", "words"),
    [
        ("/api/scan/circuits", {"ablation": "resample"}, "needs a corrupt_prompt"),
        ("/api/scan/circuits", {"method": "integrated_gradients"}, "needs a corrupt_prompt"),
        ("/api/perturb/patching", {"corrupt_prompt": PROMPT}, "is the prompt itself"),
        ("/api/perturb/trace", {"subject": "Louvre"}, "'Louvre' does not stand in the prompt"),
        (
            "/api/perturb/trace",
            {"subject": "Paris", "target_token_idx": 2},
            "ends at token 6, and the next token after 2 is asked about",
        ),
        ("/api/perturb/zero", {"component": "unembed"}, "perturb the last resid_post instead"),
        ("/api/scan/weights", {"layers": ["blocks.0.resid_pre"]}, "has no weights"),
        ("/api/model/calibrate", {"lenses": ["raw", "raw"]}, "names a lens twice"),
    ],
)
def test_what_contradicts_itself(
    api: httpx.Client, world: World, path: str, body: dict[str, Any], words: str
) -> None:
    prompt = {} if path in {"/api/scan/weights", "/api/model/calibrate"} else TOWER
    assert words in refused(api, path, {**prompt, **body})["detail"]
    assert world.sessions.read(jobs.recent, "local") == []


@pytest.mark.parametrize(
    ("component", "mode", "expected"),
    [
        ("blocks.0.attn.head_1", "replace", TINY.d_head),
        ("blocks.0.attn.head_1", "add", TINY.d_model),
        ("blocks.0.mlp.neuron_3", "add", 1),
        ("blocks.1.resid_pre", "replace", TINY.d_model),
    ],
)
def test_an_injection_of_another_width(
    api: httpx.Client, component: str, mode: str, expected: int
) -> None:
    body = {**TOWER, "component": component, "mode": mode}
    problem = refused(api, "/api/perturb/inject", {**body, "values": [0.5] * (expected + 1)})
    assert problem["expected"] == expected
    assert f"{expected + 1} values for {component}: expected {expected}" in problem["detail"]
    together = several(operation="inject", component=component, mode=mode, values=[0.5] * 99)
    assert refused(api, "/api/perturb", together)["expected"] == expected
    answer = api.post("/api/perturb/inject", json={**body, "values": [0.5] * expected})
    assert answer.status_code == 202


READ_AGAINST = {
    "/api/scan/activation": {},
    "/api/scan/circuits": {},
    "/api/scan/anomaly": {},
    "/api/perturb/ablate": {"component": MLP},
}


@pytest.mark.parametrize("path", READ_AGAINST)
def test_a_calibration_that_there_is_not(api: httpx.Client, path: str) -> None:
    unknown = "0" * 64
    problem = refused(api, path, {**TOWER, **READ_AGAINST[path], "calibration": unknown})
    assert problem["calibration"] == unknown
    assert "POST /api/model/calibrate" in problem["detail"]
    answer = api.post(path, json={**TOWER, **READ_AGAINST[path], "calibration": "abc"})
    assert answer.status_code == 400


def test_a_calibration_is_named_by_its_jobs_scan_key(api: httpx.Client, world: World) -> None:
    with_ridge = {"lenses": ["ridge"], "n_tokens": 4096}
    key = api.post("/api/model/calibrate", json=with_ridge).json()["scan_key"]
    refused(api, "/api/scan/anomaly", {**TOWER, "calibration": key})
    world.perform(world.claim(world.queue()))
    for lens in ("raw", "bias", "ridge"):
        asked = {**TOWER, "calibration": key, "lens": lens}
        assert api.post("/api/scan/anomaly", json=asked).status_code == 202
    world.register("other", weights="other")
    problem = refused(api, "/api/scan/anomaly", {**TOWER, "calibration": key, "model": "other"})
    assert "is of tiny's weights, not of other's" in problem["detail"]


def test_a_calibration_whose_last_job_was_deleted_is_there_no_more(
    api: httpx.Client, world: World
) -> None:
    texts = {"texts": [PROMPT, SHORT], "n_tokens": 256}
    first, other = (api.post("/api/model/calibrate", json=texts).json() for _ in range(2))
    world.perform(world.claim(world.queue()))
    against = {**TOWER, "calibration": first["scan_key"]}
    assert api.delete(f"/api/jobs/{first['id']}/record").status_code == 200
    assert api.post("/api/scan/anomaly", json=against).status_code == 202, "one still names it"
    assert api.delete(f"/api/jobs/{other['id']}/record").status_code == 200
    problem = refused(api, "/api/scan/anomaly", against)
    assert f"there is no calibration {first['scan_key']}" in problem["detail"]


def test_a_scan_key_of_another_kind_is_no_calibration(api: httpx.Client, world: World) -> None:
    key = api.post("/api/scan/activation", json=TOWER).json()["scan_key"]
    world.perform(world.claim(world.queue()))
    problem = refused(api, "/api/scan/anomaly", {**TOWER, "calibration": key})
    assert f"there is no calibration {key}" in problem["detail"]


def test_a_models_own_calibration_needs_no_measuring_first(api: httpx.Client) -> None:
    own = api.post("/api/model/calibrate", json={}).json()["scan_key"]
    assert api.post("/api/scan/anomaly", json={**TOWER, "calibration": own}).status_code == 202
    problem = refused(api, "/api/scan/anomaly", {**TOWER, "lens": "ridge"})
    assert "lens 'ridge' is not fitted" in problem["detail"]


def test_a_baseline_that_cannot_be_compared_with(api: httpx.Client, world: World) -> None:
    wider = msgspec.structs.replace(TINY, d_mlp=32)
    world.register("wider", weights="wider", architecture=wider)
    problem = refused(api, "/api/scan/weights", {"baseline": "wider"}, "unsupported-model")
    assert "wider is not of the same shape as tiny" in problem["detail"]
    refused(api, "/api/scan/weights", {"baseline": "nobody"}, "unknown-model")
    world.register("tuned", weights="tuned", wanted=False)
    assert api.post("/api/scan/weights", json={"baseline": "tuned"}).status_code == 202


@pytest.mark.parametrize(
    ("path", "body", "words"),
    [
        ("/api/scan/attention", {"layers": [0]}, "fewer layers"),
        ("/api/scan/anomaly", {}, "fewer token_positions"),
        ("/api/perturb/reset", {}, "leave out perturbed_scan"),
        (
            "/api/perturb/patching",
            {"corrupt_prompt": "The Eiffel Tower is in in", "sites": ["head"]},
            "fewer sites",
        ),
        ("/api/perturb/trace", {"subject": "Eiffel"}, "fewer kinds"),
        ("/api/model/calibrate", {"lenses": ["ridge"]}, "lens 'bias' alone"),
    ],
)
def test_a_result_that_would_be_too_large(
    world: World, path: str, body: dict[str, Any], words: str
) -> None:
    huge = msgspec.structs.replace(
        TINY, n_layers=2**24, n_heads=2**22, n_kv_heads=2**21, d_model=2**14
    )
    world.register("huge", weights="huge", architecture=huge)
    prompt = {} if path == "/api/model/calibrate" else TOWER
    with serving(world.settings) as api:
        problem = refused(api, path, {**prompt, **body, "model": "huge"})
    assert problem["limit"] == 512 * 2**20 < problem["bytes"]
    assert "512 MiB are allowed" in problem["detail"]
    assert words in problem["detail"]


@pytest.mark.parametrize(
    ("path", "body", "place"),
    [
        ("/api/scan/activation", {"layers": ["blocks.1.attn.h3"]}, "layers"),
        ("/api/perturb/zero", {"component": "blocks.1.attn.h3"}, "component"),
    ],
)
def test_the_specifications_spelling_of_a_head_is_read_and_printed_back_in_ours(
    api: httpx.Client, path: str, body: dict[str, Any], place: str
) -> None:
    request = api.post(path, json={**TOWER, **body}).json()["request"]
    if place == "component":
        (request,) = request["perturbations"]
    assert request[place] in ("blocks.1.attn.head_3", ["blocks.1.attn.head_3"])


@pytest.mark.parametrize(
    ("path", "one", "other"),
    [
        ("scan/activation", {"layers": ["embed", MLP]}, {"layers": [MLP, "embed", MLP]}),
        ("scan/activation", {"layers": ["blocks.0.attn.h1"]}, {"layers": ["blocks.0.attn.head_1"]}),
        ("perturb/zero", {"component": "blocks.0.mlp.n3"}, {"component": "blocks.0.mlp.neuron_3"}),
        (
            "perturb/patching",
            {"corrupt_prompt": "The Eiffel Tower is in in", "sites": ["mlp", "attn"]},
            {"corrupt_prompt": "The Eiffel Tower is in in", "sites": ["attn", "mlp", "mlp"]},
        ),
        (
            "perturb/trace",
            {"subject": "Eiffel", "kinds": ["mlp", "state"]},
            {"subject": "Eiffel", "kinds": ["state", "mlp"]},
        ),
    ],
)
def test_one_scan_has_one_key_however_it_is_written(
    api: httpx.Client, path: str, one: dict[str, Any], other: dict[str, Any]
) -> None:
    keys = {
        api.post(f"/api/{path}", json={**TOWER, **body}).json()["scan_key"] for body in (one, other)
    }
    assert len(keys) == 1


def test_a_single_perturbation_is_the_scan_that_it_says(api: httpx.Client) -> None:
    single = {**TOWER, "component": MLP, "factor": 3.0, "token_positions": [-1]}
    amplify = {"operation": "amplify", "component": MLP, "factor": 3.0, "token_positions": [-1]}
    keys = {
        api.post("/api/perturb/amplify", json=single).json()["scan_key"],
        api.post("/api/perturb", json={**TOWER, "perturbations": [amplify]}).json()["scan_key"],
    }
    assert len(keys) == 1
    reset = api.post("/api/perturb/reset", json=TOWER).json()
    assert reset["request"]["perturbations"] == []
    assert reset["scan_key"] == api.post("/api/perturb", json=TOWER).json()["scan_key"]
