"""What the reaper puts right: jobs of the dead, missing tickets, what waited too long, batches."""

import time
from contextlib import closing
from itertools import pairwise
from pathlib import Path
from uuid import UUID

import msgspec
import pytest
import structlog
from sqlalchemy import update

from neural_mri.backing import (
    batches,
    broker,
    database,
    deletion,
    feeding,
    jobs,
    keys,
    queue,
    storage,
)
from neural_mri.backing.batches import Line, NewBatch
from neural_mri.backing.broker import SyncRedis
from neural_mri.backing.database import Sessions
from neural_mri.backing.events import parse_entries
from neural_mri.backing.jobs import LeaseOwner, Submission
from neural_mri.backing.rows import BATCHES, JOBS
from neural_mri.backing.settings import Settings
from neural_mri.contract.events import Ended, Event, StateChanged, decode_event
from neural_mri.contract.jobs import JobKind, JobState, Lane
from neural_mri.contract.problems import Unavailable
from tests.servers import sqlite_only
from tests.worker.reaping import QUEUE, claim, eventually, state, submit
from worker.reaper import MOST_TICKETS, Reaper


def told(redis: SyncRedis, job_id: UUID) -> list[Event]:
    rows = redis.xrange(keys.event_stream(job_id))
    return [decode_event(entry.data) for entry in parse_entries(rows)]


def test_what_a_dead_worker_held_is_queued_again_and_said(
    sessions: Sessions, redis: SyncRedis, reaper: Reaper
) -> None:
    [job] = submit(sessions)
    claim(sessions)
    reaper.round()
    assert state(sessions, job.id) is JobState.QUEUED
    assert told(redis, job.id) == [StateChanged(state=JobState.QUEUED, attempt=1)]


def test_what_a_dead_worker_held_can_be_taken_at_once_and_is_offered_no_more_than_once(
    sessions: Sessions, redis: SyncRedis, reaper: Reaper
) -> None:
    submit(sessions, 2)
    queue.send_tickets(redis, QUEUE, 1)
    claim(sessions)
    reaper.round()
    assert queue.waiting_tickets(redis, QUEUE) == 2
    for _ in range(3):
        reaper.round()
    assert queue.waiting_tickets(redis, QUEUE) == 2


def test_what_a_living_worker_holds_is_left_alone(
    sessions: Sessions, redis: SyncRedis, reaper: Reaper
) -> None:
    [job] = submit(sessions)
    claim(sessions, owner=LeaseOwner.here())
    reaper.round()
    assert state(sessions, job.id) is JobState.CLAIMED
    assert told(redis, job.id) == []


def test_the_last_lost_attempt_ends_the_stream_with_the_reason(
    sessions: Sessions, redis: SyncRedis, reaper: Reaper
) -> None:
    [job] = submit(sessions)
    for _ in range(3):
        claim(sessions)
        reaper.round()
    *_, end = told(redis, job.id)
    assert isinstance(end, Ended)
    assert end.state is JobState.QUARANTINED
    assert end.problem is not None
    assert "3 workers were lost" in end.problem["detail"]


def test_tickets_missing_for_two_rounds_are_sent(
    sessions: Sessions, redis: SyncRedis, reaper: Reaper
) -> None:
    submit(sessions, 3)
    queue.send_tickets(redis, QUEUE, 1)
    reaper.round()
    assert queue.waiting_tickets(redis, QUEUE) == 1, "once is no proof"
    reaper.round()
    assert queue.waiting_tickets(redis, QUEUE) == 3
    for _ in range(3):
        reaper.round()
    assert queue.waiting_tickets(redis, QUEUE) == 3


def test_a_ticket_on_its_way_to_a_claim_is_not_sent_again(
    sessions: Sessions, redis: SyncRedis, reaper: Reaper
) -> None:
    submit(sessions, 2)
    reaper.round()
    reaper.round()
    redis.rpop(QUEUE)
    reaper.round()
    claim(sessions, owner=LeaseOwner.here())
    reaper.round()
    assert queue.waiting_tickets(redis, QUEUE) == 1


def test_an_emptied_broker_gets_its_tickets_back_a_few_at_a_time(
    sessions: Sessions, redis: SyncRedis, reaper: Reaper
) -> None:
    waiting = MOST_TICKETS + 10
    submit(sessions, waiting)
    for _ in range(2):
        redis.flushall()
        counts = []
        for _ in range(5):
            reaper.round()
            counts.append(queue.waiting_tickets(redis, QUEUE))
        assert counts == sorted(counts)
        assert counts[-1] == waiting
        assert max(b - a for a, b in pairwise(counts)) <= MOST_TICKETS


