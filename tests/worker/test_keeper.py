import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from neural_mri.backing import events, jobs
from neural_mri.backing.broker import SyncRedis
from neural_mri.backing.database import Sessions
from neural_mri.backing.events import Publisher, WorkerBeat
from neural_mri.backing.jobs import Job, LeaseOwner, Submission
from neural_mri.backing.settings import Settings
from neural_mri.contract.jobs import JobKind, JobState
from worker import keeper as module
from worker.keeper import Keeper, LeaseLost
from worker.scanner.listening import Cancelled

LEASE_SECONDS = 0.9
QUEUE = "scan.somewhere"


def claimed(sessions: Sessions) -> Job:
    sessions.write(
        jobs.submit,
        Submission(
            owner="ada",
            kind=JobKind.SCAN,
            model="tiny",
            revision="0" * 64,
            queue=QUEUE,
            request=b"{}",
        ),
    )
    (job,) = sessions.write(
        jobs.claim, queue=QUEUE, owner=LeaseOwner.here(), limit=1, lease_seconds=LEASE_SECONDS
    )
    return job


@contextmanager
def running_keeper(
    sessions: Sessions, redis: SyncRedis, give_up: Callable[[], None] = lambda: None
) -> Iterator[Keeper]:
    with Keeper(
        sessions=sessions,
        redis=redis,
        owner=LeaseOwner.here(),
        lease_seconds=LEASE_SECONDS,
        describe=lambda: WorkerBeat(worker="worker-1@here", device="cpu", at=time.time()),
        give_up=give_up,
    ) as keeper:
        yield keeper


def nobody_is_dead(_owner: LeaseOwner) -> bool:
    return False


def raises_within(seconds: float, check: Callable[[], None]) -> type[BaseException] | None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            check()
        except Cancelled as reason:
            return type(reason)
        time.sleep(0.01)
    return None


def test_a_lease_holds_for_as_long_as_the_work_takes(sessions: Sessions, redis: SyncRedis) -> None:
    job = claimed(sessions)
    with running_keeper(sessions, redis) as keeper, keeper.holding(job) as holding:
        deadline = time.monotonic() + 2.5 * LEASE_SECONDS
        while time.monotonic() < deadline:
            reaped = sessions.write(jobs.reap, max_attempts=3, dead_owners=nobody_is_dead)
            assert reaped == []
            holding.check()
            time.sleep(0.05)


def test_a_lease_ends_when_the_work_is_left(sessions: Sessions, redis: SyncRedis) -> None:
    job = claimed(sessions)
    with running_keeper(sessions, redis) as keeper:
        with keeper.holding(job):
            pass
        time.sleep(1.5 * LEASE_SECONDS)
        (reaped,) = sessions.write(jobs.reap, max_attempts=3, dead_owners=nobody_is_dead)
    assert reaped.state is JobState.QUEUED


def test_a_flag_stops_the_work_sooner_than_a_renewal_would(
    sessions: Sessions, redis: SyncRedis, settings: Settings
) -> None:
    job = claimed(sessions)
    with running_keeper(sessions, redis) as keeper, keeper.holding(job) as holding:
        time.sleep(3 * module.TICK_SECONDS)  # past the first renewal
        Publisher(redis, settings).flag_cancel(job.id)
        assert raises_within(2.5 * module.TICK_SECONDS, holding.check) is Cancelled


def test_without_redis_a_renewal_brings_the_cancel(sessions: Sessions, redis: SyncRedis) -> None:
    job = claimed(sessions)
    with running_keeper(sessions, redis) as keeper, keeper.holding(job) as holding:
        sessions.write(jobs.request_cancel, job.id)
        assert raises_within(LEASE_SECONDS, holding.check) is Cancelled


def test_who_lost_the_lease_is_told(sessions: Sessions, redis: SyncRedis) -> None:
    job = claimed(sessions)
    with running_keeper(sessions, redis) as keeper, keeper.holding(job) as holding:
        sessions.write(jobs.reap, max_attempts=3, dead_owners=lambda _owner: True)
        assert raises_within(LEASE_SECONDS, holding.check) is LeaseLost


def test_of_a_job_that_has_ended_nobody_is_told_to_stop(
    sessions: Sessions, redis: SyncRedis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "STOP_SECONDS", 0.2)
    gave_up: list[bool] = []
    job = claimed(sessions)
    with (
        running_keeper(sessions, redis, lambda: gave_up.append(True)) as keeper,
        keeper.holding(job) as holding,
    ):
        assert sessions.write(jobs.advance, job.id, JobState.RUNNING, attempt=job.attempt)
        assert sessions.write(jobs.advance, job.id, JobState.FAILED, attempt=job.attempt)
        keeper.let_go(holding)
        # Its mates go on for longer than a renewal and the patience after it.
        assert raises_within(LEASE_SECONDS / 3 + 0.6, holding.check) is None
    assert gave_up == []


def test_who_does_not_stop_when_told_is_stopped(
    sessions: Sessions, redis: SyncRedis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "STOP_SECONDS", 0.3)
    given_up: list[float] = []
    job = claimed(sessions)
    with (
        running_keeper(sessions, redis, lambda: given_up.append(time.monotonic())) as keeper,
        keeper.holding(job) as holding,
    ):
        holding.stop(Cancelled)
        told_at = time.monotonic()
        time.sleep(0.8)
    assert 0.3 <= given_up[0] - told_at < 0.7


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_worker_that_cannot_keep_its_leases_gives_up(
    sessions: Sessions, redis: SyncRedis, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("a bug")

    given_up: list[bool] = []
    monkeypatch.setattr(jobs, "renew", broken)
    job = claimed(sessions)
    with (
        running_keeper(sessions, redis, lambda: given_up.append(True)) as keeper,
        keeper.holding(job),
    ):
        time.sleep(0.5)
    assert given_up == [True]


def test_a_worker_is_heard_while_it_lives(sessions: Sessions, redis: SyncRedis) -> None:
    with running_keeper(sessions, redis):
        time.sleep(3 * module.TICK_SECONDS)
        assert [beat.worker for beat in events.heartbeats(redis)] == ["worker-1@here"]


def test_who_goes_on_for_its_mates_and_asks_has_heard_that_it_should_stop(
    sessions: Sessions, redis: SyncRedis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "STOP_SECONDS", 1.5)
    ended: list[str] = []
    with (
        running_keeper(sessions, redis, lambda: ended.append("the worker")) as keeper,
        keeper.holding(claimed(sessions)) as holding,
        keeper.holding(claimed(sessions)) as mate,
    ):
        holding.stop(Cancelled)
        deadline = time.monotonic() + 2.5
        while time.monotonic() < deadline:
            with pytest.raises(Cancelled):
                holding.check()
            time.sleep(0.02)
        assert not ended
        deadline = time.monotonic() + 2.5
        while time.monotonic() < deadline:
            mate.check()  # its turn comes first
            time.sleep(0.02)
        assert not ended
        deadline = time.monotonic() + 20.0
        while not ended and time.monotonic() < deadline:
            time.sleep(0.02)
    assert ended, "it asks no more"
