"""One worker's part in placing models: real tiny models, a real database and Valkey, a memory budget."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest
import structlog
import torch
from sqlalchemy import update
from transformers import AutoModelForCausalLM

from neural_mri.backing import events, keys, models, residences
from neural_mri.backing.broker import SyncRedis
from neural_mri.backing.database import Sessions, epoch
from neural_mri.backing.events import HeldModel, WorkerBeat
from neural_mri.backing.jobs import Job, LeaseOwner
from neural_mri.backing.models import RegisteredModel
from neural_mri.backing.rows import JOBS, RESIDENCES
from neural_mri.backing.settings import Settings
from neural_mri.contract.jobs import JobKind, JobState
from neural_mri.contract.models import ModelState
from neural_mri.contract.problems import Unavailable, UnsupportedModel
from neural_mri.contract.scans import ActivationScan
from tests.tiny import save_tiny_model
from tests.worker.bench import Bench
from worker import metrics, modelstore
from worker.admission import OutOfMemory, estimate
from worker.calibrations import Calibrations
from worker.memory import Memory, Reading
from worker.scanner import loading
from worker.scanner.listening import Silent

NAMES = ("anchor", "b", "c")
ELSEWHERE = LeaseOwner("another-host", 4242, 99)


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Models of one shape and different weights."""
    home = tmp_path_factory.mktemp("several")
    return {name: save_tiny_model(home / name, seed=9 + i) for i, name in enumerate(NAMES)}


class Registered(dict[str, RegisteredModel]):
    """The models, each registered when a test first names it."""

    def __init__(self, settings: Settings, folders: dict[str, Path]) -> None:
        super().__init__()
        self._settings, self._folders = settings, folders

    def folder_of(self, name: str) -> Path:
        """Where its files come from."""
        return self._folders[name]

    def bring(self, name: str) -> None:
        """Register it, if no test has named it yet."""
        _ = self[name]

    def __missing__(self, name: str) -> RegisteredModel:
        self[name] = modelstore.add(self._settings, name, f"folder:{self._folders[name]}")
        return self[name]


@pytest.fixture
def registered(settings: Settings, folders: dict[str, Path]) -> Registered:
    return Registered(settings, folders)


@pytest.fixture(autouse=True)
def uncalibrated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calibrating takes longer than all else here, and these tests look at no number."""
    monkeypatch.setattr(Calibrations, "prepare", lambda *_: None)


@pytest.fixture
def size(bench: Bench, registered: Registered) -> int:
    """What a loaded one of them takes."""
    with working(bench) as worker:
        held = worker.placing.hold(registered["b"].name, Silent()).memory_bytes
        worker.placing.drop(registered["b"].revision)
    return held


@contextmanager
def working(bench: Bench, **changes: object) -> Iterator[Bench]:
    """The same bench with other settings."""
    settings = msgspec.structs.replace(bench.settings, **changes)
    other = Bench(settings, bench.sessions, bench.redis, bench.tiny)
    with other.outbox, other.keeper:
        yield other


@pytest.fixture
def two_places(bench: Bench, registered: Registered) -> Iterator[Bench]:
    """A worker with room for two of the models, one of them pinned, that keeps none for long."""
    registered.bring("anchor")
    size = residences.estimate(registered["b"].n_parameters, 0, "float32").memory_bytes
    with working(
        bench,
        memory_bytes=int(2.5 * size / 0.8),
        pinned_models="anchor",
        model_residence_seconds=0.0,
    ) as worker:
        worker.placing.begin()
        yield worker


def ask(worker: Bench, model: RegisteredModel, *, n_tokens: int = 6) -> Job:
    """A scan of a model that the bench does not know by name."""
    return worker.submit(
        ActivationScan(prompt="anything", model=model.name),
        n_tokens=n_tokens,
        model=model.name,
        revision=model.revision,
        queue=keys.scan_queue(model.revision),
        scan_key=None,
    )


def serve(worker: Bench, *asked: Job) -> list[JobState]:
    """What a worker's loop does: tickets of its own queue, and of the models that it holds."""
    attempts = worker.attempts()
    for _ in range(20):
        attempts.take(worker.placing.queue)
        for queue in sorted(worker.residency.queues()):
            attempts.take(queue)
        if all(worker.now(job).state is not JobState.QUEUED for job in asked):
            break
    return [worker.now(job).state for job in asked]


def names(worker: Bench) -> set[str]:
    return {model.name for model in worker.residency.held()}