def test_a_job_that_waited_too_long_is_given_up(
    settings: Settings, sessions: Sessions, redis: SyncRedis
) -> None:
    [job] = submit(sessions)
    time.sleep(0.02)
    impatient = msgspec.structs.replace(settings, queued_seconds=0.01)
    Reaper(impatient, sessions, redis, storage.open_store(settings)).round()
    assert state(sessions, job.id) is JobState.EXPIRED
    [end] = told(redis, job.id)
    assert isinstance(end, Ended)


def test_a_clock_that_is_put_forward_makes_no_attempt_late_and_one_that_is_late_ends(
    sessions: Sessions, reaper: Reaper
) -> None:
    [job] = submit(sessions)
    claim(sessions, LeaseOwner.here())
    reaper.round()
    with sessions.writing() as session:
        session.execute(update(JOBS).values(started_at=JOBS.c.started_at - 6000.0))
    reaper.round()
    assert state(sessions, job.id) is JobState.CLAIMED
    with sessions.writing() as session:
        session.execute(update(JOBS).values(deadline_seconds=0.01))

    def is_expired() -> bool:
        reaper.round()
        return state(sessions, job.id) is JobState.EXPIRED

    assert eventually(is_expired)


def test_a_clock_that_is_put_forward_makes_nobody_wait_too_long_and_half_no_batch(
    settings: Settings, sessions: Sessions, redis: SyncRedis
) -> None:
    waits, fills = settings.queued_seconds, batches.LONGEST_FILLING.total_seconds()
    reaper = Reaper(settings, sessions, redis, storage.open_store(settings))

    def round_anew() -> None:
        reaper._expire_at = 0.0
        reaper.round()

    [job] = submit(sessions)
    half = sessions.write(batches.begin, NewBatch("ada", "", Lane.BATCH, 2, "0" * 64))
    forward = waits + 60.0
    for clock in (reaper._waits, reaper._fillings):
        assert clock.goes_on(sessions.read(deletion.clock) - forward)
    with sessions.writing() as session:
        for table in (JOBS, BATCHES):
            session.execute(update(table).values(created_at=table.c.created_at - forward))
    round_anew()
    assert state(sessions, job.id) is JobState.QUEUED
    assert sessions.read(batches.find, half.id) is not None
    assert reaper._fillings._set_at is not None
    reaper._fillings._set_at -= fills
    round_anew()
    assert state(sessions, job.id) is JobState.QUEUED
    assert sessions.read(batches.find, half.id) is None, "it has waited by every clock"
    assert reaper._waits._set_at is not None
    reaper._waits._set_at -= waits
    round_anew()
    assert state(sessions, job.id) is JobState.EXPIRED


def test_however_many_waited_too_long_a_transaction_ends_some_of_them(
    settings: Settings, sessions: Sessions, redis: SyncRedis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "MOST_EXPIRED", 2)
    made = submit(sessions, 5)
    time.sleep(0.02)
    impatient = msgspec.structs.replace(settings, queued_seconds=0.01)
    reaper = Reaper(impatient, sessions, redis, storage.open_store(settings))
    ended = []
    for _ in range(3):
        reaper.round()
        ended.append(sum(state(sessions, job.id) is JobState.EXPIRED for job in made))
    assert ended == [2, 4, 5]


def test_without_redis_jobs_are_still_taken_back_and_the_outage_said_once(
    settings: Settings, sessions: Sessions, tmp_path: Path
) -> None:
    away = msgspec.structs.replace(settings, redis_url=f"unix://{tmp_path}/nobody.sock")
    reaper = Reaper(away, sessions, broker.connect(away), storage.open_store(settings))
    [job] = submit(sessions)
    claim(sessions)
    with structlog.testing.capture_logs() as logged:
        for _ in range(3):
            reaper.round()
    assert state(sessions, job.id) is JobState.QUEUED
    assert [line["event"] for line in logged].count("round_failed") == 1


def scan_of(owner: str, number: int) -> Submission:
    return Submission(
        owner=owner,
        kind=JobKind.SCAN,
        model="tiny",
        revision="0123456789abcdef" * 4,
        queue=QUEUE,
        request=b"{}",
        scan_key=f"{number:064x}",
    )


