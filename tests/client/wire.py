"""A small service at the far end of a real socket: the wire as the contract has it, and its accidents.

It keeps jobs in memory, finishes each as soon as somebody has read its events, and can be told to cut an
event stream, to serve other bytes than its manifest names, or to answer a path with anything at all.
"""

import socket
import threading
import time
from collections import defaultdict
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple, Self
from urllib.parse import parse_qs, unquote, urlsplit
from uuid import UUID, uuid4

import msgspec

from neural_mri.contract.events import (
    ActivationFrame,
    EffectsFrame,
    Ended,
    Event,
    FrameLayer,
    LayerFrame,
    Progress,
    StateChanged,
    encode_event,
    event_name,
)
from neural_mri.contract.jobs import JobKind, JobState, JobView
from neural_mri.contract.problems import Problem, ResultNotReady, UnknownJob, UnknownModel
from neural_mri.contract.results import ARROW_FILE
from neural_mri.contract.scans import (
    ActivationScan,
    AnomalyScan,
    AttentionScan,
    CalibrationScan,
    CircuitScan,
    PatchingScan,
    PerturbationScan,
    Scan,
    ScanKind,
    StructuralScan,
    TracingScan,
    WeightScan,
    encode_scan,
)
from neural_mri.contract.tokens import Span, Tokens
from tests.client.specimens import ARCHITECTURE, MODEL, REVISION, TOKENS, Specimen, specimen

SCANS: Mapping[str, type[Any]] = {
    "scan/structural": StructuralScan,
    "scan/weights": WeightScan,
    "scan/activation": ActivationScan,
    "scan/attention": AttentionScan,
    "scan/circuits": CircuitScan,
    "scan/anomaly": AnomalyScan,
    "perturb": PerturbationScan,
    "perturb/patching": PatchingScan,
    "perturb/trace": TracingScan,
    "model/calibrate": CalibrationScan,
}

JSON = "application/json"
PROBLEM = "application/problem+json"


class Answer(NamedTuple):
    status: int
    content_type: str
    body: bytes
    headers: Mapping[str, str] = {}
    seconds: float = 0.0
    """How long it is in coming."""
    torn_after: int | None = None
    """So many bytes of the body go out one by one, each after those seconds; then the connection is torn."""


NO_ANSWER = Answer(0, "", b"")
"""The request is read, and the connection torn."""


class Asked(NamedTuple):
    """One request, as it arrived."""

    method: str
    path: str
    query: Mapping[str, str]
    headers: Mapping[str, str]
    body: bytes


def json_answer(value: Any, status: int = 200) -> Answer:
    return Answer(status, JSON, msgspec.json.encode(value))


def problem_answer(problem: Problem) -> Answer:
    return Answer(problem.status, PROBLEM, msgspec.json.encode(problem.document()))


@dataclass
class Cut:
    """How one connection to an event stream goes wrong."""

    after_bytes: int
    cleanly: bool = False
    """Whether the answer is ended properly (a service shutting down) or torn off."""


@dataclass
class WireJob:
    view: JobView
    events: list[Event]
    stored: Specimen | None = None
    cuts: list[Cut] = field(default_factory=list)
    """For each connection to the events in turn; none left means no more accidents."""
    hold: threading.Event | None = None
    """Where set, the stream waits for it before the last event."""


