"""What one worker does with what it claims, on a real database, store, Valkey and (tiny) model."""

import time
from collections.abc import Callable, Iterator
from typing import Any
from uuid import UUID

import pytest
import structlog

from neural_mri.backing import jobs, keys, models, storage
from neural_mri.backing.broker import SyncRedis
from neural_mri.backing.database import Sessions
from neural_mri.backing.events import Publisher, WorkerBeat, parse_entries
from neural_mri.backing.jobs import Job, LeaseOwner, Submission
from neural_mri.backing.models import RegisteredModel
from neural_mri.backing.settings import Settings
from neural_mri.backing.storage import Store
from neural_mri.contract.events import (
    ActivationFrame,
    Artifact,
    Ended,
    Event,
    Progress,
    StateChanged,
    decode_event,
)
from neural_mri.contract.jobs import JobKind, JobState
from neural_mri.contract.problems import Unavailable
from neural_mri.contract.results import provenance_of
from neural_mri.contract.scan_keys import scan_key
from neural_mri.contract.scans import (
    ActivationScan,
    AttentionScan,
    Scan,
    StructuralScan,
    encode_scan,
)
from neural_mri.contract.tokens import Span, Tokens
from worker import attempts as module
from worker import scans
from worker.attempts import Attempts
from worker.keeper import Keeper
from worker.reporter import Outbox
from worker.residency import Residency

ELSEWHERE = LeaseOwner("another-host", 4242, 99)


class Queues:
    """An intake that remembers what it was told."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def open(self, queue: str) -> None:
        self.said.append(f"open {queue}")

    def close(self, queue: str) -> None:
        self.said.append(f"close {queue}")


class Bench:
    """A worker's parts, put together by hand."""

    def __init__(
        self, settings: Settings, sessions: Sessions, redis: SyncRedis, tiny: RegisteredModel
    ) -> None:
        self.settings = settings
        self.sessions = sessions
        self.redis = redis
        self.tiny = tiny
        self.queue = keys.scan_queue(tiny.revision)
        self.store: Store = storage.open_store(settings)
        self.residency = Residency(settings, sessions)
        self.intake = Queues()
        self.outbox = Outbox(Publisher(redis, settings))
        self.keeper = Keeper(
            sessions=sessions,
            redis=redis,
            owner=LeaseOwner.here(),
            lease_seconds=settings.lease_seconds,
            describe=lambda: WorkerBeat(worker="worker-1@here", device="cpu", at=0.0),
        )

    def attempts(self, store: Store | None = None) -> Attempts:
        return Attempts(
            settings=self.settings,
            sessions=self.sessions,
            store=store or self.store,
            owner=LeaseOwner.here(),
            keeper=self.keeper,
            outbox=self.outbox,
            residency=self.residency,
            intake=self.intake,
        )

    def submit(self, scan: Scan, *, n_tokens: int = 6, **changes: Any) -> Job:
        prompted = not isinstance(scan, StructuralScan)
        tokens = (
            Tokens(
                ids=tuple(range(3, 3 + n_tokens)),
                texts=tuple(f"w{index}" for index in range(n_tokens)),
                spans=tuple(Span(3 * index, 3 * index + 2) for index in range(n_tokens)),
            )
            if prompted
            else None
        )
        fields: dict[str, Any] = {
            "owner": "ada",
            "kind": JobKind.SCAN,
            "model": "tiny",
            "revision": self.tiny.revision,
            "queue": self.queue if prompted else keys.CPU_QUEUE,
            "request": encode_scan(scan),
            "tokens": tokens,
            "scan_key": scan_key(
                scan,
                token_ids=tokens.ids if tokens else None,
                revision=self.tiny.revision,
                tokenizer_digest=self.tiny.tokenizer_digest,
                numerics=self.tiny.numerics,
            ),
        }
        return self.sessions.write(jobs.submit, Submission(**{**fields, **changes}))

    def order(self, kind: JobKind) -> Job:
        """A job to load or unload the model."""
        queue = keys.CONTROL_QUEUE if kind is JobKind.LOAD else self.queue
        submission = Submission(
            owner="ada",
            kind=kind,
            model="tiny",
            revision=self.tiny.revision,
            queue=queue,
            request=b'{"model":"tiny"}',
        )
        return self.sessions.write(jobs.submit, submission)

    def now(self, job: Job) -> Job:
        found = self.sessions.read(jobs.get, job.id)
        assert found is not None
        return found

    def told(self, job_id: UUID) -> list[Event]:
        assert self.outbox.flush(5)
        rows: Any = self.redis.xrange(keys.event_stream(job_id))
        return [decode_event(entry.data) for entry in parse_entries(rows)]