def test_a_scan_brings_its_model(two_places: Bench, registered: Registered) -> None:
    assert names(two_places) == {"anchor"}
    job = ask(two_places, registered["b"])
    assert serve(two_places, job) == [JobState.SUCCEEDED]
    assert names(two_places) == {"anchor", "b"}
    assert f"open {job.queue}" in two_places.intake.said


def test_models_take_turns_in_the_room_beside_a_pinned_one(
    two_places: Bench, registered: Registered
) -> None:
    for name in ("b", "c", "b"):
        assert serve(two_places, ask(two_places, registered[name])) == [JobState.SUCCEEDED]
        # Served long ago, as far as demand goes: otherwise who was served last would stay.
        two_places.sessions.write(a_while_ago)
        assert names(two_places) == {"anchor", name}
    queue = keys.scan_queue(registered["c"].revision)
    assert [said for said in two_places.intake.said if queue in said] == [
        f"open {queue}",
        f"close {queue}",
    ]
    held = two_places.sessions.read(residences.holders, registered["c"].revision)
    assert held == []


def a_while_ago(session: object) -> None:
    session.execute(update(JOBS).values(created_at=epoch() - 1e6))  # type: ignore[attr-defined]  # a Session


def test_what_was_measured_is_remembered(two_places: Bench, registered: Registered) -> None:
    serve(two_places, ask(two_places, registered["b"]))
    cost = two_places.sessions.read(residences.costs, "float32")[registered["b"].revision]
    (held,) = [model for model in two_places.residency.held() if model.name == "b"]
    assert cost == (held.memory_bytes, held.load_seconds)
    assert (held.pinned, held.has_served) == (False, True)
    assert held.held_seconds is not None


def test_a_pinned_model_and_one_that_has_just_come_stay(
    bench: Bench, registered: Registered
) -> None:
    registered.bring("anchor")
    size = residences.estimate(registered["b"].n_parameters, 0, "float32").memory_bytes
    with working(
        bench,
        memory_bytes=int(2.5 * size / 0.8),
        pinned_models="anchor",
        model_residence_seconds=60.0,
    ) as worker:
        worker.placing.begin()
        assert serve(worker, ask(worker, registered["b"])) == [JobState.SUCCEEDED]
        jobs_of_c = [ask(worker, registered["c"], n_tokens=n) for n in range(2, 12)]
        assert set(serve(worker, *jobs_of_c)) == {JobState.QUEUED}
        assert names(worker) == {"anchor", "b"}


def test_without_loading_on_demand_only_what_is_wanted_is_loaded(
    bench: Bench, registered: Registered
) -> None:
    with working(bench, load_on_demand=False) as worker:
        unwanted, _ = ask(worker, registered["c"]), registered["b"]
        worker.sessions.write(models.set_wanted, "b", True)
        wanted = ask(worker, registered["b"])
        assert serve(worker, wanted, unwanted) == [JobState.SUCCEEDED, JobState.QUEUED]


def test_a_request_by_name_makes_room_at_once(bench: Bench, registered: Registered) -> None:
    size = residences.estimate(registered["b"].n_parameters, 0, "float32").memory_bytes
    with working(bench, memory_bytes=int(1.5 * size / 0.8)) as worker:
        assert serve(worker, ask(worker, registered["b"])) == [JobState.SUCCEEDED]
        load = worker.order(JobKind.LOAD)
        worker.attempts().take(keys.CONTROL_QUEUE)
        assert worker.now(load).state is JobState.SUCCEEDED
        assert names(worker) == {"tiny"}
        assert worker.intake.said[-2:] == [
            f"close {keys.scan_queue(registered['b'].revision)}",
            f"open {worker.queue}",
        ]


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


def kind_of_end(worker: Bench, job: Job) -> str:
    """The last word of the type of what a job's requester was told."""
    problem = worker.now(job).problem
    assert problem is not None
    return str(problem["type"]).rpartition(":")[2]


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


def aged(worker: Bench, seconds: float) -> None:
    """Every job was sent so long ago."""
    with worker.sessions.writing() as session:
        session.execute(update(JOBS).values(created_at=epoch() - seconds))


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


def short_of_memory(monkeypatch: pytest.MonkeyPatch, times: int) -> None:
    """So many loads run out of memory."""
    load, refusals = loading.load, iter([MemoryError()] * times)

    def cramped(*args: object) -> object:
        for refusal in refusals:
            raise refusal
        return load(*args)  # type: ignore[arg-type]  # passed on as they came

    monkeypatch.setattr(loading, "load", cramped)


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


