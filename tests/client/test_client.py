"""Requests say what was asked, and every answer that is no answer becomes the right error."""

import importlib
import inspect
import socket
import subprocess
import sys
from collections.abc import Callable
from typing import Any, get_args

import msgspec
import pytest

import neural_mri
from neural_mri.client import Client, NotUnderstood, Refused, Unreachable
from neural_mri.client.client import addresses
from neural_mri.client.exchange import DEFAULT_URL
from neural_mri.contract.jobs import JobKind
from neural_mri.contract.problems import UnknownComponent, UnknownModel
from neural_mri.contract.scans import (
    ActivationScan,
    Aggregation,
    AnomalyScan,
    AttentionScan,
    CalibrationScan,
    CircuitScan,
    PatchingScan,
    PerturbationScan,
    Scan,
    StructuralScan,
    TracingScan,
    WeightScan,
    decode_scan,
)
from tests.client.specimens import MODEL, TOKENS
from tests.client.wire import Answer, Wire, json_answer, problem_answer


def test_a_scan_is_sent_with_every_default_written_out(wire: Wire, client: Client) -> None:
    client.scan_activation(
        "The Eiffel Tower is in",
        layers=[1, "blocks.3.mlp"],
        aggregation="max",
        token_positions=[-1],
    )
    sent = decode_scan(wire.asked[0].body)
    assert sent == ActivationScan(
        prompt="The Eiffel Tower is in",
        layers=("blocks.1.attn", "blocks.1.mlp", "blocks.3.mlp"),
        aggregation=Aggregation.MAX,
        token_positions=(-1,),
    )
    assert msgspec.json.decode(wire.asked[0].body)["top_neurons"] == 10
    assert wire.asked[0].headers["Content-Type"] == "application/json"


def test_each_scan_goes_to_its_own_address(wire: Wire, client: Client) -> None:
    client.scan_structural()
    client.scan_activation("a")
    client.scan_attention("a", layers=[0, 2])
    assert wire.paths("POST") == [
        "/api/scan/structural",
        "/api/scan/activation",
        "/api/scan/attention",
    ]
    (attention,) = [asked for asked in wire.asked if asked.path == "/api/scan/attention"]
    assert decode_scan(attention.body) == AttentionScan(prompt="a", layers=(0, 2))


def test_a_known_result_is_not_waited_for(wire: Wire, client: Client) -> None:
    wire.cached = True
    client.scan_activation("a")
    assert not any(path.endswith("/events") for path in wire.paths())


def test_models_can_be_listed_looked_at_loaded_and_unloaded(wire: Wire, client: Client) -> None:
    assert client.models() == [MODEL]
    assert client.model("tiny") == MODEL
    assert client.wait(client.load("tiny")).kind is JobKind.LOAD
    assert client.wait(client.unload("tiny")).kind is JobKind.UNLOAD
    (unload,) = [asked for asked in wire.asked if asked.method == "DELETE"]
    assert unload.query == {"model": "tiny"}


def test_a_prompt_can_be_tokenised(wire: Wire, client: Client) -> None:
    assert client.tokenize("The Eiffel Tower is in", model="tiny").texts == TOKENS
    assert msgspec.json.decode(wire.asked[0].body) == {
        "model": "tiny",
        "prompt": "The Eiffel Tower is in",
    }


def test_jobs_can_be_listed_and_asked_after(client: Client) -> None:
    job = client.submit(ActivationScan(prompt="a"))
    assert client.jobs(5) == [job]
    assert client.job(job.id) == job
    assert client.cancel(str(job.id)).id == job.id


def test_a_refusal_carries_the_whole_problem_document(wire: Wire, client: Client) -> None:
    problem = UnknownComponent("blocks.40.mlp does not exist", component="blocks.40.mlp")
    wire.answers["POST", "/api/scan/activation"] = [problem_answer(problem)]
    with pytest.raises(Refused, match="does not exist") as raised:
        client.scan_activation("a")
    refusal = raised.value
    assert refusal.status == 422
    assert refusal.type == "urn:neural-mri:problem:unknown-component"
    assert refusal.title == "The model has no such component"
    assert refusal.members == {"component": "blocks.40.mlp"}
    assert refusal.document == problem.document()


def test_the_service_names_the_model_it_does_not_know(client: Client) -> None:
    with pytest.raises(Refused) as raised:
        client.scan_activation("a", model="gpt5")
    assert raised.value.type == UnknownModel.type_urn()


@pytest.mark.parametrize(
    "answer",
    [
        Answer(502, "text/html", b"<h1>Bad Gateway</h1>"),
        Answer(500, "application/problem+json", b"{not json"),
        Answer(302, "text/html", b"", {"Location": "/login"}),
    ],
    ids=["a gateway's page", "a broken document", "a redirect"],
)
def test_an_error_without_a_problem_document_gets_one(wire: Wire, answer: Answer) -> None:
    wire.answers["GET", "/api/models"] = [answer]
    with (
        Client(wire.url, patience_seconds=0) as client,
        pytest.raises(Refused, match="is this a Neural MRI service") as raised,
    ):
        client.models()
    assert raised.value.status == answer.status
    assert raised.value.type == "about:blank"