@pytest.fixture
def bench(
    settings: Settings, sessions: Sessions, redis: SyncRedis, tiny: RegisteredModel
) -> Iterator[Bench]:
    bench = Bench(settings, sessions, redis, tiny)
    with bench.outbox, bench.keeper:
        yield bench


@pytest.fixture
def holding_tiny(bench: Bench) -> Bench:
    bench.residency.load("tiny")
    return bench


PROMPT = ActivationScan(prompt="anything", model="tiny")


def test_a_ticket_with_nothing_to_do_returns(holding_tiny: Bench) -> None:
    assert holding_tiny.attempts().take(holding_tiny.queue) == 0


def test_a_ticket_for_a_model_that_is_not_held_leaves_the_job_to_others(bench: Bench) -> None:
    job = bench.submit(PROMPT)
    assert bench.attempts().take(bench.queue) == 0
    assert bench.now(job).state is JobState.QUEUED


def test_a_scan_is_whole_in_the_store_when_it_has_succeeded(holding_tiny: Bench) -> None:
    job = holding_tiny.submit(PROMPT)
    assert holding_tiny.attempts().take(holding_tiny.queue) == 1
    done = holding_tiny.now(job)
    assert (done.state, done.attempt, done.problem) == (JobState.SUCCEEDED, 1, None)
    assert done.manifest is not None
    manifest = storage.load_manifest(holding_tiny.store, done.manifest)
    assert manifest.scan_key == job.scan_key
    assert manifest.prompt_tokens == ("w0", "w1", "w2", "w3", "w4", "w5")
    assert 0 < manifest.forward_seconds <= manifest.compute_seconds
    for ref in manifest.tables:
        provenance = provenance_of(storage.read_table(holding_tiny.store, ref))
        assert provenance.model == "tiny"
        assert provenance.revision == holding_tiny.tiny.revision
        assert provenance.scan_key == job.scan_key
        assert provenance.unit == ref.unit


def test_a_scan_tells_its_whole_story_in_order(holding_tiny: Bench) -> None:
    job = holding_tiny.submit(PROMPT)
    holding_tiny.attempts().take(holding_tiny.queue)
    story = holding_tiny.told(job.id)
    states = [event.state for event in story if isinstance(event, StateChanged)]
    assert states == [JobState.CLAIMED, JobState.RUNNING, JobState.STORING]
    frames = [event.token_idx for event in story if isinstance(event, ActivationFrame)]
    assert frames == list(range(6))
    manifest = storage.load_manifest(holding_tiny.store, holding_tiny.now(job).manifest or "")
    artifacts = {event.table for event in story if isinstance(event, Artifact)}
    assert artifacts == {ref.name for ref in manifest.tables}
    assert story[-1] == Ended(
        state=JobState.SUCCEEDED, attempt=1, result=f"/api/jobs/{job.id}/result"
    )


def test_attention_patterns_are_scanned_too(holding_tiny: Bench) -> None:
    job = holding_tiny.submit(AttentionScan(prompt="anything", model="tiny", layers=(0, 2)))
    holding_tiny.attempts().take(holding_tiny.queue)
    done = holding_tiny.now(job)
    assert done.problem is None
    manifest = storage.load_manifest(holding_tiny.store, done.manifest or "")
    assert {ref.name for ref in manifest.tables} == {"attention.0", "attention.2"}