def other_worker(
    redis: SyncRedis,
    model: RegisteredModel | None = None,
    *,
    free_bytes: int = 10**12,
    resting: bool = False,
) -> None:
    held: tuple[HeldModel, ...] = ()
    if model is not None:
        held = (
            HeldModel(
                name=model.name,
                revision=model.revision,
                state=ModelState.RESIDENT,
                memory_bytes=10**5,
                load_seconds=0.1,
                held_seconds=100.0,
                has_served=True,
            ),
        )
    events.beat(
        redis,
        WorkerBeat(
            worker="worker-2@there",
            device="cpu",
            models=held,
            budget_bytes=10**12,
            free_bytes=free_bytes,
            resting=resting,
            at=time.time(),
        ),
    )


def test_the_worker_with_more_room_is_given_a_moment(bench: Bench, registered: Registered) -> None:
    other_worker(bench.redis, free_bytes=10**15)
    job = ask(bench, registered["b"])
    attempts = bench.attempts()
    attempts.take(bench.placing.queue)
    assert names(bench) == set()
    with bench.sessions.writing() as session:
        session.execute(update(JOBS).values(created_at=epoch() - 1.5))
    assert serve(bench, job) == [JobState.SUCCEEDED]


def test_what_another_worker_holds_is_loaded_here_only_when_its_jobs_wait(
    bench: Bench, registered: Registered
) -> None:
    other_worker(bench.redis, registered["b"])
    bench.sessions.write(residences.claim, registered["b"].revision, ELSEWHERE, copies=1)
    job = ask(bench, registered["b"])
    attempts = bench.attempts()
    attempts.take(bench.placing.queue)
    assert names(bench) == set()
    with bench.sessions.writing() as session:
        session.execute(update(JOBS).values(created_at=epoch() - 20.0))
    assert serve(bench, job) == [JobState.SUCCEEDED]
    owners = bench.sessions.read(residences.holders, registered["b"].revision)
    assert set(owners) == {ELSEWHERE, LeaseOwner.here()}


def test_a_claim_decides_where_heartbeats_are_late(bench: Bench, registered: Registered) -> None:
    bench.sessions.write(residences.claim, registered["b"].revision, ELSEWHERE, copies=1)
    job = ask(bench, registered["b"])
    assert serve(bench, job) == [JobState.QUEUED]
    assert names(bench) == set()


def test_a_request_by_name_is_left_to_the_worker_that_holds_the_model(bench: Bench) -> None:
    other_worker(bench.redis, bench.tiny)
    load = bench.order(JobKind.LOAD)
    assert bench.attempts().take(keys.CONTROL_QUEUE) == 0
    assert bench.now(load).state is JobState.QUEUED
    with bench.sessions.writing() as session:
        session.execute(update(JOBS).values(created_at=epoch() - 1.5))
    assert bench.attempts().take(keys.CONTROL_QUEUE) == 1


def test_unloading_is_heard_by_every_worker_that_holds_a_copy(
    bench: Bench, registered: Registered
) -> None:
    """The other worker's claim is gone: it notices when it renews, and lets its copy go."""
    serve(bench, ask(bench, registered["b"]))
    with bench.placing:
        bench.sessions.write(residences.ask_to_let_go, registered["b"].revision)
        assert awaited(lambda: bench.redis.llen(bench.placing.queue) == 1)
        bench.attempts().take(bench.placing.queue)
    assert names(bench) == set()


def awaited(happened: object, seconds: float = 10.0) -> bool:
    deadline = time.monotonic() + seconds
    while not happened():  # type: ignore[operator]  # a predicate
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def test_a_worker_wakes_itself_when_something_waits_for_a_model(
    bench: Bench, registered: Registered
) -> None:
    with bench.placing:
        assert not awaited(lambda: bench.redis.llen(bench.placing.queue) > 0, 1.5)
        ask(bench, registered["b"])
        assert awaited(lambda: bench.redis.llen(bench.placing.queue) == 1)
        assert awaited(lambda: bench.redis.ttl(bench.placing.queue) > 0), (
            "the queue of one that dies goes"
        )
        time.sleep(1.5)
        assert bench.redis.llen(bench.placing.queue) == 1, "one ticket is enough"


