"""Who waits in vain for a model is told so, and nobody else: real tiny models, a real database and Valkey."""

import json
import time
from types import SimpleNamespace

import msgspec
import pytest
import structlog
import torch
from sqlalchemy import update
from transformers import AutoModelForCausalLM

from neural_mri.backing import keys, models, residences
from neural_mri.backing.database import Sessions, epoch
from neural_mri.backing.jobs import LeaseOwner
from neural_mri.backing.rows import JOBS, RESIDENCES
from neural_mri.contract.jobs import JobKind, JobState
from neural_mri.contract.problems import Unavailable, UnsupportedModel
from tests.worker.bench import Bench
from tests.worker.several import (
    ELSEWHERE,
    Registered,
    aged,
    ask,
    kind_of_end,
    names,
    other_worker,
    serve,
    short_of_memory,
    working,
)
from worker import modelstore
from worker.calibrations import Calibrations
from worker.memory import Memory, Reading
from worker.scanner import loading


@pytest.fixture(autouse=True)
def uncalibrated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calibrating takes longer than all else here, and these tests look at no number."""
    monkeypatch.setattr(Calibrations, "prepare", lambda *_: None)


def test_what_fits_nowhere_is_said_to_everybody_who_waits(
    bench: Bench, registered: Registered
) -> None:
    with working(bench, memory_bytes=20_000) as worker:
        asked = [ask(worker, registered["b"], n_tokens=n) for n in (4, 5)]
        attempts = worker.attempts()
        attempts.take(worker.placing.queue)
        assert {worker.now(job).state for job in asked} == {JobState.QUEUED}, (
            "a larger one may come"
        )
        with worker.sessions.writing() as session:
            session.execute(update(JOBS).values(created_at=epoch() - 11.0))
        attempts.take(worker.placing.queue)
        for job in asked:
            ended = worker.now(job)
            assert ended.state is JobState.FAILED
            assert ended.problem is not None
            assert ended.problem["type"] == "urn:neural-mri:problem:out-of-memory"
            assert ended.problem["budget_bytes"] == 16_000
            assert ended.problem["estimated_bytes"] > 16_000
            assert "15.6 KiB" in ended.problem["detail"]
            assert worker.told(job.id)[-1].state is JobState.FAILED  # type: ignore[union-attr]  # the end
        load = worker.order(JobKind.LOAD)
        attempts.take(keys.CONTROL_QUEUE)
        problem = worker.now(load).problem
        assert problem is not None
        assert problem["type"] == "urn:neural-mri:problem:out-of-memory"


def test_a_model_that_cannot_be_loaded_is_said_to_who_waits_for_it(
    bench: Bench, registered: Registered
) -> None:
    weights = bench.settings.models_dir / registered["b"].folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    job = ask(bench, registered["b"])
    assert serve(bench, job) == [JobState.FAILED]
    problem = bench.now(job).problem
    assert problem is not None
    assert problem["type"] == "urn:neural-mri:problem:unsupported-model"
    assert bench.sessions.read(residences.holders, registered["b"].revision) == []


def test_a_model_whose_shapes_are_not_what_it_says_is_said_to_who_waits_and_stops_no_worker(
    bench: Bench, registered: Registered
) -> None:
    path = bench.settings.models_dir / registered["b"].folder / "config.json"
    configuration = json.loads(path.read_bytes())
    path.write_text(json.dumps(configuration | {"vocab_size": configuration["vocab_size"] + 1}))
    job = ask(bench, registered["b"])
    assert serve(bench, job) == [JobState.FAILED]
    assert kind_of_end(bench, job) == "unsupported-model"
    assert "model.embed_tokens.weight" in str(bench.now(job).problem)
    bench.sessions.write(models.set_wanted, "b", True)
    bench.placing.begin()
    assert names(bench) == set()
    assert bench.sessions.read(residences.holders, registered["b"].revision) == []


def test_what_nobody_foresaw_of_a_load_ends_the_jobs_as_an_incident(
    bench: Bench, registered: Registered, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise AttributeError("the inner secret")

    monkeypatch.setattr(loading, "load", broken)
    job = ask(bench, registered["b"])
    assert serve(bench, job) == [JobState.FAILED]
    assert kind_of_end(bench, job) == "internal-error"
    assert "the inner secret" not in str(bench.now(job).problem)
    bench.sessions.write(models.set_wanted, "b", True)
    bench.placing.begin()


def test_a_device_that_is_lost_while_a_model_is_loaded_ends_no_job(
    bench: Bench, registered: Registered, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lost(*_: object, **__: object) -> None:
        raise torch.AcceleratorError("CUDA error: device-side assert triggered")

    job = ask(bench, registered["b"])
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lost)
    with pytest.raises(torch.AcceleratorError):
        bench.attempts().take(bench.placing.queue)
    assert bench.now(job).state is JobState.QUEUED
    bench.sessions.write(models.set_wanted, "b", True)
    with pytest.raises(torch.AcceleratorError):
        bench.placing.begin()


def test_a_copy_that_cannot_be_loaded_costs_those_nothing_whom_another_worker_serves(
    bench: Bench, registered: Registered, monkeypatch: pytest.MonkeyPatch
) -> None:
    other_worker(bench.redis, registered["b"])
    loads = list[object]()

    def unreadable(*_: object) -> None:
        loads.append(1)
        raise UnsupportedModel("the volume is away here")

    monkeypatch.setattr(loading, "load", unreadable)
    job = ask(bench, registered["b"])
    aged(bench, 20.0)
    assert serve(bench, job) == [JobState.QUEUED]
    assert len(loads) == 1, "it is not tried again at once"
    # Nor where only its claim tells of the other.
    bench.redis.flushall()
    bench.sessions.write(residences.claim, registered["b"].revision, ELSEWHERE, copies=None)
    monkeypatch.setattr(bench.placing, "_avoided", {})
    monkeypatch.setattr(
        bench.placing, "_claim", lambda *_, **__: residences.Claim(is_granted=True, losses=0)
    )
    assert serve(bench, job) == [JobState.QUEUED]
    assert len(loads) == 2


def test_a_database_that_is_away_while_a_model_is_loaded_costs_no_job(
    bench: Bench, registered: Registered, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, refused = Sessions.read, list[str]()

    def away_once(self: Sessions, work: object, *args: object, **kwargs: object) -> object:
        if work is models.get and not refused:
            refused.append("away")
            raise Unavailable("away")
        return read(self, work, *args, **kwargs)  # type: ignore[arg-type]  # passed on as it came

    monkeypatch.setattr("worker.placing.RETRY_SECONDS", 0.2)
    job = ask(bench, registered["b"])
    monkeypatch.setattr(Sessions, "read", away_once)
    bench.attempts().take(bench.placing.queue)
    assert (bench.now(job).state, refused) == (JobState.QUEUED, ["away"])
    assert bench.sessions.read(residences.holders, registered["b"].revision) == []
    time.sleep(0.3)
    assert serve(bench, job) == [JobState.SUCCEEDED]


@pytest.mark.parametrize("on_demand", [True, False])
def test_weights_that_no_model_has_any_longer_are_waited_for_in_vain(
    bench: Bench, registered: Registered, *, on_demand: bool
) -> None:
    with working(bench, load_on_demand=on_demand) as worker:
        gone = msgspec.structs.replace(registered["b"], revision="0" * 64)
        job = ask(worker, gone)
        assert serve(worker, job) == [JobState.QUEUED], "it may be registered in a moment"
        aged(worker, 11.0)
        assert serve(worker, job) == [JobState.FAILED]
        assert kind_of_end(worker, job) == "model-changed"


def test_weights_are_loaded_by_a_name_that_has_them(bench: Bench, registered: Registered) -> None:
    """Who asked by one that has others since is told so; nobody else is."""
    model = registered["b"]
    modelstore.add(bench.settings, "also-b", f"folder:{registered.folder_of('b')}")
    asked = [ask(bench, model), ask(bench, msgspec.structs.replace(model, name="also-b"))]
    modelstore.add(bench.settings, "b", f"folder:{registered.folder_of('c')}")
    assert serve(bench, *asked) == [JobState.FAILED, JobState.SUCCEEDED]
    assert kind_of_end(bench, asked[0]) == "model-changed"


@pytest.fixture
def crowded(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> Bench:
    """A worker with room for anything, nearly all of which others have now."""
    monkeypatch.setattr(Memory, "for_models", lambda *_: Reading(10**9, 1000))
    return bench


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What time it is to those who count how long models are crowded out."""
    now = [1000.0]
    monkeypatch.setattr("worker.refusals.time", SimpleNamespace(monotonic=lambda: now[0]))
    return now