def test_topology_needs_no_weights_in_memory(bench: Bench) -> None:
    job = bench.submit(StructuralScan(model="tiny"))
    assert bench.attempts().take(keys.CPU_QUEUE) == 1
    assert bench.now(job).state is JobState.SUCCEEDED
    assert bench.residency.held() == ()


class Interrupting:
    """A store before whose first write something else happens."""

    def __init__(self, store: Store, event: Callable[[], None]) -> None:
        self._store = store
        self._event: Callable[[], None] | None = event
        self.deleted: list[str] = []

    def put(self, path: str, body: bytes) -> None:
        if self._event is not None:
            event, self._event = self._event, None
            event()
        self._store.put(path, body)

    def delete(self, path: str) -> None:
        self.deleted.append(path)
        self._store.delete(path)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)


def test_a_stale_attempt_cannot_publish(holding_tiny: Bench) -> None:
    job = holding_tiny.submit(PROMPT)

    def another_worker_takes_over() -> None:
        with holding_tiny.sessions.writing() as session:
            jobs.reap(session, max_attempts=3, dead_owners=lambda _owner: True)
            jobs.claim(
                session, queue=holding_tiny.queue, owner=ELSEWHERE, limit=1, lease_seconds=60
            )

    store = Interrupting(holding_tiny.store, another_worker_takes_over)
    holding_tiny.attempts(store).take(holding_tiny.queue)
    now = holding_tiny.now(job)
    assert (now.state, now.attempt, now.lease_owner) == (JobState.CLAIMED, 2, ELSEWHERE)
    assert not holding_tiny.store.exists(keys.manifest_path(job.id, 1))
    story = holding_tiny.told(job.id)
    assert not any(isinstance(event, Ended | Artifact) for event in story)


def test_a_scan_that_is_asked_to_stop_stops_and_says_so(holding_tiny: Bench) -> None:
    job = holding_tiny.submit(PROMPT)

    def ask() -> None:
        holding_tiny.sessions.write(jobs.request_cancel, job.id)
        Publisher(holding_tiny.redis, holding_tiny.settings).flag_cancel(job.id)
        time.sleep(0.5)  # as long as anybody needs to hear it

    holding_tiny.attempts(Interrupting(holding_tiny.store, ask)).take(holding_tiny.queue)
    assert holding_tiny.now(job).state is JobState.CANCELLED
    assert holding_tiny.told(job.id)[-1] == Ended(state=JobState.CANCELLED, attempt=1)


def test_what_the_scanner_refuses_is_the_callers_to_read(holding_tiny: Bench) -> None:
    scan = ActivationScan(prompt="anything", model="tiny", layers=("blocks.40.mlp",))
    job = holding_tiny.submit(scan)
    holding_tiny.attempts().take(holding_tiny.queue)
    done = holding_tiny.now(job)
    assert done.state is JobState.FAILED
    assert done.problem is not None
    assert done.problem["type"] == "urn:neural-mri:problem:unknown-component"
    assert done.problem["component"] == "blocks.40.mlp"


