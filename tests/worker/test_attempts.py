"""What one worker does with what it claims, on a real database, store, Valkey and (tiny) model."""

import errno
import os
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

import pytest
import structlog
import torch

from neural_mri.backing import deletion, jobs, keys, models, queue, saving, storage, stored
from neural_mri.backing.database import Sessions
from neural_mri.backing.events import Publisher
from neural_mri.backing.jobs import Job, LeaseOwner
from neural_mri.backing.storage import NamedBytes, Store, StoreFull, StoreUnavailable, Writing
from neural_mri.contract.events import (
    ActivationFrame,
    Artifact,
    Ended,
    LayerFrame,
    Progress,
    StateChanged,
)
from neural_mri.contract.jobs import JobKind, JobState
from neural_mri.contract.models import Numerics
from neural_mri.contract.problems import Unavailable
from neural_mri.contract.results import provenance_of
from neural_mri.contract.scan_keys import SCANNER_VERSION
from neural_mri.contract.scans import (
    ActivationScan,
    AttentionScan,
    StructuralScan,
)
from tests.models import prompt as models_prompt
from tests.servers import folder_only
from tests.worker.bench import Bench, Interrupting
from worker import attempts as module
from worker import scans

ELSEWHERE = LeaseOwner("another-host", 4242, 99)


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
    manifest = stored.load_manifest(holding_tiny.store, done.manifest)
    assert manifest.scan_key == job.scan_key
    assert manifest.prompt_tokens == ("w0", "w1", "w2", "w3", "w4", "w5")
    assert 0 < manifest.forward_seconds <= manifest.compute_seconds
    tables = stored.read_tables(holding_tiny.store, done.manifest)
    for ref in manifest.tables:
        provenance = provenance_of(tables[ref.name])
        assert provenance.model == "tiny"
        assert provenance.revision == holding_tiny.tiny.revision
        assert provenance.scan_key == job.scan_key
        assert provenance.unit == ref.unit


@pytest.mark.parametrize(("packed_bytes", "between"), [(1 << 20, ()), (0, (JobState.STORING,))])
def test_a_scan_tells_its_whole_story_in_order(
    holding_tiny: Bench,
    monkeypatch: pytest.MonkeyPatch,
    packed_bytes: int,
    between: tuple[JobState, ...],
) -> None:
    monkeypatch.setattr(saving, "PACKED_BYTES", packed_bytes)
    job = holding_tiny.submit(PROMPT)
    holding_tiny.attempts().take(holding_tiny.queue)
    story = holding_tiny.told(job.id)
    states = [event.state for event in story if isinstance(event, StateChanged)]
    assert states == [JobState.CLAIMED, JobState.RUNNING, *between]
    frames = [event.token_idx for event in story if isinstance(event, ActivationFrame)]
    assert frames == list(range(6))
    manifest = stored.load_manifest(holding_tiny.store, holding_tiny.now(job).manifest or "")
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
    manifest = stored.load_manifest(holding_tiny.store, done.manifest or "")
    assert {ref.name for ref in manifest.tables} == {"attention.0", "attention.2"}


def test_topology_needs_no_weights_in_memory(bench: Bench) -> None:
    job = bench.submit(StructuralScan(model="tiny"))
    assert bench.attempts().take(keys.CPU_QUEUE) == 1
    assert bench.now(job).state is JobState.SUCCEEDED
    assert bench.residency.held() == ()


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
    for path in keys.Attempt(job.id, 1).results:
        assert not holding_tiny.store.exists(path)
    story = holding_tiny.told(job.id)
    assert not any(isinstance(event, Ended | Artifact) for event in story)


def test_a_result_that_another_job_names_is_not_taken_away_with_a_deleted_one(
    holding_tiny: Bench,
) -> None:
    """As where the database has committed, has not said so, and somebody was quick."""
    job = holding_tiny.submit(PROMPT)
    others: list[Job] = []

    def it_is_committed_found_and_deleted() -> None:
        sessions, path = holding_tiny.sessions, keys.packed_path(job.id, 1)
        ended = sessions.write(jobs.advance, job.id, JobState.SUCCEEDED, attempt=1, manifest=path)
        assert ended is not None
        others.append(holding_tiny.submit(PROMPT, owner="bob"))
        sessions.write(deletion.delete_job, job.id)

    store = Interrupting(holding_tiny.store, it_is_committed_found_and_deleted)
    holding_tiny.attempts(store).take(holding_tiny.queue)
    [other] = others
    assert other.cached
    assert other.manifest is not None
    assert stored.is_whole(holding_tiny.store, other.manifest)


