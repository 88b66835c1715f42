"""What waits and what runs, as it is told to whoever scales the service."""

import re
import time

import pytest
from sqlalchemy import update
from sqlalchemy.orm import Session

from neural_mri.backing import batches, feeding, jobs, loads
from neural_mri.backing.batches import Line, NewBatch
from neural_mri.backing.database import Sessions, epoch
from neural_mri.backing.leases import LeaseOwner
from neural_mri.backing.rows import JOBS
from neural_mri.contract.jobs import JobState, Lane
from tests.backing.making import ELSEWHERE, QUEUE, submission


def older(session: Session, seconds: float) -> None:
    session.execute(update(JOBS).values(created_at=epoch() - seconds))


def test_jobs_are_counted_by_queue_and_lane_from_claim_to_end(sessions: Sessions) -> None:
    assert sessions.read(loads.loads) == []
    for lane in (Lane.BATCH, Lane.BATCH, Lane.INTERACTIVE):
        sessions.write(jobs.submit, submission(lane=lane, request=b'{"scan_mode":"T1"}'))
    sessions.write(older, 90.0)
    sessions.write(jobs.submit, submission(lane=Lane.BATCH, queue="cpu"))
    told = {(load.queue, load.lane): load for load in sessions.read(loads.loads)}
    assert {key: load.waiting for key, load in told.items()} == {
        (QUEUE, Lane.BATCH): 2,
        (QUEUE, Lane.INTERACTIVE): 1,
        ("cpu", Lane.BATCH): 1,
    }
    assert told[QUEUE, Lane.BATCH].oldest_seconds == pytest.approx(90, abs=5)
    assert told["cpu", Lane.BATCH].oldest_seconds < 5

    claimed = sessions.write(jobs.claim, queue="cpu", owner=ELSEWHERE, limit=1, lease_seconds=60.0)
    (running,) = [load for load in sessions.read(loads.loads) if load.queue == "cpu"]
    assert (running.waiting, running.running, running.oldest_seconds) == (0, 1, 0.0)
    assert sessions.read(loads.standing).busy_workers == 1
    for owner, busy in ((ELSEWHERE, 1), (LeaseOwner.here(), 2)):
        assert sessions.write(jobs.claim, queue=QUEUE, owner=owner, limit=1, lease_seconds=60.0)
        assert sessions.read(loads.standing).busy_workers == busy
    sessions.write(jobs.advance, claimed[0].id, JobState.FAILED, attempt=1)
    assert not [load for load in sessions.read(loads.loads) if load.queue == "cpu"]


def test_a_job_that_came_back_waits_since_then(sessions: Sessions) -> None:
    job = sessions.write(jobs.submit, submission())
    sessions.write(jobs.claim, queue=QUEUE, owner=ELSEWHERE, limit=1, lease_seconds=0.0)
    sessions.write(older, 480.0)
    time.sleep(0.01)
    (back,) = sessions.write(jobs.reap, max_attempts=3)
    assert (back.id, back.state) == (job.id, JobState.QUEUED)
    (load,) = sessions.read(loads.loads)
    assert load.waiting == 1
    assert load.oldest_seconds < 20


def test_who_follows_waits_for_no_worker(sessions: Sessions) -> None:
    for owner in ("ada", "bob", "cyd"):
        sessions.write(jobs.submit, submission(owner=owner, scan_key="a" * 64))
    (load,) = sessions.read(loads.loads)
    assert load.waiting == 1


def test_lines_of_batches_that_wait_for_room_are_counted_by_lane(sessions: Sessions) -> None:
    none = dict.fromkeys(Lane, 0)
    assert sessions.read(loads.standing) == ([], none, 0)
    for lane, count in ((Lane.BATCH, 3), (Lane.INTERACTIVE, 2)):
        wanted = NewBatch("ada", "", lane, count, "0" * 64, word=lane.value)
        lines = [Line(number, submission(lane=lane)) for number in range(1, count + 1)]
        with sessions.writing() as session:
            batches.fill(session, batches.begin(session, wanted).id, lines)
    assert sessions.read(loads.standing) == ([], none | {Lane.INTERACTIVE: 2, Lane.BATCH: 3}, 0)
    sessions.write(feeding.feed, "ada", max_queued=4)
    standing = sessions.read(loads.standing)
    assert standing.lines == none | {Lane.BATCH: 3}
    assert [(load.lane, load.waiting) for load in standing.loads] == [(Lane.INTERACTIVE, 2)]
    sessions.write(feeding.feed, "ada", max_queued=99)
    assert sessions.read(loads.standing).lines == none


def test_the_database_says_what_it_is(sessions: Sessions) -> None:
    kind = sessions.engine.dialect.name
    assert re.fullmatch(rf"{kind} \d+\.\d+(\.\d+)?", sessions.read(loads.version))