def test_a_bug_is_an_incident_outside_and_everything_in_the_log(
    holding_tiny: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("the inner secret")

    monkeypatch.setattr(scans, "scan_activations", broken)
    job, after = holding_tiny.submit(PROMPT), holding_tiny.submit(PROMPT, n_tokens=5)
    with structlog.testing.capture_logs() as log:
        holding_tiny.attempts().take(holding_tiny.queue)
    done = holding_tiny.now(job)
    assert done.state is JobState.FAILED
    assert done.problem is not None
    assert done.problem["status"] == 500
    assert done.problem["incident"] in done.problem["detail"]
    assert "the inner secret" not in str(done.problem)
    (entry,) = [entry for entry in log if entry["event"] == "attempt_failed"]
    assert entry["incident"] == done.problem["incident"]
    assert "the inner secret" in str(entry["exc_info"])
    monkeypatch.undo()
    holding_tiny.attempts().take(holding_tiny.queue)
    assert holding_tiny.now(after).state is JobState.SUCCEEDED


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("[enforce fail] . DefaultCPUAllocator: can't allocate memory: you tried ..."),
    ],
)
def test_too_little_memory_is_said_plainly(
    holding_tiny: Bench, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def greedy(*_: object) -> None:
        raise error

    monkeypatch.setattr(scans, "scan_activations", greedy)
    job = holding_tiny.submit(PROMPT)
    holding_tiny.attempts().take(holding_tiny.queue)
    problem = holding_tiny.now(job).problem
    assert problem is not None
    assert problem["type"] == "urn:neural-mri:problem:out-of-memory"
    assert "shorter prompt" in problem["detail"]


def test_numbers_are_never_stored_under_a_key_that_promises_others(holding_tiny: Bench) -> None:
    job = holding_tiny.submit(PROMPT, scan_key="0" * 64)
    holding_tiny.attempts().take(holding_tiny.queue)
    done = holding_tiny.now(job)
    assert done.state is JobState.FAILED
    assert done.problem is not None
    assert done.problem["type"] == "urn:neural-mri:problem:model-changed"


def test_a_database_that_is_away_for_a_moment_costs_no_result(
    holding_tiny: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    advance = jobs.advance
    refusals = iter(range(2))

    def away_twice(*args: Any, **kwargs: Any) -> Job | None:
        if args[2] is JobState.SUCCEEDED and next(refusals, None) is not None:
            raise Unavailable("away")
        return advance(*args, **kwargs)

    monkeypatch.setattr(module, "DATABASE_PAUSE_SECONDS", 0.05)
    monkeypatch.setattr(jobs, "advance", away_twice)
    job = holding_tiny.submit(PROMPT)
    holding_tiny.attempts().take(holding_tiny.queue)
    assert holding_tiny.now(job).state is JobState.SUCCEEDED
    assert list(refusals) == []


def test_loading_makes_a_model_ready_wanted_and_heard_of(bench: Bench) -> None:
    job = bench.order(JobKind.LOAD)
    bench.attempts().take(keys.CONTROL_QUEUE)
    assert bench.now(job).state is JobState.SUCCEEDED
    assert bench.intake.said == [f"open {bench.queue}"]
    assert [model.state for model in bench.residency.held()] == ["resident"]
    registered = bench.sessions.read(models.get, "tiny")
    assert registered is not None
    assert registered.wanted
    stages = {
        (event.stage, event.done) for event in bench.told(job.id) if isinstance(event, Progress)
    }
    assert ("load", bench.tiny.weights_bytes) in stages


def test_unloading_takes_a_model_out_of_memory_and_its_queue_away(holding_tiny: Bench) -> None:
    job = holding_tiny.order(JobKind.UNLOAD)
    holding_tiny.attempts().take(holding_tiny.queue)
    assert holding_tiny.now(job).state is JobState.SUCCEEDED
    assert holding_tiny.intake.said == [f"close {holding_tiny.queue}"]
    assert holding_tiny.residency.held() == ()


def test_a_pinned_model_stays(bench: Bench) -> None:
    bench.residency.load("tiny", pin=True)
    job = bench.order(JobKind.UNLOAD)
    bench.attempts().take(bench.queue)
    done = bench.now(job)
    assert done.problem is not None
    assert done.problem["type"] == "urn:neural-mri:problem:model-busy"
    assert bench.residency.held() != ()


def test_a_model_that_cannot_be_loaded_says_why(bench: Bench) -> None:
    weights = bench.settings.models_dir / bench.tiny.folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    job = bench.order(JobKind.LOAD)
    bench.attempts().take(keys.CONTROL_QUEUE)
    done = bench.now(job)
    assert done.state is JobState.FAILED
    assert done.problem is not None
    assert done.problem["type"] == "urn:neural-mri:problem:unsupported-model"
    assert bench.residency.held() == ()
