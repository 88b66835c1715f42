"""What an operator sees of a scan: its spans, across processes, and its log lines. Never its prompt.

One whole service, its processes real, with a model so small that only they take time.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest

from neural_mri.backing import access, database
from neural_mri.backing.settings import Settings
from neural_mri.contract.auth import Scope
from tests.security.collector import Collector, Seen, collecting
from tests.servers import on_servers
from tests.system.service import Service, free_port, register, running, until
from tests.tiny import save_tiny_model

PROMPT = "w5 w6 sesame-4711 w7"
ANSWER = "w9"
NOWHERE = "mustard-0815"
"""No layer of the model: the refusal names it."""
CALLER = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
TRACE, CALLERS_SPAN = CALLER.split("-")[1:3]
SECRETS = ("sesame-4711", NOWHERE)


class Watched(NamedTuple):
    """A service, what it tells its collector, and a client with a key."""

    service: Service
    collector: Collector
    http: httpx.Client
    key: str

    def logs(self) -> str:
        """All that all processes have logged."""
        folder = self.service.settings.folder / "logs"
        return "\n".join(path.read_text() for path in sorted(folder.glob("*.log")))

    def lines(self, process: str) -> list[dict[str, Any]]:
        """The log of a process, line by line: each is JSON."""
        path: Path = self.service.settings.folder / "logs" / f"{process}.log"
        return [json.loads(line) for line in path.read_text().splitlines()]

    def trace(self, trace: str, *names: str) -> dict[str, Seen]:
        """The spans of a trace by name, once those named have come."""
        assert until(
            lambda: {span.name for span in self.collector.spans(trace)} >= set(names), 20
        ), self.collector.spans(trace)
        return {span.name: span for span in self.collector.spans(trace)}


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    folder = tmp_path_factory.mktemp("watched")
    with collecting() as collector, pytest.MonkeyPatch.context() as environment:
        environment.setenv("OTEL_BSP_SCHEDULE_DELAY", "200")
        settings = on_servers(
            Settings(
                data_dir=folder / "data",
                port=free_port(),
                pinned_models="tiny",
                default_model="tiny",
                auth="keys",
                log_format="json",
                traces_endpoint=collector.url,
            )
        )
        register(settings, "tiny", save_tiny_model(folder / "tiny"))
        sessions = database.sessions(settings)
        key = sessions.write(
            access.create_key,
            access.load_pepper(settings),
            user="ada",
            scopes=(Scope.SCAN_READ, Scope.SCAN_WRITE, Scope.MODEL_LOAD),
        ).key
        sessions.close()
        with running(settings) as service:
            service.wait_until_ready()
            service.http.headers["authorization"] = f"Bearer {key}"
            yield Watched(service, collector, service.http, key)


@pytest.fixture(scope="module")
def scanned(watched: Watched) -> dict[str, Any]:
    """A scan, asked for within a trace of its caller's."""
    answer = watched.http.post(
        "/api/scan/anomaly",
        json={"prompt": PROMPT, "answer": ANSWER},
        headers={"prefer": "wait=30", "traceparent": CALLER},
    )
    assert answer.status_code == 200, answer.text
    job: dict[str, Any] = answer.json()
    return job


def test_a_trace_goes_from_the_request_to_the_forward_pass(
    watched: Watched, scanned: dict[str, Any]
) -> None:
    spans = watched.trace(
        TRACE, "POST /api/scan/anomaly", "queue", "claim", "attempt", "forward", "store"
    )
    request, attempt = spans["POST /api/scan/anomaly"], spans["attempt"]
    assert request.parent == CALLERS_SPAN
    assert (request.service, attempt.service) == ("neural-mri-api", "neural-mri-worker")
    assert spans["queue"].parent == attempt.parent == request.id
    for part in ("claim", "forward", "store"):
        assert spans[part].parent == attempt.id
        assert attempt.began <= spans[part].began <= spans[part].ended <= attempt.ended
    assert spans["forward"].ended <= spans["store"].began
    assert not any(span.failed for span in spans.values())