def test_what_a_late_worker_wrote_for_a_job_that_is_deleted_is_taken_away(
    holding_tiny: Bench,
) -> None:
    job = holding_tiny.submit(PROMPT)

    def it_is_given_up_and_deleted_long_ago() -> None:
        sessions = holding_tiny.sessions
        sessions.write(jobs.advance, job.id, JobState.CANCELLED, attempt=1)
        sessions.write(deletion.delete_job, job.id)
        sessions.write(deletion.settle, [job.id])

    store = Interrupting(holding_tiny.store, it_is_given_up_and_deleted_long_ago)
    holding_tiny.attempts(store).take(holding_tiny.queue)
    for path in keys.Attempt(job.id, 1).results:
        assert not holding_tiny.store.exists(path)


def test_a_stale_attempt_keeps_no_frames_for_who_comes_to_watch(holding_tiny: Bench) -> None:
    job = holding_tiny.submit(PROMPT)
    holding_tiny.redis.delete(keys.watched(job.id))

    def another_worker_takes_over() -> None:
        with holding_tiny.sessions.writing() as session:
            jobs.reap(session, max_attempts=3, dead_owners=lambda _owner: True)

    store = Interrupting(holding_tiny.store, another_worker_takes_over)
    holding_tiny.attempts(store).take(holding_tiny.queue)
    assert holding_tiny.now(job).state is JobState.QUEUED
    holding_tiny.redis.set(keys.watched(job.id), b"1")
    story = holding_tiny.told(job.id)
    assert [event for event in story if isinstance(event, StateChanged)]
    assert not any(isinstance(event, LayerFrame | ActivationFrame) for event in story)


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
    def broken(*_: object, **__: object) -> None:
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
        torch.AcceleratorError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)