def test_who_leaves_gives_its_claims_back(bench: Bench, registered: Registered) -> None:
    with bench.placing:
        bench.attempts()
        serve(bench, ask(bench, registered["b"]))
        assert bench.sessions.read(residences.holders, registered["b"].revision)
    assert bench.sessions.read(residences.holders, registered["b"].revision) == []


def needed(model: RegisteredModel, n_tokens: int) -> int:
    """What a scan of so many tokens is taken to need."""
    scan = ActivationScan(prompt="anything")
    return estimate(scan, model.architecture, n_tokens=n_tokens, itemsize=4)


def test_a_scan_that_could_never_fit_is_refused_with_both_numbers(
    bench: Bench, registered: Registered, size: int
) -> None:
    between = (needed(registered["b"], 30) + needed(registered["b"], 50)) // 2
    with working(bench, memory_bytes=max(size + between, int(size * 1.4))) as worker:
        small, large = (ask(worker, registered["b"], n_tokens=n) for n in (2, 50))
        assert serve(worker, small, large) == [JobState.SUCCEEDED, JobState.FAILED]
        problem = worker.now(large).problem
        assert problem is not None
        assert problem["type"] == "urn:neural-mri:problem:out-of-memory"
        assert problem["estimated_bytes"] == needed(registered["b"], 50)
        assert problem["estimated_bytes"] > problem["budget_bytes"] > 0
        assert "shorter prompt" in problem["detail"]


def test_another_model_goes_where_a_scan_needs_its_memory(
    bench: Bench, registered: Registered, size: int
) -> None:
    short, long = (needed(registered["c"], n) for n in (2, 50))
    with working(bench, memory_bytes=2 * size + (short + long) // 2) as worker:
        for name in ("b", "c"):
            assert worker.placing.hold(name, Silent())
        assert serve(worker, ask(worker, registered["c"], n_tokens=2)) == [JobState.SUCCEEDED]
        assert names(worker) == {"b", "c"}
        before = metrics.EVICTED.labels("b")._value.get()
        assert serve(worker, ask(worker, registered["c"], n_tokens=50)) == [JobState.SUCCEEDED]
        assert names(worker) == {"c"}
        assert metrics.EVICTED.labels("b")._value.get() == before + 1


def test_what_another_gpu_has_is_no_room_for_a_scan(
    bench: Bench, registered: Registered, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its tensors stand on the first, and so does what of a spread model is in their way."""
    model = registered["b"]
    held = bench.placing.hold("b", Silent())
    on_first, n_bytes = held.memory_bytes // 2, needed(model, 50)
    bench.residency._residents[model.revision] = held._replace(main_bytes=on_first)
    free = [0, 10**12]
    gpus = SimpleNamespace(
        device_count=lambda: 2,
        is_available=lambda: False,
        mem_get_info=lambda index: (free[index], free[index] + on_first),
        memory_reserved=lambda _: 0,
        memory_allocated=lambda _: 0,
    )
    monkeypatch.setattr(torch, "cuda", gpus)
    monkeypatch.setattr(bench.placing, "_memory", Memory(Settings(), "cuda"))
    for free[0], fits in ((2 * n_bytes, True), (n_bytes // 2, False)):
        assert bench.placing.left() == free[0]
        refused = nullcontext() if fits else pytest.raises(OutOfMemory)
        with refused, bench.placing.admitted(model.revision, n_bytes):
            pass


def test_as_many_rows_share_a_pass_as_fit(bench: Bench, registered: Registered, size: int) -> None:
    room = int(3.5 * needed(registered["b"], 40))
    with working(bench, memory_bytes=size + room) as worker:
        worker.placing.hold("b", Silent())
        asked = [ask(worker, registered["b"], n_tokens=40) for _ in range(8)]
        count, rows = passes()
        assert set(serve(worker, *asked)) == {JobState.SUCCEEDED}
        assert (passes()[0] - count, passes()[1] - rows) == (3, 8)


def passes() -> tuple[float, float]:
    """Passes so far, and jobs that shared them."""
    (family,) = metrics.PASS_JOBS.collect()
    found = {sample.name.rpartition("_")[2]: sample.value for sample in family.samples}
    return found["count"], found["sum"]


def test_without_a_database_nothing_is_placed(
    bench: Bench, registered: Registered, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(*_: object, **__: object) -> None:
        raise Unavailable("away")

    ask(bench, registered["b"])
    with monkeypatch.context() as patched:
        patched.setattr(Sessions, "read", away)
        assert bench.attempts().take(bench.placing.queue) == 0
    assert names(bench) == set()