def test_a_model_whose_room_others_have_is_refused_when_patience_ends(
    crowded: Bench, registered: Registered, clock: list[float]
) -> None:
    job = ask(crowded, registered["b"])
    aged(crowded, 100.0)
    with structlog.testing.capture_logs() as said:
        assert serve(crowded, job) == [JobState.QUEUED]
    assert [entry["event"] for entry in said].count("model_crowded_out") == 1
    clock[0] += 61.0
    memory = crowded.placing._memory
    with memory.lent():
        assert serve(crowded, job) == [JobState.QUEUED], "a scan may have it"
    other_worker(crowded.redis, free_bytes=0)
    assert serve(crowded, job) == [JobState.QUEUED], "of another it is not known whose it is"
    other_worker(crowded.redis, free_bytes=0, resting=True)
    assert serve(crowded, job) == [JobState.FAILED]
    assert kind_of_end(crowded, job) == "out-of-memory"
    problem = crowded.now(job).problem or {}
    assert problem["budget_bytes"] == 1000
    assert "others have the rest" in problem["detail"]


def test_room_that_others_had_for_a_moment_is_waited_for(
    crowded: Bench,
    registered: Registered,
    clock: list[float],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    job = ask(crowded, registered["b"])
    aged(crowded, 100.0)
    assert serve(crowded, job) == [JobState.QUEUED]
    clock[0] += 61.0
    monkeypatch.setattr(Memory, "for_models", lambda *_: Reading(10**9, 10**9))
    assert serve(crowded, job) == [JobState.SUCCEEDED]


def test_who_asks_by_name_is_told_what_there_is_now(crowded: Bench) -> None:
    load = crowded.order(JobKind.LOAD)
    crowded.attempts().take(keys.CONTROL_QUEUE)
    problem = crowded.now(load).problem or {}
    assert problem["budget_bytes"] == 1000
    assert "could have at most 1000 bytes for it now" in problem["detail"]


def test_loads_that_ran_out_of_memory_bar_no_model_from_who_asks_by_name(
    bench: Bench, registered: Registered, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = residences.estimate(bench.tiny.n_parameters, 0, "float32").memory_bytes
    short_of_memory(monkeypatch, 2)
    with working(bench, memory_bytes=int(1.6 * size / 0.8)) as worker:
        waiting = ask(worker, bench.tiny)
        assert serve(worker, waiting) == [JobState.QUEUED]
        cost = worker.sessions.read(residences.costs, "float32")[bench.tiny.revision]
        assert cost.memory_bytes == pytest.approx(2.25 * size, abs=2)
        load = worker.order(JobKind.LOAD)
        worker.attempts().take(keys.CONTROL_QUEUE)
        assert worker.now(load).state is JobState.SUCCEEDED
        assert serve(worker, waiting) == [JobState.SUCCEEDED]


def test_what_was_guessed_of_a_load_goes_with_those_who_were_refused_for_it(
    bench: Bench, registered: Registered, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = residences.estimate(registered["b"].n_parameters, 0, "float32").memory_bytes
    short_of_memory(monkeypatch, 2)
    monkeypatch.setattr("worker.placing.AVOIDED_SECONDS", 0.2)
    with working(bench, memory_bytes=int(1.6 * size / 0.8)) as worker:
        waiting = ask(worker, registered["b"])
        assert serve(worker, waiting) == [JobState.QUEUED]
        aged(worker, 11.0)
        assert serve(worker, waiting) == [JobState.FAILED]
        assert kind_of_end(worker, waiting) == "out-of-memory"
        time.sleep(0.3)
        assert serve(worker, ask(worker, registered["b"])) == [JobState.SUCCEEDED]


def test_a_load_by_name_that_runs_out_of_memory_says_so_of_the_model(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    short_of_memory(monkeypatch, 1)
    load = bench.order(JobKind.LOAD)
    bench.attempts().take(keys.CONTROL_QUEUE)
    assert kind_of_end(bench, load) == "out-of-memory"
    assert "while tiny was loaded" in str(bench.now(load).problem)


def test_a_load_that_runs_out_of_memory_costs_neither_worker_nor_jobs(
    bench: Bench, registered: Registered, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is tried again with a higher guess, wherever there is so much room."""
    short_of_memory(monkeypatch, 1)
    registered.bring("b")
    guess = bench.sessions.read(residences.costs, "float32")[registered["b"].revision]
    job = ask(bench, registered["b"])
    bench.attempts().take(bench.placing.queue)
    assert bench.now(job).state is JobState.QUEUED
    higher = bench.sessions.read(residences.costs, "float32")[registered["b"].revision]
    assert higher.memory_bytes == pytest.approx(1.5 * guess.memory_bytes, abs=1)
    assert serve(bench, job) == [JobState.SUCCEEDED]


def test_a_model_that_kills_its_workers_is_given_up(bench: Bench, registered: Registered) -> None:
    revision = registered["b"].revision
    for _ in range(bench.settings.max_attempts):
        bench.sessions.write(residences.claim, revision, ELSEWHERE, copies=None)
        with bench.sessions.writing() as session:
            session.execute(update(RESIDENCES).values(until=epoch() - 1.0))
        bench.sessions.write(residences.claim, revision, LeaseOwner("a-third", 1, 1), copies=None)
        with bench.sessions.writing() as session:
            session.execute(update(RESIDENCES).values(until=epoch() - 1.0, loaded=True))
    job = ask(bench, registered["b"])
    assert serve(bench, job) == [JobState.FAILED]
    problem = bench.now(job).problem
    assert problem is not None
    assert problem["type"] == "urn:neural-mri:problem:loads-kill-workers"
    assert names(bench) == set()