def test_a_batch_of_which_too_many_scans_fail_is_stopped_with_nobody_watching(
    sessions: Sessions, redis: SyncRedis, reaper: Reaper
) -> None:
    keyed = [scan_of("ada", number) for number in range(4)]
    wanted = NewBatch("ada", "", Lane.BATCH, 4, "0" * 64, max_failures=1)
    batch = sessions.write(batches.begin, wanted)
    lines = [Line(number, scan) for number, scan in enumerate(keyed, 1)]
    sessions.write(batches.fill, batch.id, lines)
    sessions.write(feeding.feed, "ada", max_queued=9)
    made = {row.line: row.job for row in sessions.read(batches.lines, batch.id, after=0, limit=9)}
    failing, held = (claim(sessions, LeaseOwner.here()) for _ in range(2))
    sessions.write(jobs.advance, failing.id, JobState.FAILED, attempt=1, problem={"detail": "no"})
    reaper.round()
    states = [state(sessions, job).value for job in made.values() if job is not None]
    assert states == ["failed", "claimed", "cancelled", "cancelled"]
    assert redis.exists(keys.cancel_flag(held.id)), "what runs is asked to stop"


@sqlite_only
def test_nobody_waits_for_the_reaper_to_look_at_batches_that_go_on(
    settings: Settings, redis: SyncRedis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database, "BUSY_TIMEOUT_SECONDS", 0.01)
    with (
        closing(database.sessions(settings)) as sessions,
        closing(database.sessions(settings)) as w,
    ):
        wanted = NewBatch("ada", "", Lane.BATCH, 2, "0" * 64, max_failures=1)
        batch = sessions.write(batches.begin, wanted)
        lines = [Line(number, scan_of("ada", number)) for number in (1, 2)]
        sessions.write(batches.fill, batch.id, lines)
        sessions.write(feeding.feed, "ada", max_queued=9)
        reaper = Reaper(settings, sessions, redis, storage.open_store(settings))
        with w.writing():
            reaper._settle_batches()
        failing = claim(sessions, LeaseOwner.here())
        sessions.write(jobs.advance, failing.id, JobState.FAILED, attempt=1, problem={"detail": ""})
        with w.writing(), pytest.raises(Unavailable):
            reaper._settle_batches()
        reaper._settle_batches()
        found = sessions.read(batches.find, batch.id)
        assert found is not None
        assert found.stopped_by == batches.FAILED


def test_half_a_batch_is_forgotten_in_the_end(sessions: Sessions, reaper: Reaper) -> None:
    half = sessions.write(batches.begin, NewBatch("ada", "", Lane.BATCH, 2, "0" * 64))
    sessions.write(batches.fill, half.id, [Line(1, scan_of("ada", 1))])
    with sessions.writing() as session:
        late = BATCHES.c.created_at - batches.LONGEST_FILLING.total_seconds()
        session.execute(update(BATCHES).values(created_at=late))
    reaper.round()
    assert sessions.read(batches.find, half.id) is None


def test_lines_of_a_batch_become_jobs_and_tickets_as_others_end(
    settings: Settings, sessions: Sessions, redis: SyncRedis
) -> None:
    keyed = msgspec.structs.replace(settings, auth="keys", user_max_jobs=4)
    reaper = Reaper(keyed, sessions, redis, storage.open_store(keyed))
    lines = [Line(number, scan_of("ada", number)) for number in range(1, 6)]
    batch = sessions.write(batches.begin, NewBatch("ada", "", Lane.BATCH, 5, "0" * 64))
    sessions.write(batches.fill, batch.id, lines)
    reaper.round()
    assert redis.llen(QUEUE) == 3
    assert len(sessions.read(jobs.recent, "ada")) == 3
    done = claim(sessions, LeaseOwner.here())
    sessions.write(jobs.advance, done.id, JobState.FAILED, attempt=1, problem={"detail": "no"})
    until = time.monotonic() + 10
    while len(sessions.read(jobs.recent, "ada")) < 4 and time.monotonic() < until:
        reaper.round()
        time.sleep(0.05)
    assert len(sessions.read(jobs.recent, "ada")) == 4


def test_one_persons_many_lines_keep_nobody_elses_from_the_room_there_is(
    settings: Settings, sessions: Sessions, redis: SyncRedis
) -> None:
    """All the room that comes is little: were it given out by name, the first would get all of it for hours."""
    small = msgspec.structs.replace(settings, max_queued_jobs=4)
    reaper = Reaper(small, sessions, redis, storage.open_store(small))
    for at, owner in enumerate(("ada", "bob")):
        lines = [Line(number, scan_of(owner, 100 * at + number)) for number in range(1, 11)]
        batch = sessions.write(batches.begin, NewBatch(owner, "", Lane.BATCH, 10, "0" * 64))
        sessions.write(batches.fill, batch.id, lines)
    reaper.round()
    assert len(sessions.read(jobs.recent, "ada")) == 3
    for _ in range(2):
        done = claim(sessions, LeaseOwner.here())
        sessions.write(jobs.advance, done.id, JobState.FAILED, attempt=1, problem={"detail": "no"})
        reaper.round()
        reaper.round()
    assert len(sessions.read(jobs.recent, "bob")) >= 1