def test_spans_say_which_job_and_what_came_of_it(watched: Watched, scanned: dict[str, Any]) -> None:
    spans = watched.trace(TRACE, "POST /api/scan/anomaly", "attempt", "forward")
    request, attempt = spans["POST /api/scan/anomaly"].attributes, spans["attempt"].attributes
    assert request["http.response.status_code"] == 200
    assert request["neural_mri.job"] == attempt["neural_mri.job"] == scanned["id"]
    assert request["neural_mri.work"] == "queued"
    assert attempt["neural_mri.state"] == "succeeded"
    seconds = spans["forward"].attributes["neural_mri.forward_seconds"]
    assert 0 < seconds < (spans["forward"].ended - spans["forward"].began) / 1e9


def test_an_answer_from_the_store_says_so_and_waits_for_no_worker(
    watched: Watched, scanned: dict[str, Any]
) -> None:
    trace = "1" * 32
    answer = watched.http.post(
        "/api/scan/anomaly",
        json={"prompt": PROMPT, "answer": ANSWER},
        headers={"prefer": "wait=5", "traceparent": f"00-{trace}-{'2' * 16}-01"},
    )
    assert answer.json()["cached"] is True
    spans = watched.trace(trace, "POST /api/scan/anomaly")
    assert list(spans) == ["POST /api/scan/anomaly"]
    assert spans["POST /api/scan/anomaly"].attributes["neural_mri.work"] == "stored"


def test_the_load_of_a_model_stands_in_its_requests_trace(watched: Watched) -> None:
    trace = "3" * 32
    answer = watched.http.post(
        "/api/model/load",
        json={"model": "tiny"},
        headers={"prefer": "wait=30", "traceparent": f"00-{trace}-{'4' * 16}-01"},
    )
    assert answer.status_code == 200, answer.text
    spans = watched.trace(trace, "POST /api/model/load", "attempt", "load")
    assert spans["load"].parent == spans["attempt"].id


def test_a_caller_that_samples_nothing_is_told_nothing_of(watched: Watched) -> None:
    trace = "5" * 32
    watched.http.get("/api/jobs", headers={"traceparent": f"00-{trace}-{'6' * 16}-00"})
    after = "7" * 32
    watched.http.get("/api/jobs", headers={"traceparent": f"00-{after}-{'6' * 16}-01"})
    watched.trace(after, "GET /api/jobs")
    assert watched.collector.spans(trace) == []


@pytest.fixture(scope="module")
def refused(watched: Watched) -> int:
    """What came of a request whose refusal quotes it."""
    answer = watched.http.post("/api/scan/activation", json={"prompt": PROMPT, "layers": [NOWHERE]})
    assert NOWHERE in answer.text
    return answer.status_code


def test_every_line_of_a_log_is_json_and_the_jobs_lines_name_the_job(
    watched: Watched, scanned: dict[str, Any]
) -> None:
    def of_job(process: str) -> list[dict[str, Any]]:
        return [line for line in watched.lines(process) if line.get("job_id") == scanned["id"]]

    def events(process: str) -> list[str]:
        return [line["event"] for line in of_job(process)]

    # Both are written after the answer is on its way.
    assert until(lambda: "request_answered" in events("api"), 10)
    assert until(lambda: "attempt_ended" in events("worker"), 10)
    assert events("api") == ["request_answered"]
    assert of_job("api")[0]["trace_id"] == TRACE
    for line in of_job("worker"):
        assert line["model"] == "tiny"
        assert line["trace_id"] == TRACE


def test_no_prompt_and_no_key_is_in_any_log_or_span(
    watched: Watched, scanned: dict[str, Any], refused: int
) -> None:
    assert refused == 422
    watched.trace(TRACE, "attempt")
    logged, wire = watched.logs(), watched.collector.wire
    assert scanned["id"] in logged
    assert scanned["id"].encode() in wire
    for secret in (*SECRETS, watched.key):
        assert secret not in logged
        assert secret.encode() not in wire