@pytest.mark.parametrize("body", [b"<h1>Welcome to nginx</h1>", b'{"models": 3}', b"\xff"])
def test_an_answer_that_is_not_ours_is_not_guessed_at(
    wire: Wire, client: Client, body: bytes
) -> None:
    wire.answers["GET", "/api/models"] = [Answer(200, "application/json", body)]
    with pytest.raises(NotUnderstood, match="/api/models answered what this version"):
        client.models()


def test_a_newer_service_may_say_more(wire: Wire, client: Client) -> None:
    document = msgspec.to_builtins(MODEL) | {"hologram": True}
    wire.answers["GET", "/api/models"] = [json_answer([document])]
    assert client.models() == [MODEL]


def test_a_service_that_is_down_still_says_how_it_is(wire: Wire, client: Client) -> None:
    wire.answers["GET", "/api/health"] = [json_answer({"status": "down"}, 503)]
    assert client.health() == {"status": "down"}


def test_nobody_there_is_said_with_what_to_do() -> None:
    with Wire() as gone:
        url = gone.url
    with Client(url) as client, pytest.raises(Unreachable) as raised:
        client.health()
    assert f"{url} does not answer (connection refused)" in str(raised.value)
    assert "make up" in str(raised.value)


def test_a_service_that_hangs_is_given_up() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with (
            Client(url, timeout_seconds=0.1, patience_seconds=0) as client,
            pytest.raises(
                Unreachable, match=r"it took longer than 0.1 s\): what was asked may still"
            ),
        ):
            client.health()


@pytest.mark.parametrize("url", ["localhost:8642", "ftp://host", "http://", "", "http://[::1"])
def test_an_address_that_is_none_is_refused_at_once(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NMRI_URL", "nonsense")
    with pytest.raises(ValueError, match="is not an address"):
        Client(url)


def test_the_address_comes_from_the_argument_then_the_environment_then_the_default(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("NMRI_URL", raising=False)
    assert Client().base_url == DEFAULT_URL
    monkeypatch.setenv("NMRI_URL", "http://cluster:1/mri/")
    assert Client().base_url == "http://cluster:1/mri"
    assert Client("http://other:2").base_url == "http://other:2"


def test_a_proxy_in_the_environment_is_not_asked_for_the_loopback(
    wire: Wire, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    with Client(wire.url) as client:
        assert client.health() == {"status": "ok"}


def test_headers_of_the_callers_own_are_sent(wire: Wire) -> None:
    with Client(wire.url, headers={"X-Gateway": "pass"}) as client:
        client.health()
    assert wire.asked[0].headers["X-Gateway"] == "pass"
    assert wire.asked[0].headers["User-Agent"] == f"neural-mri/{neural_mri.__version__}"


def test_a_service_may_live_under_a_path(wire: Wire) -> None:
    wire.answers["GET", "/mri/api/health"] = [json_answer({"status": "ok"})]
    with Client(f"{wire.url}/mri/") as client:
        assert client.health() == {"status": "ok"}


def test_layer_numbers_stand_for_heads_and_mlp() -> None:
    assert addresses([0, "embed"]) == ("blocks.0.attn", "blocks.0.mlp", "embed")


def test_the_package_exports_the_client_without_importing_it() -> None:
    program = (
        "import sys, neural_mri; assert 'httpx' not in sys.modules; "
        "neural_mri.Client; assert 'httpx' in sys.modules; "
        "assert not {'matplotlib', 'pandas', 'torch'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
    assert neural_mri.Client is Client
    with pytest.raises(AttributeError, match="no attribute 'Klient'"):
        _ = neural_mri.Klient  # type: ignore[attr-defined]


@pytest.mark.parametrize("module", ["neural_mri.client", "neural_mri.cli"])
def test_everything_exported_is_there(module: str) -> None:
    package = importlib.import_module(module)
    assert all(hasattr(package, name) for name in package.__all__)


def test_every_field_of_a_scan_can_be_given_to_the_method_that_asks_for_it(wire: Wire) -> None:
    methods: dict[Any, Callable[..., object]] = {
        StructuralScan: Client.scan_structural,
        WeightScan: Client.scan_weights,
        ActivationScan: Client.scan_activation,
        AttentionScan: Client.scan_attention,
        CircuitScan: Client.scan_circuits,
        AnomalyScan: Client.scan_anomaly,
        PerturbationScan: Client.perturb,
        PatchingScan: Client.patching,
        TracingScan: Client.trace,
        CalibrationScan: Client.calibrate,
    }
    assert set(methods) == set(get_args(Scan))
    for scan, method in methods.items():
        fields = set(scan.__struct_fields__)
        assert fields <= set(inspect.signature(method).parameters), scan
    with Client(wire.url) as client:
        client.scan_activation("The Eiffel Tower is in", calibration="c" * 64)
    assert b'"calibration":"cccc' in wire.asked[0].body


def test_jobs_are_listed_by_their_state(wire: Wire, client: Client) -> None:
    client.jobs(state="failed")
    assert wire.asked[-1].query == {"limit": "50", "state": "failed"}
    with pytest.raises(ValueError, match="'done' is not a valid JobState"):
        client.jobs(state="done")