def test_too_little_memory_is_said_plainly(
    holding_tiny: Bench, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def greedy(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(scans, "scan_activations", greedy)
    job = holding_tiny.submit(PROMPT)
    holding_tiny.attempts().take(holding_tiny.queue)
    problem = holding_tiny.now(job).problem
    assert problem is not None
    assert problem["type"] == "urn:neural-mri:problem:out-of-memory"
    assert "shorter prompt" in problem["detail"]


@pytest.mark.parametrize("count", [1, 2])
def test_a_lost_device_ends_no_job(
    holding_tiny: Bench, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    """The process ends (`test_chaos`), and who it leaves is tried by another: each alone."""

    def lost(*_: object, **__: object) -> None:
        raise torch.AcceleratorError("CUDA error: device-side assert triggered")

    monkeypatch.setattr(torch.nn.functional, "embedding", lost)
    sent = [
        holding_tiny.submit(PROMPT, n_tokens=5, tokens=models_prompt(5, seed=seed))
        for seed in range(count)
    ]
    with pytest.raises(torch.AcceleratorError):
        holding_tiny.attempts().take(holding_tiny.queue)
    held = [holding_tiny.now(job) for job in sent]
    assert [(job.state, job.attempt) for job in held] == [(JobState.RUNNING, 1)] * count
    monkeypatch.undo()
    holding_tiny.sessions.write(jobs.reap, max_attempts=3, dead_owners=lambda _: True)
    taken = [holding_tiny.attempts().take(holding_tiny.queue) for _ in sent]
    assert taken == [1] * count
    assert [holding_tiny.now(job).state for job in sent] == [JobState.SUCCEEDED] * count


def test_numbers_are_never_stored_under_a_key_that_promises_others(holding_tiny: Bench) -> None:
    job = holding_tiny.submit(PROMPT, scan_key="0" * 64)
    holding_tiny.attempts().take(holding_tiny.queue)
    done = holding_tiny.now(job)
    assert done.state is JobState.FAILED
    assert done.problem is not None
    assert done.problem["type"] == "urn:neural-mri:problem:model-changed"


@pytest.mark.parametrize(
    "made_for",
    [
        {"scanner_version": "1"},
        {"scanner_version": str(int(SCANNER_VERSION) + 1)},
        {"numerics": Numerics(dtype="bfloat16", device="cuda")},
    ],
    ids=["an earlier scanner", "a later one", "other numerics"],
)
def test_a_scan_asked_for_before_an_upgrade_has_the_key_of_what_it_comes_to(
    holding_tiny: Bench, made_for: dict[str, Any]
) -> None:
    bench = holding_tiny
    job, follower = (bench.submit(PROMPT, keyed=made_for, owner=owner) for owner in ("ada", "bob"))
    assert follower.leader == job.id
    bench.attempts().take(bench.queue)
    true_key = bench.submission(PROMPT).scan_key
    for done in map(bench.now, (job, follower)):
        assert (done.state, done.problem) == (JobState.SUCCEEDED, None)
        assert done.view().scan_key == true_key != job.scan_key
        assert stored.load_manifest(bench.store, done.manifest or "").scan_key == true_key
    assert bench.submit(PROMPT).cached
    assert not bench.submit(PROMPT, keyed=made_for).cached, "its key promises other numbers"


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


def test_a_commit_whose_answer_was_lost_is_a_commit(
    holding_tiny: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The database went away after it had committed: what the row names is not taken away."""
    monkeypatch.setattr(saving, "PACKED_BYTES", 0)
    write, unanswered = Sessions.write, {JobState.STORING, JobState.SUCCEEDED}

    def lost(sessions: Sessions, work: Any, *args: Any, **kwargs: Any) -> Any:
        written = write(sessions, work, *args, **kwargs)
        states = (
            {moved.state for moved in written.values() if moved}
            if isinstance(written, dict)
            else set()
        )
        if forgotten := states & unanswered:
            unanswered.difference_update(forgotten)
            raise Unavailable("away")
        return written

    monkeypatch.setattr(module, "DATABASE_PAUSE_SECONDS", 0.05)
    monkeypatch.setattr(Sessions, "write", lost)
    job = holding_tiny.submit(PROMPT)
    holding_tiny.attempts().take(holding_tiny.queue)
    assert not unanswered, "both commits were made, and neither was answered"
    done = holding_tiny.now(job)
    assert done.state is JobState.SUCCEEDED
    assert done.manifest is not None
    assert holding_tiny.store.exists(done.manifest)
    assert isinstance(holding_tiny.told(job.id)[-1], Ended)


class Full:
    """A store that has no room for some writes."""

    def __init__(self, store: Store, refusals: int) -> None:
        self._store = store
        self.refusals = refusals

    def begin(self, files: Iterable[NamedBytes]) -> Writing:
        if self.refusals:
            self.refusals -= 1
            raise storage.StoreFull("nothing was stored: no room")
        return self._store.begin(files)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)


def test_a_store_that_is_full_for_a_moment_costs_no_result(
    holding_tiny: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "STORE_PAUSE_SECONDS", 0.05)
    store = Full(holding_tiny.store, refusals=5)
    job = holding_tiny.submit(PROMPT)
    holding_tiny.attempts(store).take(holding_tiny.queue)
    assert holding_tiny.now(job).state is JobState.SUCCEEDED
    assert store.refusals == 0


@folder_only
def test_a_result_that_waits_for_room_on_the_disk_is_storing_meanwhile(
    holding_tiny: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "STORE_PAUSE_SECONDS", 0.05)
    write, refusals = storage._write, iter(range(3))

    def written(file: int, body: bytes) -> None:
        if next(refusals, None) is not None:
            raise OSError(errno.ENOSPC, "no room")
        write(file, body)

    monkeypatch.setattr(storage, "_write", written)
    job = holding_tiny.submit(PROMPT)
    holding_tiny.attempts().take(holding_tiny.queue)
    assert holding_tiny.now(job).state is JobState.SUCCEEDED
    assert StateChanged(state=JobState.STORING, attempt=1) in holding_tiny.told(job.id)


@folder_only
def test_a_jobs_end_is_recorded_while_the_disk_writes_and_committed_when_it_has(
    holding_tiny: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "QUICK_STORE_SECONDS", 30.0)
    job = holding_tiny.submit(PROMPT)
    advance, flush = jobs.advance, os.fsync
    recorded, flushed = threading.Event(), list[JobState]()

    def noted(*args: Any, **kwargs: Any) -> Job | None:
        moved = advance(*args, **kwargs)
        if args[2] is JobState.SUCCEEDED:
            recorded.set()
        return moved

    def waits(file: int) -> None:
        assert recorded.wait(10), "nothing was recorded meanwhile"
        flush(file)
        flushed.append(holding_tiny.now(job).state)

    monkeypatch.setattr(jobs, "advance", noted)
    (holding_tiny.settings.store_dir / "packed").mkdir(parents=True, exist_ok=True)
    monkeypatch.setattr(os, "fsync", waits)
    holding_tiny.attempts().take(holding_tiny.queue)
    assert flushed == [JobState.RUNNING] * 2, "a file and its name"
    assert holding_tiny.now(job).state is JobState.SUCCEEDED


@folder_only
def test_while_a_slow_disk_writes_a_result_others_write_to_the_database(
    holding_tiny: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = holding_tiny.submit(PROMPT)
    attempts, flush = holding_tiny.attempts(), os.fsync
    flushing, may_go_on = threading.Event(), threading.Event()

    def waits(file: int) -> None:
        flushing.set()
        assert may_go_on.wait(30)
        flush(file)

    monkeypatch.setattr(os, "fsync", waits)
    with ThreadPoolExecutor(1) as pool:
        taking = pool.submit(attempts.take, holding_tiny.queue)
        try:
            assert flushing.wait(10)
            other = holding_tiny.submit(ActivationScan(prompt="others", model="tiny"), n_tokens=5)
            assert holding_tiny.now(other).state is JobState.QUEUED
            assert holding_tiny.now(job).state is JobState.RUNNING
        finally:
            may_go_on.set()
        assert taking.result(10) == 1
    assert holding_tiny.now(job).state is JobState.SUCCEEDED
    told = holding_tiny.told(job.id)
    assert sum(isinstance(each, Ended) for each in told) == 1


def test_a_store_that_stays_full_fails_the_job_and_says_why(
    holding_tiny: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "STORE_PAUSE_SECONDS", 0.05)
    monkeypatch.setattr(module, "STORE_SECONDS", 0.2)
    job = holding_tiny.submit(PROMPT)
    holding_tiny.attempts(Full(holding_tiny.store, refusals=10**6)).take(holding_tiny.queue)
    done = holding_tiny.now(job)
    assert (done.state, done.manifest) == (JobState.FAILED, None)
    assert done.problem is not None
    assert done.problem["type"] == "urn:neural-mri:problem:store-full"


def test_a_job_that_waits_for_the_store_can_be_cancelled(
    holding_tiny: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "STORE_PAUSE_SECONDS", 0.05)
    job = holding_tiny.submit(PROMPT)

    def ask() -> None:
        holding_tiny.sessions.write(jobs.request_cancel, job.id)
        Publisher(holding_tiny.redis, holding_tiny.settings).flag_cancel(job.id)

    full = Full(holding_tiny.store, refusals=10**6)
    holding_tiny.attempts(Interrupting(cast("Store", full), ask)).take(holding_tiny.queue)
    assert holding_tiny.now(job).state is JobState.CANCELLED


def test_loading_makes_a_model_ready_wanted_and_heard_of(bench: Bench) -> None:
    job = bench.order(JobKind.LOAD)
    bench.redis.set(keys.watched(job.id), b"1")
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
    holding_tiny.attempts().take(keys.CONTROL_QUEUE)
    assert holding_tiny.now(job).state is JobState.SUCCEEDED
    assert holding_tiny.intake.said == [f"close {holding_tiny.queue}"]
    assert holding_tiny.residency.held() == ()


def test_what_nobody_holds_any_more_is_unloaded_at_once(bench: Bench) -> None:
    """Who held it died since it was asked for: nobody listens to its queue, and who loads it later is to keep it."""
    job = bench.order(JobKind.UNLOAD)
    assert bench.attempts().take(keys.CONTROL_QUEUE) == 1
    assert bench.now(job).state is JobState.SUCCEEDED
    registered = bench.sessions.read(models.get, "tiny")
    assert registered is not None
    assert not registered.wanted


def test_a_pinned_model_stays(bench: Bench) -> None:
    bench.residency.load("tiny", pin=True)
    job = bench.order(JobKind.UNLOAD)
    bench.attempts().take(keys.CONTROL_QUEUE)
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


class FullFor:
    """A store that has room for everything but one job's result."""

    def __init__(self, store: Store, job: Job) -> None:
        self._store = store
        self._path = keys.packed_path(job.id, 1)

    def begin(self, files: Iterable[NamedBytes]) -> Writing:
        return self._store.begin(self._fitting(files))

    def _fitting(self, files: Iterable[NamedBytes]) -> Iterator[NamedBytes]:
        for file in files:
            if file.path == self._path:
                raise StoreFull(f"{file.path} was not stored: no room")
            yield file

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)


def test_of_jobs_that_share_a_pass_one_that_cannot_be_stored_fails_alone(
    holding_tiny: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "STORE_PAUSE_SECONDS", 0.05)
    monkeypatch.setattr(module, "STORE_SECONDS", 0.2)
    scans_of_one_length = [
        holding_tiny.submit(PROMPT, n_tokens=5, tokens=models_prompt(5, seed=seed))
        for seed in range(3)
    ]
    attempts = holding_tiny.attempts(FullFor(holding_tiny.store, scans_of_one_length[1]))
    assert attempts.take(holding_tiny.queue) == 3
    ended = [holding_tiny.now(job) for job in scans_of_one_length]
    assert [job.state for job in ended] == [
        JobState.SUCCEEDED,
        JobState.FAILED,
        JobState.SUCCEEDED,
    ]
    assert (ended[1].problem or {})["type"].endswith("store-full")
    for job in (ended[0], ended[2]):
        tables = stored.read_tables(holding_tiny.store, job.manifest or "")
        assert all(table.num_rows for table in tables.values())
        assert isinstance(holding_tiny.told(job.id)[-1], Ended)


class Away(Interrupting):
    """A store that goes away once all is written."""

    def delete(self, path: str) -> None:
        super().delete(path)
        raise StoreUnavailable("away")


def test_a_lost_attempts_file_that_cannot_be_taken_away_costs_its_mates_nothing(
    holding_tiny: Bench,
) -> None:
    lost, *others = [
        holding_tiny.submit(PROMPT, n_tokens=5, tokens=models_prompt(5, seed=seed))
        for seed in range(3)
    ]

    def lose() -> None:
        holding_tiny.sessions.write(jobs.advance, lost.id, JobState.QUEUED, attempt=1)

    store = Away(holding_tiny.store, lose)
    assert holding_tiny.attempts(store).take(holding_tiny.queue) == 3
    assert store.deleted == [keys.packed_path(lost.id, 1)]
    assert holding_tiny.now(lost).state is JobState.QUEUED
    for job in others:
        assert holding_tiny.now(job).state is JobState.SUCCEEDED
        assert isinstance(holding_tiny.told(job.id)[-1], Ended)


def test_mates_of_a_claim_leave_no_ticket_behind_but_a_few_always_stay(
    holding_tiny: Bench,
) -> None:
    def take_with(tickets: int, n_jobs: int) -> int:
        for seed in range(n_jobs):
            holding_tiny.submit(PROMPT, tokens=models_prompt(tickets, seed=seed))
        holding_tiny.redis.delete(holding_tiny.queue)
        queue.send_tickets(holding_tiny.redis, holding_tiny.queue, tickets)
        assert holding_tiny.attempts().take(holding_tiny.queue) == n_jobs
        return queue.waiting_tickets(holding_tiny.redis, holding_tiny.queue)

    assert take_with(tickets=20, n_jobs=4) == 17
    assert take_with(tickets=10, n_jobs=4) == queue.KEPT_TICKETS
    assert take_with(tickets=5, n_jobs=4) == 5
    assert take_with(tickets=21, n_jobs=1) == 21