class Wire:
    """Use it as a context manager. Tests change its fields before and during a conversation."""

    def __init__(self) -> None:
        self.jobs: dict[UUID, WireJob] = {}
        self.asked: list[Asked] = []
        self.answers: dict[tuple[str, str], list[Answer]] = defaultdict(list)
        """Answers given, once each and in order, instead of the usual one."""
        self.next_cuts: list[Cut] = []
        self.next_end = Ended(state=JobState.SUCCEEDED, attempt=1)
        self.next_hold: threading.Event | None = None
        self.cached = False
        self.connections: list[socket.socket] = []
        self._lock = threading.Lock()
        wire = self

        class Handler(_Handler):
            service = wire

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        for job in self.jobs.values():
            if job.hold is not None:
                job.hold.set()
        self._server.shutdown()
        for connection in self.connections:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        self._server.server_close()
        self._thread.join()

    def paths(self, method: str = "GET") -> list[str]:
        return [asked.path for asked in self.asked if asked.method == method]

    def submit(self, scan: Scan) -> WireJob:
        request = msgspec.json.decode(encode_scan(scan), type=dict[str, Any])
        stored = specimen(scan)
        view = self._view(JobKind.SCAN, request)
        if self.cached:
            view = msgspec.structs.replace(view, state=JobState.SUCCEEDED, cached=True)
        events: list[Event] = [self.next_end]
        if not self.cached:
            events = life_of_a_scan(self.next_end)
            if isinstance(scan, CircuitScan):
                events[2:-2] = effects_of_a_circuit()
        return self._keep(WireJob(view, events, stored))

    def job_about_a_model(self, kind: JobKind) -> WireJob:
        events: list[Event] = [
            StateChanged(state=JobState.LOADING, attempt=1),
            Progress(stage="load", done=10, total=10),
            self.next_end,
        ]
        return self._keep(WireJob(self._view(kind, {"model": MODEL.name}), events))

    def finish(self, job: WireJob, ended: Ended) -> None:
        job.view = msgspec.structs.replace(
            job.view, state=ended.state, problem=ended.problem, finished_at=datetime.now(UTC)
        )

    def _view(self, kind: JobKind, request: dict[str, Any]) -> JobView:
        job_id = uuid4()
        return JobView(
            id=job_id,
            kind=kind,
            state=JobState.QUEUED,
            model=MODEL.name,
            revision=REVISION,
            request=request,
            created_at=datetime.now(UTC),
            links={"self": f"/api/jobs/{job_id}", "events": f"/api/jobs/{job_id}/events"},
        )

    def _keep(self, job: WireJob) -> WireJob:
        job.cuts, job.hold = self.next_cuts, self.next_hold
        with self._lock:
            self.jobs[job.view.id] = job
        return job


def life_of_a_scan(ended: Ended) -> list[Event]:
    states = (JobState.CLAIMED, JobState.RUNNING)
    layers = range(ARCHITECTURE.n_layers)
    return [
        *(StateChanged(state=state, attempt=1) for state in states),
        *(
            LayerFrame(
                layer=layer,
                token_idx=4,
                heads=(1.0, 2.0),
                mlp=3.0 + layer,
                attn=2.5,
                resid_post=9.0,
                unit="L2 norm",
            )
            for layer in layers
        ),
        *(Progress(stage="forward", done=layer + 1, total=len(layers)) for layer in layers),
        ActivationFrame(
            token_idx=4,
            token=" 한국어 é",
            layers=(FrameLayer(layer_id="embed", type="embedding", activations=(1.5,)),),
            unit="L2 norm",
        ),
        StateChanged(state=JobState.STORING, attempt=1),
        ended,
    ]


def effects_of_a_circuit() -> list[Event]:
    """Estimates of two components, then the measurement of one."""
    frame = EffectsFrame(
        exact=False,
        components=("embed", "blocks.1.attn.head_2", "blocks.3.mlp"),
        effects=(99.0, 0.22, -1.5),
        unit="nats",
    )
    measured = EffectsFrame(exact=True, components=("blocks.3.mlp",), effects=(-4.0,), unit="nats")
    return [frame, measured]


