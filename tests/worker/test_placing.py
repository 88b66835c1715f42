"""One worker's part in placing models: real tiny models, a real database and Valkey, a memory budget."""

import time
from collections.abc import Iterator
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from sqlalchemy import update

from neural_mri.backing import keys, models, residences
from neural_mri.backing.database import Sessions, epoch
from neural_mri.backing.jobs import LeaseOwner
from neural_mri.backing.models import RegisteredModel
from neural_mri.backing.rows import JOBS
from neural_mri.backing.settings import Settings
from neural_mri.contract.jobs import JobKind, JobState
from neural_mri.contract.problems import Unavailable
from neural_mri.contract.scans import ActivationScan
from tests.worker.bench import Bench
from tests.worker.several import (
    ELSEWHERE,
    Registered,
    ask,
    kind_of_end,
    names,
    other_worker,
    serve,
    short_of_memory,
    working,
)
from worker import metrics, residency
from worker.admission import OutOfMemory, estimate
from worker.calibrations import Calibrations
from worker.memory import Memory, Reading
from worker.scanner.listening import Silent


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


class TwoGpus:
    """A worker, and what it is told of its GPUs."""

    def __init__(self, worker: Bench, total_bytes: int) -> None:
        self.worker = worker
        self.total_bytes = total_bytes

    def rooms(self, *_: object) -> tuple[Reading, ...]:
        is_empty = len(names(self.worker)) == 1  # the one that is coming
        return (Reading(self.total_bytes, self.total_bytes if is_empty else 0),) * 2


@pytest.fixture
def on_two_gpus(bench: Bench, registered: Registered, size: int) -> Iterator[TwoGpus]:
    """A worker that holds `b`, which is small, and has room for another, and not on any GPU beside it.

    One that took half as much again would be too large for it.
    """
    memory_bytes = int(1.4 * size / 0.8)
    with working(bench, memory_bytes=memory_bytes, model_residence_seconds=0.0) as worker:
        assert serve(worker, ask(worker, registered["b"])) == [JobState.SUCCEEDED]
        worker.sessions.write(a_while_ago)
        revision = registered["b"].revision
        held = worker.residency._residents[revision]
        worker.residency._residents[revision] = held._replace(memory_bytes=size // 4)
        yield TwoGpus(worker, size)


@pytest.mark.parametrize("by_name", [False, True])
def test_a_model_that_fits_on_gpus_only_without_others_has_them_go(
    on_two_gpus: TwoGpus, registered: Registered, monkeypatch: pytest.MonkeyPatch, *, by_name: bool
) -> None:
    worker = on_two_gpus.worker
    monkeypatch.setattr(residency, "room_of_each", on_two_gpus.rooms)
    if by_name:
        load = worker.order(JobKind.LOAD)
        worker.attempts().take(keys.CONTROL_QUEUE)
        assert worker.now(load).state is JobState.SUCCEEDED
    else:
        assert serve(worker, ask(worker, registered["c"])) == [JobState.SUCCEEDED]
    assert names(worker) == {"tiny" if by_name else "c"}


@pytest.mark.parametrize("by_name", [False, True])
def test_nothing_goes_for_a_model_that_fits_on_gpus_in_no_way(
    on_two_gpus: TwoGpus, registered: Registered, monkeypatch: pytest.MonkeyPatch, *, by_name: bool
) -> None:
    worker = on_two_gpus.worker
    on_two_gpus.total_bytes //= 8
    monkeypatch.setattr(residency, "room_of_each", on_two_gpus.rooms)
    if by_name:
        job = worker.order(JobKind.LOAD)
        worker.attempts().take(keys.CONTROL_QUEUE)
    else:
        job = ask(worker, registered["c"])
        serve(worker, job)
    assert kind_of_end(worker, job) == "unsupported-model"
    assert names(worker) == {"b"}


def test_pinned_models_that_are_too_large_together_are_said_to_be_so_at_the_start(
    bench: Bench, registered: Registered, monkeypatch: pytest.MonkeyPatch
) -> None:
    registered.bring("anchor")
    registered.bring("b")
    short_of_memory(monkeypatch, 1)
    with (
        working(bench, pinned_models="anchor,b") as worker,
        pytest.raises(OutOfMemory, match="while anchor was loaded"),
    ):
        worker.placing.begin()


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


def test_to_unload_a_model_is_left_to_the_worker_that_holds_it_for_a_moment(bench: Bench) -> None:
    other_worker(bench.redis, bench.tiny)
    bench.order(JobKind.UNLOAD)
    assert bench.attempts().take(keys.CONTROL_QUEUE) == 0
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