class _Handler(BaseHTTPRequestHandler):
    """One connection."""

    service: Wire
    protocol_version = "HTTP/1.1"

    def setup(self) -> None:
        super().setup()
        self.service.connections.append(self.connection)

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def do_PUT(self) -> None:
        self._answer()

    def do_DELETE(self) -> None:
        self._answer()

    def _answer(self) -> None:
        address = urlsplit(self.path)
        path = unquote(address.path)
        body = self._body()
        if body is None:
            self.close_connection = True
            return
        query = {name: values[0] for name, values in parse_qs(address.query).items()}
        self.service.asked.append(Asked(self.command, path, query, dict(self.headers), body))
        if prepared := self.service.answers[self.command, path]:
            with suppress(BrokenPipeError, ConnectionResetError):  # who asked may have left
                self._send(prepared.pop(0))
            return
        try:
            parts = path.strip("/").split("/")
            if parts[:2] == ["api", "jobs"] and parts[3:] == ["events"]:
                self._stream(self._job(parts[2]))
            else:
                self._send(self._route(parts[1:], query, body))
        except Problem as problem:
            self._send(problem_answer(problem))

    def _body(self) -> bytes | None:
        """What was sent; None where it breaks off."""
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while line := self.rfile.readline():
            size = int(line, 16)
            body += self.rfile.read(size)
            self.rfile.readline()
            if size == 0:
                return body
        return None

    def _route(self, parts: list[str], query: Mapping[str, str], body: bytes) -> Answer:
        match parts:
            case _ if self.command == "POST" and (asked := SCANS.get("/".join(parts))):
                scan = msgspec.json.decode(body, type=asked)
                if scan.model not in {None, MODEL.name}:
                    raise UnknownModel(f"{scan.model!r} is not registered", known=[MODEL.name])
                return json_answer(self.service.submit(scan).view, 202)
            case ["jobs"]:
                views = [job.view for job in self.service.jobs.values()]
                return json_answer(views[: int(query["limit"])])
            case ["jobs", job_id]:
                job = self._job(job_id)
                if self.command == "DELETE":
                    return json_answer(self._cancel(job).view, 202)
                return json_answer(job.view)
            case ["jobs", job_id, *rest]:
                return self._result(self._job(job_id), rest)
            case _:
                return self._about_the_model(parts)

    def _about_the_model(self, parts: list[str]) -> Answer:
        match parts:
            case ["models"]:
                return json_answer([MODEL])
            case ["model", "info"]:
                return json_answer(MODEL)
            case ["model", "load" | "unload" as verb]:
                return json_answer(self.service.job_about_a_model(JobKind(verb)).view, 202)
            case ["tokenize"]:
                spans = tuple(Span(at, at + 1) for at in range(len(TOKENS)))
                ids = tuple(range(10, 10 + len(TOKENS)))
                return json_answer(Tokens(ids=ids, texts=TOKENS, spans=spans))
            case ["health"]:
                return json_answer({"status": "ok"})
            case _:
                return Answer(404, "text/html", b"<h1>no such page</h1>")

    def _job(self, job_id: str) -> WireJob:
        job = self.service.jobs.get(UUID(job_id))
        if job is None:
            raise UnknownJob(f"there is no job {job_id}", job=job_id)
        return job

    def _cancel(self, job: WireJob) -> WireJob:
        job.events[-1] = Ended(state=JobState.CANCELLED, attempt=1)
        if job.hold is not None:
            job.hold.set()
        return job

    def _result(self, job: WireJob, parts: list[str]) -> Answer:
        if job.view.state is not JobState.SUCCEEDED or job.stored is None:
            raise ResultNotReady(f"job {job.view.id} stands at {job.view.state.value!r}")
        match parts:
            case ["manifest"]:
                return json_answer(job.stored.manifest)
            case ["result"]:
                tokens = job.stored.manifest.prompt_tokens
                return json_answer({"model": MODEL.name, "prompt_tokens": tokens})
            case ["result", name]:
                return Answer(200, ARROW_FILE, job.stored.chunks[name])
            case ["attention", layer] if job.stored.manifest.kind is ScanKind.FMRI:
                prompt = job.view.request["prompt"]
                scan = AttentionScan(prompt=prompt, layers=(int(layer),))
                return json_answer(self.service.submit(scan).view, 202)
            case _:
                return Answer(404, "text/html", b"<h1>no such page</h1>")

    def _stream(self, job: WireJob) -> None:
        seen = int(self.headers.get("Last-Event-ID") or 0)
        if seen >= len(job.events):
            self._send(Answer(204, "text/event-stream", b""))
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        cut = job.cuts.pop(0) if job.cuts else None
        budget = None if cut is None else cut.after_bytes
        with suppress(BrokenPipeError, ConnectionResetError):
            for block in self._blocks(job, seen):
                if budget is not None and len(block) >= budget:
                    self._chunk(block[:budget])
                    if cut is not None and cut.cleanly:
                        self._chunk(b"")
                    self.close_connection = True
                    return
                self._chunk(block)
                budget = None if budget is None else budget - len(block)
            self._chunk(b"")

    def _blocks(self, job: WireJob, seen: int) -> Any:
        yield b": hello\nretry: 20\n\n"
        for number in range(seen + 1, len(job.events) + 1):
            if number == len(job.events) and job.hold is not None:
                job.hold.wait(20)
            event = job.events[number - 1]
            if isinstance(event, Ended):
                self.service.finish(job, event)
            yield f"id: {number}\nevent: {event_name(event)}\ndata: ".encode() + (
                encode_event(event) + b"\n\n"
            )

    def _chunk(self, body: bytes) -> None:
        self.wfile.write(b"%x\r\n%b\r\n" % (len(body), body))
        self.wfile.flush()

    def _send(self, answer: Answer) -> None:
        if answer is NO_ANSWER:
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        if answer.torn_after is None:
            time.sleep(answer.seconds)
        self.send_response(answer.status)
        self.send_header("Content-Type", answer.content_type)
        if answer.status != 204:
            self.send_header("Content-Length", str(len(answer.body)))
        for name, value in answer.headers.items():
            self.send_header(name, value)
        self.end_headers()
        if answer.torn_after is None:
            self.wfile.write(answer.body)
            return
        for at in range(answer.torn_after):
            self.wfile.write(answer.body[at : at + 1])
            time.sleep(answer.seconds)
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)
